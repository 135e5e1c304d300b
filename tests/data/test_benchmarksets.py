"""What is evaluated can be named as one evaluates on it."""

import json

import pytest

from chainforge.core.errors import InputError
from chainforge.core.jsonl import question
from chainforge.data.benchmarksets import evaluation_questions
from chainforge.data.tasks import TaskArgs, load_examples

SUMS = "{fn: reasoning_gym, params: {dataset: chain_sum, max_digits: 1}, size: 5, split: test}"
TASK = {"fn": "reasoning_gym", "params": {"dataset": "chain_sum", "max_digits": 1}, "size": 5}
EXPECTED = [question(row) for row in load_examples(TaskArgs([TASK | {"split": "test"}]), seed=7)]


def test_a_task_as_text_or_mapping_or_in_the_configuration_of_an_evaluation(tmp_path):
    file = tmp_path / "scores.yaml"
    file.write_text(f"tasks:\n  - {SUMS}\nnum_samples: 4\n")
    for entry, source in (
        (SUMS, "reasoning_gym"),
        (TASK | {"split": "test"}, "reasoning_gym"),
        (str(file), "scores.yaml"),
    ):
        assert evaluation_questions([entry], 7) == [(source, text) for text in EXPECTED]
    assert evaluation_questions([str(file)], 8) != evaluation_questions([str(file)], 7)


@pytest.mark.parametrize(
    "row",
    [{"question": "Why?"}, {"problem": "Why?", "answer": "1"}, {"text": "Why?"},
     {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "Why?"}]}],
)  # fmt: skip
def test_files_and_folders(tmp_path, row):
    (tmp_path / "bench").mkdir()
    for name in ("test.jsonl", "train.jsonl"):
        (tmp_path / "bench" / name).write_text(json.dumps(row) + "\n")
    file, folder = str(tmp_path / "bench/test.jsonl"), str(tmp_path / "bench")
    assert evaluation_questions([file, folder], 0) == [("test.jsonl", "Why?"), (folder, "Why?")]
    assert evaluation_questions([f"{folder}::train"], 0) == [(f"{folder}::train", "Why?")]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("gone.jsonl", r"decontaminate\[0\]: gone.jsonl: no such file"),
        ("{fn: [", "not YAML"),
        ("{fn}", "has no|fn"),
        ("me/no-such-data", "cannot load 'me/no-such-data'"),
        ("", "expected a task, a path or a Hub id"),
    ],
)
def test_what_names_no_evaluation(entry, message):
    with pytest.raises(InputError, match=message):
        evaluation_questions([entry], 0)


def test_a_file_without_questions(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"id": 1}\n')
    with pytest.raises(InputError, match="no column with a question"):
        evaluation_questions([str(file)], 0)
    file.write_text("")
    with pytest.raises(InputError, match="holds no question"):
        evaluation_questions([str(file)], 0)
    (tmp_path / "sft.yaml").write_text("max_steps: 3\n")
    with pytest.raises(InputError, match="has no `tasks`"):
        evaluation_questions([str(tmp_path / "sft.yaml")], 0)
