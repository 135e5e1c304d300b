"""Judge saved completions by several verifiers, and list where they do not agree.

What two verifiers judge differently is where one of them is wrong: an answer that was right and
earned nothing, or one that was paid and should not have been.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.records import Row
from chainforge.core.transcript import lenient_answer, read
from chainforge.rewards.scoring import RewardArgs, load_rewards, score
from chainforge.rewards.verifier import VERIFIERS

SAVED = "saved"
"""The verdict that stands in the rows: `correct`, from when they were judged."""
# `choice` reads letters; beside the others it would disagree on every other answer.
_USUAL = ("math", "arithmetic", "numeric", "exact")


@dataclass
class Verdicts:
    """What one judge said: right (1.0), wrong (0.0), or None where it cannot judge."""

    judge: str
    values: list[float | None]
    seconds: float

    @property
    def judged(self) -> int:
        """How many it could judge."""
        return sum(value is not None for value in self.values)

    @property
    def mean(self) -> float | None:
        """The mean of those."""
        given = [value for value in self.values if value is not None]
        return sum(given) / len(given) if given else None

    def differs(self, other: Verdicts) -> int:
        """Count where both could judge and did not agree."""
        pairs = zip(self.values, other.values, strict=True)
        return sum(a is not None and b is not None and a != b for a, b in pairs)


@dataclass
class Case:
    """An answer that the judges do not agree on, and how many completions gave it."""

    gold: str
    answer: str
    verdicts: dict[str, float | None]
    ids: list[str] = field(default_factory=list)


def judge_by(
    judge: str, rows: Sequence[Row], transcript: str, params: dict[str, Any] | None = None
) -> Verdicts:
    """Judge Samples by a verifier, a reward function, or as they were (`saved`)."""
    if judge == SAVED:
        saved = [row.get("correct") for row in rows]
        return Verdicts(judge, [None if c is None else float(c) for c in saved], 0.0)
    verifier = judge in VERIFIERS
    spec = {"fn": "accuracy_reward" if verifier else judge, "params": params or {}}
    able = [place for place, row in enumerate(rows) if judge != "reasoning_gym" or row.get("entry")]
    asked = [rows[place] | ({"verifier": judge} if verifier else {}) for place in able]
    rewards = load_rewards(RewardArgs([spec], transcript), set().union(*rows))
    values: list[float | None] = [None] * len(rows)
    started = time.perf_counter()
    scores = score(rewards, asked, [row["completion"] for row in asked])
    for place, one in zip(able, scores, strict=True):
        values[place] = one.total
    return Verdicts(judge, values, time.perf_counter() - started)


def usual_judges(first: str, rows: Sequence[Row]) -> list[str]:
    """Return whom to compare a judge with: what the rows say, and the verifiers that can read them.

    Those with an `entry` have their data set's own scorer too.
    """
    saved = [SAVED] if any(row.get("correct") is not None for row in rows) else []
    scorer = ["reasoning_gym"] if any(row.get("entry") for row in rows) else []
    return [judge for judge in (*saved, *_USUAL, *scorer) if judge != first]


def judge_all(
    judges: Sequence[str], rows: Sequence[Row], transcript: str, params: dict[str, Any]
) -> list[Verdicts]:
    """Judge Samples by each; `params` are the first judge's. Raises `InputError` for none."""
    if not rows:
        raise InputError("no completion to judge")
    if len(set(judges)) < len(judges):
        raise InputError(f"a judge is named twice: {', '.join(judges)}")
    return [
        judge_by(judge, rows, transcript, {} if number else params)
        for number, judge in enumerate(judges)
    ]


def cases(verdicts: Sequence[Verdicts], rows: Sequence[Row], transcript: str) -> list[Case]:
    """Return the answers on which two judges differ, the most frequent first."""
    found: dict[tuple[Any, ...], Case] = {}
    for place, row in enumerate(rows):
        values = {one.judge: one.values[place] for one in verdicts}
        if len({value for value in values.values() if value is not None}) < 2:
            continue
        parts = read(row["completion"], transcript)
        answer = parts.answer if parts else lenient_answer(row["completion"], transcript) or ""
        key = (str(row.get("answer")), answer, *values.values())
        case = found.setdefault(key, Case(str(row.get("answer")), answer, values))
        case.ids.append(str(row.get("id", place)))
    return sorted(found.values(), key=lambda case: -len(case.ids))
