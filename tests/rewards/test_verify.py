"""What each verifier takes for the gold answer, and what it does not."""

import json
from pathlib import Path

import pytest

from chainforge.core.errors import InputError
from chainforge.rewards.verify import Claim, verify, verify_all

UNREADABLE = ["", "  ", "{", "}{", r"\frac{1}{", None]


@pytest.mark.parametrize(
    ("verifier", "text", "gold", "verdict"),
    [
        *(("math", text, gold, None) for gold in UNREADABLE for text in ("4", "", "{")),
        ("math", " 42.\n", "42", True),
        ("math", "", "4", False),
        ("exact", "", "Paris", False),
        ("arithmetic", "x", "x", None),
        ("numeric", "5", "five", None),
        ("choice", "B", "", None),
    ],
)
def test_blank_answers_and_golds_that_a_verifier_cannot_read(verifier, text, gold, verdict):
    assert verify(verifier, text, gold) is verdict


def test_numeric_takes_a_tolerance():
    assert verify("numeric", "3.2", "3.14", tolerance=0.1) is True
    assert verify("numeric", "9", "3.14", tolerance=0.1) is False


HIDDEN = {"⏎": "\n", "<zwsp>": "\u200b", "<bom>": "\ufeff", "<nnbsp>": "\u202f", "<zwj>": "\u200d"}


def groups():
    """Read `answers.txt`: a verifier and its gold answer, then right (+) and wrong (-) answers."""
    found = []
    for line in (Path(__file__).parent / "answers.txt").read_text(encoding="utf-8").split("\n"):
        mark, _, rest = line.partition(" ")
        for written, hidden in HIDDEN.items():
            rest = rest.replace(written, hidden)
        if mark in ("+", "-"):
            found[-1][2].extend((answer, mark == "+") for answer in rest.split(" ¦ "))
        elif mark:
            found.append((mark, rest, []))
    return found


@pytest.mark.parametrize(("verifier", "gold", "answers"), groups())
def test_right_answers_are_taken_and_wrong_ones_are_not(verifier, gold, answers):
    said = verify_all([Claim(verifier, answer, gold) for answer, _ in answers])
    assert [pair for pair, one in zip(answers, said, strict=True) if pair[1] is not one] == []


def entry(dataset="chain_sum", answer="4", **metadata):
    metadata = {"source_dataset": dataset, "source_index": 0, **metadata}
    return json.dumps({"question": "?", "answer": answer, "metadata": metadata})


COUNTDOWN = entry("countdown", "8 * 3", numbers=[3, 8], target=24)


def test_reasoning_gym_uses_the_data_sets_own_scorer():
    answers = ["8 * 3", "3*8", r"\boxed{3 * 8}", "3 + 8", "24", "nonsense", ""]
    claims = [Claim("reasoning_gym", answer, "8 * 3", COUNTDOWN) for answer in answers]
    assert verify_all(claims) == [True] * 3 + [False] * 4
    assert verify("reasoning_gym", "3 * 8", None, COUNTDOWN) is True


@pytest.mark.parametrize("answer", ["4, 5", "4%", "5 or 4", "The answer is 4 and 5", "44", "4 5"])
def test_reasoning_gym_refuses_an_answer_stuffed_into_a_generous_scorer(answer):
    assert verify("reasoning_gym", answer, "4", entry("gsm_symbolic", difficulty=1.0)) is False


@pytest.mark.parametrize("broken", [None, "", "{", "[]", "{}", '{"answer": "4"}', 3, "[" * 100_000])
def test_reasoning_gym_says_what_an_entry_must_hold(broken):
    with pytest.raises(InputError, match="source_dataset"):
        verify("reasoning_gym", "4", "4", broken)


def test_a_batch_keeps_its_order():
    claims = [Claim(verifier, answers[0][0], gold) for verifier, gold, answers in groups()]
    expected = [answers[0][1] for _, _, answers in groups()]
    assert verify_all(claims[::-1]) == expected[::-1]
    assert verify_all([]) == []
