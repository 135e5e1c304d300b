import json
import random
import sys
from pathlib import Path

import pytest

from chainforge.core.errors import InputError
from chainforge.core.jsonl import question
from chainforge.core.transcript import system_prompt
from chainforge.data.sources import Columns, same_question, split_of
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.rewards.verify import verify

CHAIN = {"dataset": "chain_sum", "min_terms": 2, "max_terms": 4, "max_digits": 1}


def load(*tasks, seed=0, **settings):
    return load_examples(TaskArgs(list(tasks), **settings), seed=seed)


def gym(size=50, split="train", params=CHAIN, **more):
    return {"fn": "reasoning_gym", "params": params, "size": size, "split": split, **more}


def keys(rows):
    return {same_question(question(row)) for row in rows}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_of_a_procedural_data_set():
    row = load(gym())[0]
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
    assert row["prompt"][0]["content"] == system_prompt()
    assert (row["task"], row["verifier"]) == ("chain_sum", "reasoning_gym")
    entry = json.loads(row["entry"])
    assert entry["metadata"]["source_dataset"] == "chain_sum"
    assert entry["answer"] == row["answer"]
    assert entry["question"] == question(row)


def test_the_same_seed_gives_the_same_rows_and_another_gives_others():
    rows = load(gym())
    assert rows == load(gym())
    assert len(keys(rows) & keys(load(gym(), seed=1))) < 15
    assert keys(rows) != keys(load(gym(seed=1)))


def test_splits_share_no_question_whatever_the_seeds():
    splits = {split: keys(load(gym(400, split), seed=seed)) for seed, split in
              enumerate(["train", "validation", "test"])}  # fmt: skip
    assert [len(found) for found in splits.values()] == [400, 400, 400]
    assert len(set.union(*splits.values())) == 1200
    for split, found in splits.items():
        assert {split_of(key) for key in found} == {split}


def test_no_question_comes_twice_and_an_exhausted_space_says_how_many_there_are():
    rows = load(gym(300), gym(300, params=CHAIN | {"max_terms": 3}))
    assert len(keys(rows)) == len({row["id"] for row in rows}) == 600
    narrow = CHAIN | {"max_terms": 2}
    with pytest.raises(InputError, match=r"only \d+ distinct rows of split 'test' .*200 in all"):
        load(gym(500, "test", params=narrow))
    assert len(load(gym(200, "all", params=narrow))) == 200


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({}, "mapping with `fn`"),
        ({"fn": "reasoning_gim"}, "did you mean 'reasoning_gym'"),
        ({"fn": "jsonl", "parms": {}}, "unknown key 'parms'; did you mean 'params'"),
        ({"fn": "jsonl"}, "missing a required argument: 'path'"),
        ({"fn": "jsonl", "params": {"path": "none.jsonl"}}, "no such file"),
        ({"fn": "jsonl", "params": {"path": "x", "anwser": "y"}}, "did you mean 'answer'"),
        (
            {"fn": "jsonl", "params": {"path": "x", "extract": "last"}},
            "extract: 'last'; there are",
        ),
        ("chain_sum", "expected a mapping"),
        (gym(split="dev"), r"tasks\[0\].split: 'dev'"),
        (gym(size=0), r"tasks\[0\].size: Expected `int` >= 1"),
        (gym(size="many"), "size: Expected `int.*got `str`"),
        (gym(size=None), "give the number of rows"),
        (gym(params={"dataset": "chain_sun"}), "did you mean 'chain_sum'"),
        (gym(params=CHAIN | {"min_term": 2}), "did you mean 'min_terms'"),
        (gym(params=CHAIN | {"min_terms": 9}), "max_terms must be >= min_terms"),
        (gym(params=CHAIN | {"min_terms": "two"}), "not supported between"),
        (gym(params=CHAIN | {"seed": 3}), "give `seed` beside `params`"),
        (
            gym(params=CHAIN | {"verifier": "numerc"}),
            "no verifier 'numerc'; did you mean 'numeric'",
        ),
        ({"fn": "hub", "params": {"dataset": "x", "preset": "gsm9k"}}, "did you mean 'gsm8k'"),
        ({"fn": "hub", "params": {"dataset": "x", "colour": 1}}, "unknown key 'colour'"),
    ],
)
def test_bad_tasks_are_one_clear_message(task, message):
    with pytest.raises(InputError, match=message):
        load(task)
    with pytest.raises(InputError, match="none given"):
        load()


def test_data_sets_without_a_single_answer_keep_their_entry():
    rows = load(gym(5, params={"dataset": "rush_hour"}))
    assert rows[0]["answer"] == ""
    assert "entry" in rows[0]


def test_system_prompt_of_ones_own_or_none():
    assert load(gym(1), system_prompt="Count.")[0]["prompt"][0]["content"] == "Count."
    assert [turn["role"] for turn in load(gym(1), system_prompt="")[0]["prompt"]] == ["user"]


def test_jsonl_maps_columns_and_keeps_others(tmp_path):
    rows = [
        {"problem": f"What is {i}?", "solution": i, "level": "easy", "id": f"p{i}"}
        for i in range(200)
    ]
    path = write_jsonl(tmp_path / "sums.jsonl", rows)
    params = {"path": path, "question": "problem", "answer": "solution", "verifier": "numeric"}
    task = {"fn": "jsonl", "params": params}
    made = load(task | {"split": "all"})
    assert len(made) == 200
    expected = {"answer": "3", "task": "sums", "verifier": "numeric", "level": "easy"}
    assert made[3].items() >= (expected | {"source_id": "p3"}).items()
    parts = [load(task | {"split": split}) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 200
    some = load(task | {"params": params | {"keep": []}, "size": 5, "name": "mine"})
    assert len(some) == 5
    assert set(some[0]) == {"id", "prompt", "answer", "task", "verifier"}
    assert some[0]["task"] == "mine"


def test_jsonl_of_messages(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    path = write_jsonl(
        tmp_path / "x.jsonl", [{"prompt": turns, "answer": "2", "verifier": "exact"}]
    )
    (row,) = load({"fn": "jsonl", "params": {"path": path}, "split": "all"})
    assert (row["prompt"], row["verifier"]) == (turns, "exact")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "is empty"),
        ('{"question": "a", "answer": "b"}\n{"question": "c"', "line 2"),
        ('\n{"question": "a", "answer": "b"}\n\n{"question": "c"}\n', "line 4: no column 'answer'"),
        ('{"question": null, "answer": "b"}\n', "line 1: column 'question'"),
        ('{"question": "  ", "answer": "b"}\n', "line 1: column 'question'"),
        ('{"question": "a", "answer": ""}\n', "line 1: column 'answer'"),
        ('{"question": "a", "solution": "b"}\n{"question": "c"}\n', "2 of 2 rows"),
        (
            '{"question": "a", "answers": "b"}\n',
            "no column 'answer', but question, answers; name yours",
        ),
        ('{"prompt": [{"role": "user"}], "answer": "b"}\n', "a message must be"),
        (
            '{"prompt": [{"role": "assistant", "content": "x"}], "answer": "b"}\n',
            "must be the user",
        ),
        (
            '{"question": "a", "answer": "b", "verifier": "reasoning_gym"}\n',
            "needs the column `entry`",
        ),
        ('{"question": "a", "answer": ""}\n' * 7, "7 of 7 rows(.|\n)*and 2 more"),
    ],
)
def test_malformed_lines_are_named(tmp_path, lines, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    with pytest.raises(InputError, match=message):
        load({"fn": "jsonl", "params": {"path": str(path)}, "split": "all"})


@pytest.mark.parametrize(
    ("lines", "answers"),
    [
        ([{"question": "a"}, {"question": "b", "level": 3}], [None, None]),
        ([{"prompt": [{"role": "user", "content": "a"}]}], [None]),
        ([{"prompt": "Explain entanglement"}, {"prompt": "Derive it"}], [None, None]),
        ([{"question": "a", "answer": None}, {"question": "b", "answer": "4"}], [None, "4"]),
    ],
)
def test_prompts_need_no_answer(tmp_path, lines, answers):
    path = write_jsonl(tmp_path / "prompts.jsonl", lines)
    rows = load({"fn": "jsonl", "params": {"path": path}, "split": "all"})
    assert [row["answer"] for row in rows] == answers
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)
    (tmp_path / "own.py").write_text("def own():\n    return [{'question': 'a'}]\n")
    (row,) = load({"fn": f"{tmp_path}/own.py:own", "split": "all"})
    assert row["answer"] is None


def test_tasks_of_different_splits_may_not_share_a_question(tmp_path):
    path = write_jsonl(
        tmp_path / "x.jsonl", [{"question": f"What is {i}?", "answer": str(i)} for i in range(100)]
    )
    both = {"fn": "jsonl", "params": {"path": path}}
    assert len(load(both | {"split": "train"}, both | {"split": "test"})) > 60
    with pytest.raises(InputError, match="share a question"):
        load(both | {"split": "all"}, both | {"split": "test"})


def test_a_task_of_ones_own(tmp_path):
    file = tmp_path / "task.py"
    file.write_text(
        "def riddles(kind, size):\n"
        "    for i in range(size * 3):\n"
        "        yield {'question': f'{kind} {i}?', 'answer': str(i), 'verifier': 'exact', 'n': i}\n"
        "def wrong():\n"
        "    yield {'question': 'a', 'answer': 3}\n"
        "def text():\n"
        "    return 'text'\n"
    )
    task = {"fn": f"{file}:riddles", "params": {"kind": "Riddle"}, "size": 20}
    rows = load(task)
    assert len(rows) == 20
    assert rows[0]["task"] == "riddles"
    assert rows[0]["verifier"] == "exact"
    assert isinstance(rows[0]["n"], int)
    assert {split_of(question(row)) for row in rows} == {"train"}
    for name, message in (("wrong", "row 1: `answer` must be text, found 3"), ("text", "gave a str"),
                          ("riddle", "did you mean 'riddles'")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            load(task | {"fn": f"{file}:{name}", "params": {}})
    with pytest.raises(InputError, match="did you mean 'kind'"):
        load(task | {"params": {"kid": 1}})


@pytest.fixture
def folder(tmp_path):
    """A local copy in gsm8k's form: train and test, and one test question leaked into train."""
    pytest.importorskip("datasets")
    rng = random.Random(0)
    rows = [
        {"question": f"How many are {i} and 2?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2:,}"}
        for i in range(1500)
    ]
    rng.shuffle(rows)
    folder = tmp_path / "gsm"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows[:1400])
    write_jsonl(folder / "test.jsonl", [*rows[1400:], rows[0]])
    return str(folder)


def test_hub_uses_a_data_sets_own_splits(folder):
    def of(split):
        params = {"dataset": folder, "preset": "gsm8k"}
        return load({"fn": "hub", "params": params, "split": split})

    train, validation, test = of("train"), of("validation"), of("test")
    assert len(test) == 101
    assert len(train) + len(validation) == 1399
    assert 40 < len(validation) < 110
    assert not keys(train) & keys(test)
    assert not keys(train) & keys(validation)
    assert train[0]["verifier"] == "numeric"
    assert {row["task"] for row in test} == {"gsm8k"}
    big = next(row for row in train if len(row["answer"]) == 4)
    assert "," not in big["answer"]


def test_hub_divides_a_single_split_by_content(folder):
    Path(folder, "test.jsonl").unlink()
    Path(folder, "train.jsonl").rename(Path(folder, "other.jsonl"))
    task = {"fn": "hub", "params": {"dataset": folder, "preset": "gsm8k"}}
    train, test = (load(task | {"split": split}) for split in ("train", "test"))
    assert 200 < len(test) < 360
    assert not keys(train) & keys(test)
    drawn = [load(task | {"size": 10}, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_hub_takes_the_boxed_answer(tmp_path):
    solution = "So $x = \\boxed{3}$; no: $\\boxed{\\frac{1}{2}}$."
    rows = [
        {"problem": f"{i}?", "solution": solution, "level": "Level 1", "type": "Algebra"}
        for i in range(40)
    ]
    write_jsonl(tmp_path / "train.jsonl", [*rows, rows[0] | {"solution": "No box."}])
    params = {"dataset": str(tmp_path), "preset": "math"}
    made = load({"fn": "hub", "params": params, "split": "all"})
    assert len(made) == 40
    assert made[0]["answer"] == "\\frac{1}{2}"
    assert made[0]["level"] == "Level 1"


BOXED = [
    (r"So \boxed 4 of the 10 orders.", "4"),
    (r"$\boxed\frac{3}{7}$ is 3 of 7.", r"\frac{3}{7}"),
    (r"$\boxed\frac37$", r"\frac37"),
    (r"\boxed{\text{(A)}} 12", r"\text{(A)}"),
    (r"\fbox{12} and 13", "12"),
    (r"$x = \boxed{2}$ or $\boxed{3}$", "2, 3"),
    (r"\boxed{2}, that is $\boxed{ 2 }$", "2"),
    (r"\boxed 12.", "12"),
    (r"\boxed x", "x"),
    (r"\boxed{3, then 4", None),
    (r"\boxed{} of 5", None),
    (r"\boxed{2} and \boxed{", None),
    (r"\boxed 4\pi", None),
    (r"\boxed 2^{10}", None),
    ("The answer is 4.", None),
]


@pytest.mark.parametrize(("solution", "answer"), BOXED)
def test_a_box_is_read_or_the_row_says_why_not(solution, answer):
    raw = {"question": "?", "answer": solution}
    if answer is None:
        with pytest.raises(InputError, match=r"column 'answer': (?:a|an|no) .*box"):
            Columns(extract="boxed").row(raw)
    else:
        assert Columns(extract="boxed").row(raw)["answer"] == answer


@pytest.mark.parametrize(
    ("value", "extract", "answer"),
    [
        (1e-05, "text", "0.00001"),
        (1e16, "text", "10000000000000000"),
        (2.50, "text", "2.5"),
        (-3, "text", "-3"),
        ("Add.\n#### 1,234", "hashes", "1234"),
        ("#### (1, 2)", "hashes", "(1, 2)"),
    ],
)
def test_a_number_is_written_as_people_do(value, extract, answer):
    read = Columns(extract=extract).row({"question": "?", "answer": value})["answer"]
    assert read == answer
    assert verify("math", answer, read) is True


def test_all_of_a_benchmark_is_test_rows(tmp_path):
    rows = [{"id": i, "problem": f"{i}?", "answer": f"{i:03d}", "url": ""} for i in range(30)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    for preset in ("aime24", "aime25"):
        params = {"dataset": str(tmp_path), "preset": preset}
        made = load({"fn": "hub", "params": params, "split": "test"})
        assert len(made) == 30
        assert {(row["task"], row["verifier"]) for row in made} == {(preset, "numeric")}
        assert made[7]["answer"] == "007"
        assert verify("numeric", "7", made[7]["answer"])
        with pytest.raises(InputError, match="no train rows"):
            load({"fn": "hub", "params": params, "split": "train"})


def test_math_500_is_verified_as_mathematics(tmp_path):
    row = {"problem": "p?", "answer": r"\frac{1}{2}", "subject": "x", "level": 2, "solution": ""}
    write_jsonl(tmp_path / "test.jsonl", [row])
    params = {"dataset": str(tmp_path), "preset": "math-500"}
    (row,) = load({"fn": "hub", "params": params, "split": "test"})
    assert (row["verifier"], row["level"], row["answer"]) == ("math", 2, r"\frac{1}{2}")


def test_hub_says_what_cannot_be_read(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    for params, message in (
        ({"dataset": folder, "question": "problem"}, r"(?s)1400 of 1400.*row 1: no column 'pro"),
        ({"dataset": str(tmp_path / "empty")}, "must contain parquet or JSON lines"),
        ({"dataset": "gsm8k"}, "check the id and the network"),
    ):
        with pytest.raises(InputError, match=message):
            load({"fn": "hub", "params": params})


def test_importing_tasks_imports_no_torch():
    import subprocess

    code = (
        "import sys, chainforge.data.tasks, chainforge.generate.teacher, chainforge.data.select,"
        " chainforge.data.datasets, chainforge.generate.sampling;"
        "assert not {'torch', 'transformers', 'openai', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
