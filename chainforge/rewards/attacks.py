"""Write for a row the gold answer as a completion, and the completions that must lose to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chainforge.core.jsonl import Row
from chainforge.core.transcript import is_blank, tags_of, write
from chainforge.rewards.answers import clean
from chainforge.rewards.quantities import number, squeeze

_REASONING = "The question gives what is needed. Working it out leads to {answer}."
_STUFFING = "First, step by step, let me think. Second, wait, let me verify. Next, check. Finally, "


def gold_answer(row: Row) -> str:
    """Return a row's gold answer, empty where it has none."""
    gold = str(row.get("answer") if row.get("answer") is not None else "")
    return "" if is_blank(gold) else gold


def completion_of(answer: str, transcript: str) -> str:
    """Write an answer as a well-formed transcript; an empty one cannot be, and stays bare tags."""
    if not answer.strip():
        return _tags_around("", "", transcript)
    return write(_REASONING.format(answer=answer), answer, transcript)


def _tags_around(reasoning: str, answer: str, transcript: str) -> str:
    """Put the tags around any text, also where `write` would refuse."""
    tags = tags_of(transcript)
    return tags.template.format(reasoning=reasoning, answer=answer)


def wrong_answer(row: Row, rows: Sequence[Row]) -> str:
    """Return an answer that is not the row's: the next number, another letter, another's answer."""
    gold = clean(gold_answer(row))
    value = number(gold)
    if value is not None:
        # Far enough off for a data set that allows some error.
        off = value + 1 if abs(value) < 100 else 2 * value + 1
        return str(off) if off.denominator == 1 else str(float(off))
    if len(gold) == 1 and gold.isalpha():
        return "B" if gold.upper() == "A" else "A"
    others = (clean(gold_answer(other)) for other in rows)
    different = (o for o in others if o and squeeze(o).casefold() != squeeze(gold).casefold())
    return next(different, f"not {gold[::-1]}x")


def constants(rows: Sequence[Row]) -> list[str]:
    """Return answers that must not be paid on many rows: usual constants, and rows' own golds."""
    golds = {same(gold): gold for row in rows[::-1] if (gold := gold_answer(row)).strip()}
    return [*CONSTANTS, *[golds[key] for key in reversed(golds)][:COPIED]]


def same(answer: str) -> Any:
    """Return what spellings of one answer share: its number, or its characters."""
    text = clean(answer)
    value = number(text)
    return squeeze(text).casefold() if value is None else value


def attacks(row: Row, wrong: str, transcript: str) -> list[tuple[str, str]]:
    """Return the completions that must lose, each with its kind."""
    gold = gold_answer(row)
    tags = tags_of(transcript)
    right, false = completion_of(gold, transcript), completion_of(wrong, transcript)
    reasoning = _REASONING.format(answer=gold)
    stuffed = [
        f"{wrong} or {gold}",
        f"{gold}, {wrong}",
        f"\\boxed{{{wrong}}} or \\boxed{{{gold}}}",
        f"The answer is {wrong}. The answer is {gold}.",
        " ".join([wrong, gold] * 50),
    ]
    if number(clean(gold)) is not None:
        stuffed += [f"x={wrong}={gold}", f"{gold}\\%", f"{wrong}={gold}", f"{wrong} or x = {gold}"]
        if row.get("verifier") == "arithmetic":
            stuffed += [f"{gold}+0", f"{gold}*1"]
    second = f"{tags.answer_open}{gold}{tags.answer_close}" if tags.answer_open else right
    return [
        ("wrong", false),
        ("wrong", write(_STUFFING + wrong, wrong, transcript)),
        ("empty", ""),
        ("empty", _tags_around(reasoning, "", transcript)),
        *(("stuffed", completion_of(text, transcript)) for text in stuffed),
        ("stuffed", f"{false}\n{second}"),
        ("stuffed", f"{false}\n{right}"),
        ("tags", "".join(tags.all)),
        ("tags", "".join(tags.all) * 20),
        ("misplaced", _tags_around(f"{reasoning} \\boxed{{{gold}}}", "I do not know.", transcript)),
        ("misplaced", f"{tags.reasoning_open}{reasoning} \\boxed{{{gold}}}"),
        *(("hostile", _tags_around("A trick.", text, transcript)) for text in HOSTILE),
    ]


CONSTANTS = ("0", "1", "nan", "inf", "True", "None", "A", "[]", "I do not know.")
COPIED = 6  # gold answers of other rows that are tried as a constant
HOSTILE = (
    "\\boxed{9^{9^{9}}}",
    "[" * 100_000,
    "\\boxed{" * 2_000,
    "9" * 100_000,
    "(" * 3_000 + "1" + ")" * 3_000,
    "\\frac{1}{" * 200 + "2" + "}" * 200,
    "(20!)!",
    "x\ud800\x00\u202e",
)
"""Answers that cost a verifier minutes, or its life, when it is not guarded."""
