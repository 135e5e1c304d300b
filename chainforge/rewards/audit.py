"""Try to fool the rewards: the gold answer must beat every other answer.

For each row the gold answer is written as a transcript, and beside it what models are known to find
when a reward pays for less than the truth. Run it before a model does.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, question
from chainforge.core.transcript import DEFAULT, is_blank, tags_of, write
from chainforge.rewards.answers import clean
from chainforge.rewards.reward import Reward, RewardFailed, score
from chainforge.rewards.values import number, squeeze
from chainforge.rewards.verify import clear_cache

KINDS = ("gold", "wrong", "empty", "stuffed", "tags", "misplaced", "hostile")
# A constant is paid often if it earns as much as the gold answer on this share of the rows whose
# answer is another, and on two rows at least: one may be a spelling of the same answer.
OFTEN, LEAST = 0.1, 2
CONSTANTS = ("0", "1", "nan", "inf", "True", "None", "A", "[]", "I do not know.")
COPIED = 6  # gold answers of other rows that are tried as a constant
# Answers that cost a verifier minutes, or its life, when it is not guarded.
HOSTILE = ("\\boxed{9^{9^{9}}}", "[" * 100_000, "\\boxed{" * 2_000, "9" * 100_000,
           "(" * 3_000 + "1" + ")" * 3_000, "\\frac{1}{" * 200 + "2" + "}" * 200, "(20!)!",
           "x\ud800\x00\u202e")  # fmt: skip
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
    """The attempts at one row; `gold` is what its gold answer got, None where it has none."""

    id: str
    question: str
    answer: str
    gold: float | None
    attempts: tuple[Attempt, ...]

    @property
    def skipped(self) -> bool:
        """Return whether there is no gold answer, or no reward for it: nothing to compare with."""
        return self.gold is None

    @property
    def failures(self) -> list[Attempt]:
        """Return the attempts that earned as much as the gold answer, or more."""
        return [] if self.gold is None else [
            a for a in self.attempts if a.total is not None and a.total >= self.gold
        ]  # fmt: skip

    @property
    def unrewarded(self) -> bool:
        """Return whether the gold answer earned no more than an empty one, so it is not read."""
        return any(a.kind == "empty" and a.total == self.gold for a in self.failures)


@dataclass(frozen=True)
class Constant:
    """An answer that was tried on `tried` rows of a task whose gold answer is another."""

    task: str
    answer: str
    tried: int
    paid: int

    def __str__(self) -> str:
        return (
            f"the answer {self.answer!r:.60} earns as much as the gold answer on {self.paid} of "
            f"{self.tried} rows of {self.task} whose answer is another"
        )


@dataclass(frozen=True)
class Audit:
    """The audit of some rewards over some rows.

    `milliseconds` is the mean time of a completion by kind; `changed` are the attempts that got
    another reward when they were scored once more, in another order, each with its row's id and the
    second reward; `constants` are the answers that are paid on many rows, whatever was asked.
    """

    rows: list[AuditRow] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    milliseconds: dict[str, float] = field(default_factory=dict)
    changed: list[tuple[str, Attempt, float | None]] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)

    def __iter__(self) -> Iterator[AuditRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def passed(self) -> bool:
        """Return whether at least one row was scored, gold won in each, and nothing went wrong."""
        scored = any(not row.skipped for row in self.rows)
        return scored and not (self.failures or self.errors or self.changed or self.constants)

    @property
    def means(self) -> dict[str, float | None]:
        """Return the mean total by kind, None where no attempt of the kind could be scored."""
        totals: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for row in self.rows:
            for attempt in (Attempt("gold", "", row.gold), *row.attempts):
                if attempt.total is not None:
                    totals[attempt.kind].append(attempt.total)
        return {kind: sum(t) / len(t) if t else None for kind, t in totals.items()}

    @property
    def failures(self) -> list[tuple[AuditRow, Attempt]]:
        """Return every attempt that beat or equalled the gold answer, with its row."""
        return [(row, attempt) for row in self.rows for attempt in row.failures]


Trial = tuple[Row, str, str]
"""A row, the kind of a completion to try on it, and the completion."""


def audit(
    rewards: Sequence[Reward],
    rows: Sequence[Row],
    transcript: str = DEFAULT,
    many: Sequence[Row] = (),
) -> Audit:
    """Score the gold answer and the ways around it for each row; `Audit.passed` is the result.

    All is scored twice: the second time kind by kind and backwards, for the clock and to see
    whether a reward depends on anything but its completion and row. Constant answers and copied
    gold answers are tried on `many` rows (those of `rows` when left out). A reward that asks for
    token ids gets one number per word. Raises `InputError` without rows.
    """
    if not rows:
        raise InputError("audit: no rows to try the rewards on")
    trials: list[Trial] = [
        (row, kind, text)
        for row in rows
        for kind, text in attempts(row, wrong_answer(row, rows), transcript)
    ]
    report = Audit()
    try:
        totals = _totals(rewards, trials)
        for row in rows:
            gold, *others = [
                Attempt(kind, text, total)
                for (tried, kind, text), total in zip(trials, totals, strict=True)
                if tried is row
            ]
            asked, answer = question(row) if row.get("prompt") else "", gold_answer(row)
            name = str(row.get("id", len(report)))
            earned = gold.total if answer else None
            report.rows.append(AuditRow(name, asked, answer, earned, tuple(others)))
        for reward in rewards:
            if reward.failed:
                failed = f"{reward.failed} of {reward.seen} completions"
                report.errors.append(f"reward {reward.__name__} failed on {failed}")
        if not report.errors:
            _score_again(report, rewards, trials, totals)
            _try_constants(report, rewards, many or rows, transcript)
    except RewardFailed as error:
        report.errors.append(str(error))
    return report


def _totals(rewards: Sequence[Reward], trials: Sequence[Trial]) -> list[float | None]:
    texts = [text for _, _, text in trials]
    ids = [[zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in text.split()]
           for text in texts]  # fmt: skip
    return [one.total for one in score(rewards, [row for row, _, _ in trials], texts, ids)]


def _score_again(
    report: Audit,
    rewards: Sequence[Reward],
    trials: Sequence[Trial],
    totals: Sequence[float | None],
) -> None:
    """Score kind by kind and backwards, with the clock; note what got another reward."""
    clear_cache()
    for kind in KINDS:
        places = [place for place, trial in enumerate(trials) if trial[1] == kind][::-1]
        started = time.perf_counter()
        again = _totals(rewards, [trials[place] for place in places])
        report.milliseconds[kind] = 1000 * (time.perf_counter() - started) / len(places)
        for place, second in zip(places, again, strict=True):
            if second != totals[place]:
                row, _, text = trials[place]
                attempt = Attempt(kind, text, totals[place])
                report.changed.append((str(row.get("id", "")), attempt, second))


def _try_constants(
    report: Audit, rewards: Sequence[Reward], rows: Sequence[Row], transcript: str
) -> None:
    """Note the answers that are paid on many rows of a task whose gold answer is another."""
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        if gold_answer(row):
            tasks.setdefault(str(row.get("task", "")), []).append(row)
    for task, members in tasks.items():
        answers = {same(gold_answer(row)): gold_answer(row) for row in members}
        tried: dict[str, list[bool]] = {}
        golds = _said(rewards, [(row, gold_answer(row)) for row in members], transcript)
        for answer in (*CONSTANTS, *list(answers.values())[:COPIED]):
            pairs = [(row, gold) for row, gold in zip(members, golds, strict=True)
                     if gold is not None and same(answer) != same(gold_answer(row))]  # fmt: skip
            totals = _said(rewards, [(row, answer) for row, _ in pairs], transcript)
            tried[answer] = [total is not None and total >= gold
                             for (_, gold), total in zip(pairs, totals, strict=True)]  # fmt: skip
        report.constants.extend(
            Constant(task, answer, len(paid), sum(paid))
            for answer, paid in sorted(tried.items(), key=lambda item: -sum(item[1]))
            if sum(paid) >= max(LEAST, OFTEN * len(paid))
        )


def _said(
    rewards: Sequence[Reward], asked: Sequence[tuple[Row, str]], transcript: str
) -> list[float | None]:
    return _totals(rewards, [(r, "constant", completion_of(a, transcript)) for r, a in asked])


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
    return tags_of(transcript).template.format(reasoning=reasoning, answer=answer)


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
    return next((o for o in others if o and same(o) != same(gold)), f"not {gold[::-1]}x")


def same(answer: str) -> Any:
    """Return what spellings of one answer share: its number, or its characters."""
    text = clean(answer)
    value = number(text)
    return squeeze(text).casefold() if value is None else value


def attempts(row: Row, wrong: str, transcript: str) -> list[tuple[str, str]]:
    """Return the gold answer's completion, and those that must lose, each with its kind."""
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
        ("gold", right),
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
