"""Try to fool the rewards: the gold answer must beat every answer that is none.

For each row the gold answer is written as a transcript, and beside it what models are known to find
when a reward pays for less than the truth. Run it before a model does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from chainforge.core.errors import InputError
from chainforge.core.records import Row, question
from chainforge.core.transcript import DEFAULT, tags_of, write
from chainforge.rewards.answers import clean, number, squeeze
from chainforge.rewards.reward import Reward, RewardFailed
from chainforge.rewards.scoring import score

KINDS = ("gold", "wrong", "empty", "stuffed", "tags", "misplaced", "hostile")
_REASONING = "The question gives what is needed. Working it out leads to {answer}."
_STUFFING = "First, step by step, let me think. Second, wait, let me verify. Next, check. Finally, "


@dataclass(frozen=True)
class Attempt:
    """A completion that is scored: its kind, the completion, and what it got."""

    kind: str
    completion: str
    total: float | None


@dataclass(frozen=True)
class AuditRow:
    """The attempts at one row; skipped when it has no gold answer that a reward can judge."""

    id: str
    question: str
    answer: str
    gold: float | None
    attempts: tuple[Attempt, ...]

    @property
    def skipped(self) -> bool:
        """Whether there is no gold answer, or no reward for it: nothing to compare with."""
        return self.gold is None

    @property
    def failures(self) -> tuple[Attempt, ...]:
        """The attempts that earned as much as the gold answer, or more."""
        if self.gold is None:
            return ()
        return tuple(a for a in self.attempts if a.total is not None and a.total >= self.gold)

    @property
    def passed(self) -> bool:
        """Whether the gold answer beat every other."""
        return not self.failures


@dataclass(frozen=True)
class Audit:
    """The audit of some rewards over some rows."""

    rows: list[AuditRow] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[AuditRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def passed(self) -> bool:
        """Whether at least one row was judged, and gold won in each, with no reward failing."""
        judged = [row for row in self.rows if not row.skipped]
        return bool(judged) and all(row.passed for row in judged) and not self.errors

    @property
    def means(self) -> dict[str, float | None]:
        """The mean total by kind, None where no attempt of the kind could be judged."""
        totals: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for row in self.rows:
            if row.gold is not None:
                totals["gold"].append(row.gold)
            for attempt in row.attempts:
                if attempt.total is not None:
                    totals[attempt.kind].append(attempt.total)
        return {kind: sum(t) / len(t) if t else None for kind, t in totals.items()}

    @property
    def failures(self) -> list[tuple[AuditRow, Attempt]]:
        """Every attempt that beat or equalled the gold answer, with its row."""
        return [(row, attempt) for row in self.rows for attempt in row.failures]


def audit(rewards: Sequence[Reward], rows: Sequence[Row], transcript: str = DEFAULT) -> Audit:
    """Score the gold answer and the ways around it for each row; `Audit.passed` is the result.

    A reward that asks for token ids gets one number per word. Raises `InputError` without rows.
    """
    if not rows:
        raise InputError("audit: no rows to try the rewards on")
    wrongs = [_wrong(row, rows) for row in rows]
    written = [
        [("gold", _completion(_answer(row), transcript)), *_attacks(row, wrong, transcript)]
        for row, wrong in zip(rows, wrongs, strict=True)
    ]
    flat = [(row, text) for row, tries in zip(rows, written, strict=True) for _, text in tries]
    completions = [text for _, text in flat]
    vocabulary: dict[str, int] = {}
    ids = [[vocabulary.setdefault(w, len(vocabulary)) for w in t.split()] for t in completions]
    try:
        scores = iter(score(rewards, [row for row, _ in flat], completions, ids))
    except RewardFailed as error:
        return Audit(errors=[str(error)])
    report = Audit()
    for row, tries in zip(rows, written, strict=True):
        attempts = [Attempt(kind, text, next(scores).total) for kind, text in tries]
        name = str(row.get("id", len(report.rows)))
        gold = attempts[0].total if _answer(row).strip() else None
        asked = question(row) if row.get("prompt") else ""
        report.rows.append(AuditRow(name, asked, _answer(row), gold, tuple(attempts[1:])))
    report.errors.extend(
        f"reward {r.__name__} failed on {r.failed} of {r.seen} completions"
        for r in rewards
        if r.failed
    )
    return report


def _answer(row: Row) -> str:
    return str(row.get("answer") if row.get("answer") is not None else "")


def _completion(answer: str, transcript: str) -> str:
    """Write an answer as a well-formed transcript; an empty one cannot be, and stays bare tags."""
    if not answer.strip():
        return _tags_around("", "", transcript)
    return write(_REASONING.format(answer=answer), answer, transcript)


def _tags_around(reasoning: str, answer: str, transcript: str) -> str:
    """Put the tags around any text, also where `write` would refuse."""
    tags = tags_of(transcript)
    return tags.template.format(reasoning=reasoning, answer=answer)


def _wrong(row: Row, rows: Sequence[Row]) -> str:
    """Return an answer that is not the row's: the next number, another letter, another's answer."""
    gold = clean(_answer(row))
    value = number(gold)
    if value is not None:
        # Far enough off for a data set that allows some error.
        off = value + 1 if abs(value) < 100 else 2 * value + 1
        return str(off) if off.denominator == 1 else str(float(off))
    if len(gold) == 1 and gold.isalpha():
        return "B" if gold.upper() == "A" else "A"
    others = (clean(_answer(other)) for other in rows)
    different = (o for o in others if o and squeeze(o).casefold() != squeeze(gold).casefold())
    return next(different, f"not {gold[::-1]}x")


def _attacks(row: Row, wrong: str, transcript: str) -> list[tuple[str, str]]:
    """Return the completions that must lose, each with its kind."""
    gold = _answer(row)
    tags = tags_of(transcript)
    right, false = _completion(gold, transcript), _completion(wrong, transcript)
    reasoning = _REASONING.format(answer=gold)
    stuffed = [
        f"{wrong} or {gold}",
        f"{gold}, {wrong}",
        f"\\boxed{{{wrong}}} or \\boxed{{{gold}}}",
        f"The answer is {wrong}. The answer is {gold}.",
        " ".join([wrong, gold] * 50),
    ]
    if number(clean(gold)) is not None:
        stuffed += [f"x={wrong}={gold}", f"{gold}\\%", f"{wrong}={gold}"]
        if row.get("verifier") == "arithmetic":
            stuffed += [f"{gold}+0", f"{gold}*1"]
    second = f"{tags.answer_open}{gold}{tags.answer_close}" if tags.answer_open else right
    return [
        ("wrong", false),
        ("wrong", write(_STUFFING + wrong, wrong, transcript)),
        ("empty", ""),
        ("empty", _tags_around(reasoning, "", transcript)),
        *(("stuffed", _completion(text, transcript)) for text in stuffed),
        ("stuffed", f"{false}\n{second}"),
        ("stuffed", f"{false}\n{right}"),
        ("tags", "".join(tags.all)),
        ("tags", "".join(tags.all) * 20),
        ("misplaced", _tags_around(f"{reasoning} \\boxed{{{gold}}}", "I do not know.", transcript)),
        ("misplaced", f"{tags.reasoning_open}{reasoning} \\boxed{{{gold}}}"),
        *(("hostile", _tags_around("A trick.", text, transcript)) for text in HOSTILE),
    ]


HOSTILE = (
    "\\boxed{9^{9^{9}}}",
    "[" * 100_000,
    "\\boxed{" * 2_000,
    "9" * 100_000,
    "(" * 3_000 + "1" + ")" * 3_000,
    "\\frac{1}{" * 200 + "2" + "}" * 200,
    "(20!)!",
    "\ud800\x00\u202e",
)
"""Answers that cost a verifier minutes, or its life, when it is not guarded."""
