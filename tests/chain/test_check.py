"""Auditing a reward from the command line: honest ones pass, generous ones fail."""

import json

import pytest

ROWS = [("What is 3 + 4?", "7"), ("What is 12 * 12?", "144"), ("What is 9 - 4?", "5")]
MINE = '''
import sys


def generous(completion: str) -> float:
    """Pay for anything."""
    return 1.0


def constant(completion, answer):
    """Pay for the answer, and for a zero."""
    honest = completion.endswith(f"\\n<summary>{answer}</summary>")
    return float((honest or "<summary>0<" in completion) and completion.count("<") == 4)


def ends(completion):
    """End the process."""
    sys.exit(0)


def task(size):
    """End the process after a row."""
    yield {"question": "a", "answer": "1"}
    raise GeneratorExit


def forgets(completion):
    completion.count("=")
'''


@pytest.fixture
def place(workplace):
    """A folder with three rows, and rewards of one's own."""
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in ROWS]
    (workplace.folder / "sums.jsonl").write_text("\n".join(lines) + "\n")
    (workplace.folder / "mine.py").write_text(MINE)
    workplace.task = {"fn": "jsonl", "params": {"path": "sums.jsonl"}, "split": "all"}
    workplace.configure("task", tasks=[workplace.task])
    return workplace


@pytest.mark.parametrize("task", ["sums.jsonl", "task.yaml"])
def test_an_honest_reward_passes(place, task):
    text = place.chainforge("check", "accuracy_reward", "--task", task)
    means = {words[0]: words[1] for line in text.splitlines() if len(words := line.split()) > 1}
    assert means["gold"] == "1.000"
    assert means["wrong"] == means["empty"] == means["stuffed"] == "0.000"
    assert "passed" in text


@pytest.mark.parametrize(
    ("reward", "found"),
    [
        ("generous", ["failed: on 3 of 3 rows", "empty: 1, gold: 1"]),
        ("generous", ["on 3 of 3 rows something beat or equalled"]),
        ("constant", ["the answer '0' earns as much as the gold answer on 3 of 3 rows"]),
        ("ends", ["failed: the reward itself failed", "reward ends failed on"]),
    ],
)
def test_a_reward_that_can_be_fooled_fails_and_is_shown_why(place, reward, found):
    words = ("check", f"mine.py:{reward}", "--task", "sums.jsonl")
    text = " ".join(place.chainforge(*words, expect=1).split())
    for said in found:
        assert said in text


def test_a_reward_that_never_returns_a_number_is_told(place):
    words = {"fn": "mine.py:forgets", "weight": 0.1}
    place.configure("rl", tasks=[place.task], rewards=[{"fn": "accuracy_reward"}, words])
    assert "reward forgets returned None for all" in place.chainforge("check", "rl.yaml")


def test_json_has_every_attempt(place):
    words = ["check", "mine.py:generous", "--task", "sums.jsonl", "--json"]
    audit = json.loads(place.chainforge(*words, expect=1))
    assert not audit["passed"]
    assert audit["means"]["gold"] == 1.0
    assert {"kind", "completion", "reward", "gold"} <= audit["failures"][0].keys()
    audit = json.loads(place.chainforge("check", "numeric", "--task", "sums.jsonl", "--json"))
    assert (audit["passed"], audit["rows"]) == (True, 3)  # a verifier, by its name
    assert set(audit["milliseconds"]) == set(audit["means"])


def test_the_rewards_of_a_recipe_are_audited_together_as_they_will_train(place):
    """What pays for words alone is no reward, but beside the answer's it does no harm."""
    words = {"fn": "mine.py:generous", "weight": 0.1}
    place.configure("rl", tasks=[place.task], rewards=[{"fn": "accuracy_reward"}, words])
    audit = json.loads(place.chainforge("check", "rl.yaml", "--json"))
    assert audit["passed"]
    assert audit["means"]["gold"] == pytest.approx(1.1)
    place.configure("rl", tasks=[place.task], rewards=[{"fn": "format_reward"}, words])
    assert "beat or equalled" in place.chainforge("check", "rl.yaml", expect=1)
    place.configure("rl", rewards=[{"fn": "accuracy_reward"}, words])
    chain = "name: own\ntasks: task.yaml\nstages: [{name: traces, recipe: collect}]\n"
    (place.folder / "chain.yaml").write_text(chain)
    assert "passed" in place.chainforge("check", "rl.yaml")  # on the chain's tasks


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["acuracy_reward", "--task", "sums.jsonl"], "did you mean 'accuracy_reward'"),
        (["accuracy_reward", "--task", "nowhere.yaml"], "nowhere.yaml"),
        (["accuracy_reward"], "give --task FILE"),
        (["acuracy_reward"], "did you mean 'accuracy_reward'"),
        (["."], "is a folder; name a YAML of it"),
        (["accuracy_reward", "--task", "base.yaml"], "no task in it"),
        (["accuracy_reward", "--task", "ends.yaml"], "mine.py:task): mine.py, line"),
    ],
)
def test_wrong_input_is_one_message(place, words, found):
    place.configure("base", learning_rate=1)
    place.configure("ends", tasks=[{"fn": "mine.py:task", "size": 2}])
    text = place.chainforge("check", *words, expect=2)
    assert text.startswith("error: ")
    assert found in text
