"""Whether tasks give the rows that were asked for, each question once, in disjoint splits."""

import json
import random
from pathlib import Path

import pytest

from chainforge.core.errors import InputError
from chainforge.core.transcript import DEFAULT, tags_of
from chainforge.data.sources import Columns, example, question, same_question, split_of
from chainforge.data.tasks import TaskArgs, check_batch, grpo_dataset, load_examples
from chainforge.rewards.verify import verify

SPLITS = ("train", "validation", "test")
CHAIN = {"dataset": "chain_sum", "min_terms": 2, "max_terms": 4, "max_digits": 1}


def load(*tasks, seed=0, **settings):
    return load_examples(TaskArgs(list(tasks), **settings), seed=seed)


def gym(size=50, split="train", params=CHAIN, **more):
    return {"fn": "reasoning_gym", "params": params, "size": size, "split": split, **more}


def jsonl(path, split="all", **params):
    return {"fn": "jsonl", "params": {"path": str(path)} | params, "split": split}


def hub(dataset, split="train", **params):
    return {"fn": "hub", "params": {"dataset": str(dataset)} | params, "split": split}


def keys(rows):
    return {same_question(question(row)) for row in rows}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_of_a_procedural_data_set():
    rows = load(gym())
    assert [turn["role"] for turn in rows[0]["prompt"]] == ["system", "user"]
    assert rows[0]["prompt"][0]["content"] == tags_of(DEFAULT).system_prompt
    assert (rows[0]["task"], rows[0]["verifier"]) == ("chain_sum", "reasoning_gym")
    entry = json.loads(rows[0]["entry"])
    assert entry["metadata"]["source_dataset"] == "chain_sum"
    assert (entry["answer"], entry["question"]) == (rows[0]["answer"], question(rows[0]))
    assert rows == load(gym())
    assert len(keys(rows) & keys(load(gym(), seed=1))) < 15
    assert keys(rows) != keys(load(gym(seed=1)))
    assert load(gym(1), system_prompt="Count.")[0]["prompt"][0]["content"] == "Count."
    assert [turn["role"] for turn in load(gym(1), system_prompt="")[0]["prompt"]] == ["user"]
    row = load(gym(5, params={"dataset": "rush_hour"}))[0]  # has no single right answer
    assert (row["answer"], "entry" in row) == ("", True)


def test_splits_depend_on_content_alone_and_share_no_question(tmp_path):
    splits = {split: keys(load(gym(400, split), seed=seed)) for seed, split in enumerate(SPLITS)}
    assert [len(found) for found in splits.values()] == [400, 400, 400]
    for split, found in splits.items():
        assert {split_of(key) for key in found} == {split}
    assert split_of("How many  legs?\n") == split_of("how many legs?")
    found = [split_of(f"question {number}") for number in range(4000)]
    assert abs(found.count("test") / 4000 - 0.20) < 0.03
    assert abs(found.count("validation") / 4000 - 0.05) < 0.02
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(100)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    assert len(load(jsonl(path, "train"), jsonl(path, "test"))) > 60
    with pytest.raises(InputError, match="share a question"):
        load(jsonl(path, "all"), jsonl(path, "test"))


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
        ({}, r"tasks\[0\]: .*the key .fn. is missing"),
        ("jsonl", r"tasks\[0\]: expected a mapping, found 'jsonl'"),
        ({"fn": "reasoning_gim"}, "did you mean 'reasoning_gym'"),
        ({"fn": "jsonl", "parms": {}}, "unknown key 'parms'; did you mean 'params'"),
        ({"fn": "jsonl"}, "missing a required argument: 'path'"),
        (jsonl("none.jsonl"), "no such file"),
        (jsonl("x", anwser="y"), r"tasks\[0\] \(jsonl\): params: .*did you mean 'answer'"),
        (jsonl("x", keep="level"), "params.keep: expected a list, found text"),
        (jsonl("x", extract="last"), "extract: 'last'; there are"),
        (gym(split="dev"), r"tasks\[0\].split: 'dev'"),
        (gym(size=0), r"tasks\[0\].size: expected a whole number >= 1"),
        (gym(size=None), "give the number of rows"),
        (gym(params={"dataset": "chain_sun"}), "did you mean 'chain_sum'"),
        (gym(params=CHAIN | {"min_term": 2}), "did you mean 'min_terms'"),
        (gym(params=CHAIN | {"seed": 3}), "give `seed` beside `params`"),
        (gym(params=CHAIN | {"verifier": "numerc"}), "'numerc'; did you mean 'numeric'"),
        (hub("x", preset="gsm9k"), "did you mean 'gsm8k'"),
        (hub("gsm8k"), "check the id and the network"),
    ],
)
def test_bad_tasks_are_one_clear_message(task, message):
    with pytest.raises(InputError, match=message):
        load(task)
    with pytest.raises(InputError, match="none given"):
        load()


def test_jsonl_maps_columns_and_keeps_others(tmp_path):
    rows = [
        {"problem": f"What is {i}?", "solution": i, "level": "easy", "id": f"p{i}"}
        for i in range(200)
    ]
    path = write_jsonl(tmp_path / "sums.jsonl", rows)
    columns = {"question": "problem", "answer": "solution", "verifier": "numeric"}
    made = load(jsonl(path, **columns))
    expected = {"answer": "3", "task": "sums", "verifier": "numeric", "level": "easy"}
    assert made[3].items() >= (expected | {"source_id": "p3"}).items()
    assert sum(len(load(jsonl(path, split, **columns))) for split in SPLITS) == len(made) == 200
    some = load(jsonl(path, **columns, keep=[]) | {"size": 5, "name": "mine"})
    assert set(some[0]) == {"id", "prompt", "answer", "task", "verifier"}
    assert (len(some), some[0]["task"]) == (5, "mine")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "is empty"),
        (
            '\n{"question": "a", "answer": "b"}\n\n{"question": "c", "gold": "d"}\n',
            "line 4: no column",
        ),
        ('{"question": "a", "answers": "b"}\n', "no column 'answer', but question, answers; name"),
        ('{"prompt": [{"role": "assistant", "content": "x"}], "answer": "b"}\n', "be the user"),
        ('{"question": "a", "answer": "b", "verifier": "reasoning_gym"}\n', "the column `entry`"),
        ('{"question": "a", "answer": ""}\n' * 7, "7 of 7 rows(.|\n)*and 2 more"),
    ],
)
def test_malformed_lines_are_named(tmp_path, lines, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    with pytest.raises(InputError, match=message):
        load(jsonl(path))


def test_prompts_need_no_answer_in_a_list_a_text_file_or_beside_others(tmp_path):
    texts = ["Explain quantum entanglement", "Derive the quadratic formula"]
    own = load_examples(TaskArgs(prompts=texts), "think")
    assert [(question(row), row["answer"], row["task"]) for row in own] == [
        (text, None, "prompts") for text in texts]  # fmt: skip
    (tmp_path / "p.txt").write_bytes(
        f"{texts[0]}\n\n".encode() + b'{"prompt": "What?"}\r\n\xff\n' * 1
    )
    (tmp_path / "mixed.jsonl").write_text(
        '{"question": "1+1?", "answer": "2"}\n{"prompt": "Why?"}\n'
    )
    with pytest.raises(InputError, match=r"(?s)1 of 3 rows.*row 4: not text: 'utf-8'"):
        load(jsonl(tmp_path / "p.txt"))
    (tmp_path / "p.txt").write_text(f"{texts[0]}\n\n" + '{"prompt": "What?"}\r\n')
    assert {question(row) for row in load(jsonl(tmp_path / "p.txt"))} == {texts[0], "What?"}
    mixed = {question(row): row["answer"] for row in load(jsonl(tmp_path / "mixed.jsonl"))}
    assert mixed == {"1+1?": "2", "Why?": None}


TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]


def test_prompts_need_no_answer_and_may_be_messages(tmp_path):
    for lines, answers in (
        ([{"question": "a"}, {"question": "b", "level": 3}], [None, None]),
        ([{"prompt": TURNS}], [None]),
        ([{"question": "a", "answer": None}, {"question": "b", "answer": "4"}], [None, "4"]),
    ):
        rows = load(jsonl(write_jsonl(tmp_path / "prompts.jsonl", lines)))
        assert [row["answer"] for row in rows] == answers
        assert rows[0]["prompt"][-1] == TURNS[1]


OWN = """
def riddles(kind, size):
    for i in range(size * 3):
        yield {'question': f'{kind} {i}?', 'answer': str(i), 'verifier': 'exact', 'n': i}
def wrong():
    yield {'question': 'a', 'answer': 3}
def leave():
    raise SystemExit(0)
"""


def test_a_task_of_ones_own(tmp_path):
    (file := tmp_path / "task.py").write_text(OWN)
    task = {"fn": f"{file}:riddles", "params": {"kind": "Riddle"}, "size": 20}
    rows = load(task)
    assert len(rows) == 20
    assert (rows[0]["task"], rows[0]["verifier"], type(rows[0]["n"])) == ("riddles", "exact", int)
    assert {split_of(question(row)) for row in rows} == {"train"}
    for name, message in (("wrong", "row 1: `answer` must be text, found 3"),
                          ("riddle", "did you mean 'riddles'"), ("leave", "SystemExit")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            load(task | {"fn": f"{file}:{name}", "params": {}})
    with pytest.raises(InputError, match="did you mean 'kind'"):
        load(task | {"params": {"kid": 1}})


@pytest.fixture
def folder(tmp_path):
    """A local copy in gsm8k's form: train and test, and one test question leaked into train."""
    rows = [
        {"question": f"How many are {i} and 2?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2:,}"}
        for i in range(1500)
    ]
    random.Random(0).shuffle(rows)
    write_jsonl(tmp_path / "train.jsonl", rows[:1400])
    write_jsonl(tmp_path / "test.jsonl", [*rows[1400:], rows[0]])
    return str(tmp_path)


def test_hub_uses_a_data_sets_own_splits(folder):
    train, validation, test = (load(hub(folder, split, preset="gsm8k")) for split in SPLITS)
    assert len(test) == 101
    assert len(train) + len(validation) == 1399
    assert 40 < len(validation) < 110
    assert not keys(train) & (keys(test) | keys(validation))
    assert train[0]["verifier"] == "numeric"
    assert {row["task"] for row in test} == {"gsm8k"}
    assert "," not in next(row for row in train if len(row["answer"]) == 4)["answer"]
    with pytest.raises(InputError, match=r"(?s)1400 of 1400.*row 1: no column 'pro"):
        load(hub(folder, question="problem"))


def test_hub_divides_a_single_split_by_content(folder):
    Path(folder, "test.jsonl").unlink()
    Path(folder, "train.jsonl").rename(Path(folder, "other.jsonl"))
    train, test = (load(hub(folder, split, preset="gsm8k")) for split in ("train", "test"))
    assert 200 < len(test) < 360
    assert not keys(train) & keys(test)
    task = hub(folder, preset="gsm8k") | {"size": 10}
    drawn = [load(task, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_presets_read_the_answers_of_their_data_sets(tmp_path):
    boxed = {"problem": "1?", "solution": "So $\\boxed{\\frac{1}{2}}$.", "level": "1", "type": "A"}
    rows = [boxed | {"problem": f"{i}?"} for i in range(40)]
    write_jsonl(tmp_path / "train.jsonl", [*rows, boxed | {"solution": "No box."}])
    made = load(hub(tmp_path, "all", preset="math"))
    assert len(made) == 40
    assert (made[0]["answer"], made[0]["level"]) == ("\\frac{1}{2}", "1")
    rows = [{"id": i, "problem": f"{i}?", "answer": f"{i:03d}", "url": ""} for i in range(30)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    made = load(hub(tmp_path, "test", preset="aime24"))
    assert [(row["task"], row["verifier"]) for row in made] == [("aime24", "numeric")] * 30
    assert verify("numeric", "7", made[7]["answer"])
    with pytest.raises(InputError, match="no train rows"):
        load(hub(tmp_path, "train", preset="aime24"))


@pytest.mark.parametrize(
    ("value", "extract", "answer"),
    [
        (1e-05, "text", "0.00001"),
        (1e16, "text", "10000000000000000"),
        (-3, "text", "-3"),
        (float("nan"), "text", None),
        ("Add.\n#### 1,234", "hashes", "1234"),
        ("#### (1, 2)", "hashes", "(1, 2)"),
        (r"So \boxed 4 of the 10 orders.", "boxed", "4"),
        (r"\boxed{\text{(A)}} 12", "boxed", r"\text{(A)}"),
        (r"\fbox{12} and 13", "boxed", "12"),
        (r"$x = \boxed{2}$ or $\boxed{3}$", "boxed", "2, 3"),
        (r"\boxed{2}, that is $\boxed{ 2 }$", "boxed", "2"),
        (r"\boxed{3, then 4", "boxed", None),
        ("The answer is 4.", "boxed", None),
    ],
)
def test_an_answer_is_read_or_the_row_says_why_not(value, extract, answer):
    raw = {"question": "?", "answer": value}
    if answer is None:
        with pytest.raises(InputError, match=r"column 'answer': (?:a|an|no) .*(?:box|answer)"):
            Columns(extract=extract).row(raw)
    else:
        assert Columns(extract=extract).row(raw)["answer"] == answer


def test_grpo_rows_keep_every_column_need_a_prompt_and_fill_a_generation_batch():
    prompt = [{"role": "user", "content": "1 + 1?"}]
    columns = {  # what rows have, and what Arrow holds of it
        "words": ([3, None], [3, None, None]),
        "share": ([1, 0.5], [1.0, 0.5, None]),
        "mixed": (["a", 2], ['"a"', "2", None]),
        "flags": ([True, 0.5], ["true", "0.5", None]),
        "choices": ([["a", "b"], []], [["a", "b"], [], None]),
        "meta": ([{"x": 1}, {"y": 2}], ['{"x": 1}', '{"y": 2}', None]),
        "entry": (['{"answer": "2"}'], ['{"answer": "2"}', None, None]),
        "big": ([2**70], [str(2**70), None, None]),
        "turns": ([[{"role": "user"}]], ['[{"role": "user"}]', None, None]),
    }
    rows = [{"prompt": prompt} for _ in range(3)]
    for name, (given, _) in columns.items():
        for row, value in zip(rows, given, strict=False):
            row[name] = value
    made = grpo_dataset(rows)
    assert made[0]["prompt"] == prompt
    assert {name: made[name][:] for name in columns} == {
        n: held for n, (_, held) in columns.items()
    }
    with pytest.raises(InputError, match="no rows"):
        grpo_dataset([])
    with pytest.raises(InputError, match="row 2: the prompt must be a list"):
        grpo_dataset([{"prompt": prompt}, {"prompt": "text"}])
    check_batch([{"prompt": prompt}] * 4, generation_batch_size=32, num_generations=8)
    with pytest.raises(InputError, match="4 rows are fewer than the 5 prompts"):
        check_batch([{"prompt": prompt}] * 4, 40, 8)


def test_equal_content_has_an_equal_id():
    prompt = [{"role": "user", "content": "1 + 1 ="}]
    one = example(prompt, "2", task="sums")
    assert one["id"] == example(prompt, "3", task="sums", level=1)["id"]
    assert one["id"] != example(prompt, "2", task="other")["id"]
    assert one["verifier"] == "math"
