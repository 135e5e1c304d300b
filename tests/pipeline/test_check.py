"""Auditing a reward from the command line: honest ones pass, generous ones fail."""

import json

import pytest

ROWS = [("What is 3 + 4?", "7"), ("What is 12 * 12?", "144"), ("What is 9 - 4?", "5")]
GENEROUS = '''
def generous(completion: str) -> float:
    """Pay for anything."""
    return 1.0


def long(completion: str, answer: str, words: int) -> float:
    """Pay for the answer anywhere in a long enough text."""
    return float(answer in completion and len(completion.split()) > words)
'''


@pytest.fixture
def place(workplace):
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in ROWS]
    (workplace.folder / "sums.jsonl").write_text("\n".join(lines) + "\n")
    (workplace.folder / "mine.py").write_text(GENEROUS)
    workplace.configure(
        "task", tasks=[{"fn": "jsonl", "params": {"path": "sums.jsonl"}, "split": "all"}]
    )
    return workplace


@pytest.mark.parametrize("task", ["sums.jsonl", "task.yaml"])
def test_an_honest_reward_passes(place, task):
    text = place.chainforge("check", "accuracy_reward", "--task", task)
    means = {words[0]: words[1] for line in text.splitlines() if len(words := line.split()) > 1}
    assert means["gold"] == "1.000"
    assert means["wrong"] == means["empty"] == means["stuffed"] == "0.000"
    assert "passed" in text


def test_a_generous_reward_fails_and_is_shown_why(place):
    text = place.chainforge("check", "mine.py:generous", "--task", "sums.jsonl", expect=1)
    assert "failed: on 3 of 3 rows" in text
    assert "empty: 1, gold: 1" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_params_reach_the_reward_and_json_tells_all(place):
    words = ["check", "mine.py:long", "--task", "sums.jsonl", "--params", "words=2", "--json"]
    audit = json.loads(place.chainforge(*words, expect=1))
    assert not audit["passed"]
    assert audit["means"]["gold"] == 1.0
    assert {"kind", "completion", "reward", "gold"} <= audit["failures"][0].keys()


def test_a_task_may_be_written_on_the_command_line(place):
    task = "{fn: jsonl, params: {path: sums.jsonl}, split: all}"
    audit = json.loads(place.chainforge("check", "accuracy_reward", "--task", task, "--json"))
    assert audit["rows"] == 3


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["acuracy_reward", "--task", "sums.jsonl"], "did you mean 'accuracy_reward'"),
        (["mine.py:long", "--task", "sums.jsonl"], "words"),
        (["mine.py:long", "--task", "sums.jsonl", "--params", "words"], "KEY=VALUE"),
        (["accuracy_reward", "--task", "nowhere.yaml"], "nowhere.yaml"),
        (["accuracy_reward", "--task", "base.yaml"], "no task in it"),
        (["accuracy_reward", "--task", "{fn: jsnol}"], "did you mean 'jsonl'"),
    ],
)
def test_wrong_input_is_one_message(place, words, found):
    place.configure("base", learning_rate=1)
    text = place.chainforge("check", *words, expect=2)
    assert text.startswith("error: ")
    assert found in text
