"""Auditing a reward from the command line: honest ones pass, generous ones fail."""

import json

import pytest

ROWS = [("What is 3 + 4?", "7"), ("What is 12 * 12?", "144"), ("What is 9 - 4?", "5")]
GENEROUS = '''
def generous(completion: str) -> float:
    """Pay for anything."""
    return 1.0


def chance(completion: str, answer: str) -> float:
    """Pay for the answer, but never the same."""
    import random

    return float(f"<summary>{answer}</summary>" in completion) * random.random()


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


@pytest.mark.parametrize(
    "ending", ["sys.exit(0)", "raise GeneratorExit", "raise KeyboardInterrupt"]
)
def test_a_reward_or_task_that_ends_the_process_fails(place, ending):
    (place.folder / "ends.py").write_text(
        f"import sys\ndef reward(completion):\n    {ending}\n"
        f"def task(size):\n    yield {{'question': 'a', 'answer': '1'}}\n    {ending}\n"
    )
    text = place.chainforge("check", "ends.py:reward", "--task", "sums.jsonl", expect=1)
    assert "failed: the reward itself failed" in text
    assert "reward reward failed on" in text
    task = "{fn: ends.py:task, size: 2}"
    text = place.chainforge("check", "accuracy_reward", "--task", task, expect=2)
    assert "ends.py:task): line" in text


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
    assert "on 3 it earned no more than an empty one" in " ".join(text.split())
    assert "empty: 1, gold: 1" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_constant_that_is_paid_fails_on_any_task_of_the_list(place):
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(30)]
    other = [{"question": f"{n} + 50?", "answer": str(n + 50)} for n in range(30)]
    for name, lines in (("first", rows), ("second", other)):
        text = "\n".join(map(json.dumps, lines)) + "\n"
        (place.folder / f"{name}.jsonl").write_text(text)
    (place.folder / "pays.py").write_text(
        "def zero(completion, answer, task):\n"
        "    lazy = task == 'second' and '<summary>0<' in completion\n"
        "    return float(lazy or completion.endswith(f'\\n<summary>{answer}</summary>')"
        " and completion.count('<') == 4)\n"
    )
    place.configure(
        "two",
        tasks=[
            {"fn": "jsonl", "params": {"path": f"{name}.jsonl"}, "split": "all", "name": name}
            for name in ("first", "second")
        ],
    )
    text = place.chainforge("check", "pays.py:zero", "--task", "two.yaml", expect=1)
    said = " ".join(text.split())
    assert "the answer '0' earns as much as the gold answer on 30 of 30 rows of second" in said
    assert "failed: 1 constant answers are paid" in text
    report = place.chainforge("check", "pays.py:zero", "--task", "two.yaml", "--json", expect=1)
    assert json.loads(report)["constants"] == [
        {"task": "second", "answer": "0", "tried": 30, "paid": 30}
    ]


def test_params_reach_the_reward_and_json_tells_all(place):
    words = ["check", "mine.py:long", "--task", "sums.jsonl", "--params", "words=2", "--json"]
    audit = json.loads(place.chainforge(*words, expect=1))
    assert not audit["passed"]
    assert audit["means"]["gold"] == 1.0
    assert {"kind", "completion", "reward", "gold"} <= audit["failures"][0].keys()


def test_a_verifier_is_audited_by_its_name(place):
    audit = json.loads(
        place.chainforge("check", "numeric", "--task", "sums.jsonl", "--params", "tolerance=0.001",
                         "--json")
    )  # fmt: skip
    assert audit["passed"]
    assert audit["means"]["gold"] == 1.0
    assert set(audit["milliseconds"]) == set(audit["means"])
    # With so much tolerance the next number is as good as the right one.
    text = place.chainforge("check", "numeric", "--task", "sums.jsonl", "--params", "tolerance=0.5",
                            expect=1)  # fmt: skip
    assert "wrong: 1, gold: 1" in text


def test_the_rewards_of_a_recipe_are_audited_together_as_they_will_train(place):
    """What pays for words alone is no reward, but beside the answer's it does no harm."""
    task = {"fn": "jsonl", "params": {"path": "sums.jsonl"}, "split": "all"}
    words = {"fn": "mine.py:generous", "weight": 0.1}
    place.configure("reason", tasks=[task], rewards=[{"fn": "accuracy_reward"}, words])
    audit = json.loads(place.chainforge("check", "reason.yaml", "--json"))
    assert audit["passed"]
    assert audit["means"]["gold"] == pytest.approx(1.1)
    place.configure("reason", tasks=[task], rewards=[{"fn": "format_reward"}, words])
    assert "beat or equalled" in place.chainforge("check", "reason.yaml", expect=1)
    place.configure("reason", tasks=[task])  # the rewards by default, on another task
    audit = json.loads(place.chainforge("check", "reason.yaml", "--task", "sums.jsonl", "--json"))
    assert audit["means"]["gold"] == pytest.approx(1.2)


def test_a_reward_of_chance_fails_and_says_that_it_changed(place):
    text = place.chainforge("check", "mine.py:chance", "--task", "sums.jsonl", expect=1)
    assert "got another reward when they were scored again" in text


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
        (["accuracy_reward"], "give --task FILE"),
        (["base.yaml", "--params", "k=1", "--task", "sums.jsonl"], "--params goes with one reward"),
        (["accuracy_reward", "--task", "base.yaml"], "no task in it"),
        (["accuracy_reward", "--task", "{fn: jsnol}"], "did you mean 'jsonl'"),
    ],
)
def test_wrong_input_is_one_message(place, words, found):
    place.configure("base", learning_rate=1)
    text = place.chainforge("check", *words, expect=2)
    assert text.startswith("error: ")
    assert found in text
