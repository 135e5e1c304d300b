"""The audit: honest rewards pass it on every verifier, broken ones are caught and shown."""

import json

import pytest

from chainforge.core.errors import InputError
from chainforge.data.sources import example
from chainforge.rewards.audit import KINDS, audit
from chainforge.rewards.functions import accuracy_reward
from chainforge.rewards.reward import Reward, RewardArgs, load_rewards


def row(answer, verifier, **extra):
    prompt = [{"role": "user", "content": f"Say {answer}."}]
    return example(prompt, answer, task=verifier, verifier=verifier, **extra)


def gym(dataset, answer, **metadata):
    own = {"question": "?", "answer": answer, "metadata": {"source_dataset": dataset, **metadata}}
    return row(answer, "reasoning_gym", entry=json.dumps(own))


ROWS = [
    row("4", "math"),
    row(r"\frac{\sqrt{3}}{2}", "math"),
    row("Paris", "math"),
    row(r"50\%", "math"),
    row("-12", "arithmetic"),
    row("3.5", "numeric"),
    row("B", "choice"),
    row("Rome", "exact"),
    gym("chain_sum", "17"),
    gym("gsm_symbolic", "574", difficulty=1.0),
]
COLUMNS = set().union(*ROWS)


def named(function, weight=1.0):
    """Return a reward of a function in this file."""
    return Reward({"fn": "it", "weight": weight}, COLUMNS, builtins={"it": function})


@pytest.mark.parametrize("preset", ["r1-cold-start", "think"])
def test_the_default_rewards_pass(preset):
    report = audit(load_rewards(RewardArgs(transcript=preset), COLUMNS), ROWS, preset)
    assert report.failures == []
    assert report.passed
    assert report.rows == report.scored == len(ROWS)
    assert set(report.means) == set(KINDS) - {"injecting"}
    assert report.means["gold"] == pytest.approx(1.2)
    assert max(mean for kind, mean in report.means.items() if kind != "gold") < 0.5


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        (lambda completion: 1.0, {"wrong", "empty", "stuffed", "tags", "misplaced", "hostile"}),
        (lambda text, answer: not text or answer in text, {"empty", "stuffed", "misplaced"}),
        (lambda completion: len(completion) / 1e6, {"hostile", "stuffed"}),
    ],
)
def test_a_broken_reward_fails_with_what_fooled_it(function, kinds):
    report = audit([named(function)], ROWS)
    assert not report.passed
    assert kinds <= {attempt.kind for attempt in report.failures}
    assert all(attempt.total >= attempt.gold for attempt in report.failures)


LETTERS = [row(chr(ord("A") + n), "choice", number=n) for n in range(20)]
SUMS = [row(f"{n * n + 7}", "math", number=n) for n in range(20)]


def said(completion):
    return completion.rpartition("<summary>")[2].removesuffix("</summary>")


GOLDS = {row["answer"] for row in SUMS}


@pytest.mark.parametrize(
    ("function", "rows", "answers"),
    [
        (lambda text, answer: said(text) in ("0", answer), SUMS, {"0"}),
        (lambda text: said(text) in GOLDS, SUMS, {"7", "8", "11", "16", "23", "32"}),
        (lambda text, answer: said(text) in ("C", answer), LETTERS, {"C"}),
        (lambda text, answer: (said(text) == answer) + 0.9 * (said(text) == "1"), SUMS, set()),
        (accuracy_reward, SUMS, set()),
        (accuracy_reward, LETTERS, set()),
        (accuracy_reward, [row(f"{n % 2}", "math", number=n) for n in range(9)], set()),
        (accuracy_reward, [row(text, "math") for text in ("1/2", "0.5", r"\frac12", "3")], set()),
    ],
)
def test_an_answer_that_is_paid_on_many_rows_is_found(function, rows, answers):
    reward = Reward({"fn": "it"}, {*COLUMNS, "number"}, builtins={"it": function})
    report = audit([reward], rows[:2], many=rows)
    assert {constant.answer for constant in report.constants} == answers
    assert report.passed == (function is accuracy_reward)


def test_a_reward_that_fails_fails_the_audit():
    def fragile(completion, answer):
        return float(f"<summary>{answer}<" in completion) if "<summary>" in completion else [answer]

    for function in (fragile, lambda completion: float("nan")):
        report = audit([named(function)], ROWS)
        assert not report.passed
        assert "failed on" in report.errors[0]


def test_rows_without_a_gold_answer_are_skipped_and_none_is_no_pass():
    rewards = load_rewards(RewardArgs(), COLUMNS)
    report = audit(rewards, [row("", "math"), row("4", "math")])
    assert (report.rows, report.scored, report.passed) == (2, 1, True)
    assert not audit(rewards, [row("", "math")]).passed
    with pytest.raises(InputError, match="no rows"):
        audit(rewards, [])
    with_ids = [{"fn": "accuracy_reward"}, {"fn": "repetition_penalty", "weight": 0.1}]
    assert audit(load_rewards(RewardArgs(with_ids), COLUMNS), ROWS[:2]).passed
