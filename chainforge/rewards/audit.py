"""Try to fool the rewards: the gold answer must beat every answer that is none.

For each row the gold answer is written as a transcript, and beside it what models are known to find
when a reward pays for less than the truth. Run it before a model does.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, question
from chainforge.core.transcript import DEFAULT
from chainforge.rewards.attacks import (
    attacks,
    completion_of,
    constants,
    gold_answer,
    same,
    wrong_answer,
)
from chainforge.rewards.reward import Reward, RewardFailed, score
from chainforge.rewards.verify import clear_cache

# A constant is paid often if it earns as much as the gold answer on this share of the rows whose
# answer is another, and on two rows at least: one may be a spelling of the same answer.
OFTEN, LEAST = 0.1, 2
KINDS = ("gold", "wrong", "empty", "stuffed", "tags", "misplaced", "hostile")


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

    @property
    def unrewarded(self) -> bool:
        """Whether the gold answer earned no more than an empty one: then it is not being read."""
        nothing = [a.total for a in self.failures if a.kind == "empty" and a.total is not None]
        return any(total == self.gold for total in nothing)


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
class Speed:
    """How many completions of a kind were scored, and how long that took."""

    completions: int
    seconds: float

    @property
    def milliseconds(self) -> float:
        """The mean time of one."""
        return 1000 * self.seconds / self.completions


@dataclass(frozen=True)
class Audit:
    """The audit of some rewards over some rows.

    `speed` is by kind; `changed` are the attempts that got another reward when they were scored
    once more, in another order, each with its row's id and the second reward. `constants` are the
    answers that are paid on many rows, whatever was asked.
    """

    rows: list[AuditRow] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    speed: dict[str, Speed] = field(default_factory=dict)
    changed: list[tuple[str, Attempt, float | None]] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)

    def __iter__(self) -> Iterator[AuditRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def passed(self) -> bool:
        """Whether at least one row was judged, gold won in each, and all went as it should."""
        judged = [row for row in self.rows if not row.skipped]
        sound = not self.errors and not self.changed and not self.constants
        return bool(judged) and all(row.passed for row in judged) and sound

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
    written = [
        [
            ("gold", completion_of(gold_answer(row), transcript)),
            *attacks(row, wrong_answer(row, rows), transcript),
        ]
        for row in rows
    ]
    vocabulary: dict[str, int] = {}
    trials = [
        _Trial(row, kind, text, [vocabulary.setdefault(w, len(vocabulary)) for w in text.split()])
        for row, tries in zip(rows, written, strict=True)
        for kind, text in tries
    ]
    try:
        totals = _score(rewards, trials)
    except RewardFailed as error:
        return Audit(errors=[str(error)])
    report = Audit()
    scored = iter(totals)
    for row, tries in zip(rows, written, strict=True):
        attempts = [Attempt(kind, text, next(scored)) for kind, text in tries]
        name = str(row.get("id", len(report.rows)))
        gold = attempts[0].total if gold_answer(row).strip() else None
        asked = question(row) if row.get("prompt") else ""
        report.rows.append(AuditRow(name, asked, gold_answer(row), gold, tuple(attempts[1:])))
    report.errors.extend(
        f"reward {r.__name__} failed on {r.failed} of {r.seen} completions"
        for r in rewards
        if r.failed
    )
    if not report.errors:
        _score_again(report, rewards, trials, totals)
    if not report.errors:
        _try_constants(report, rewards, many or rows, transcript)
    return report


@dataclass(frozen=True)
class _Trial:
    """One completion to score, with its row and a number for each of its words."""

    row: Row
    kind: str
    completion: str
    ids: list[int]


def _score(rewards: Sequence[Reward], trials: Sequence[_Trial]) -> list[float | None]:
    rows, completions = [t.row for t in trials], [t.completion for t in trials]
    return [one.total for one in score(rewards, rows, completions, [t.ids for t in trials])]


def _score_again(
    report: Audit,
    rewards: Sequence[Reward],
    trials: Sequence[_Trial],
    totals: Sequence[float | None],
) -> None:
    """Score kind by kind and backwards, with the clock; note what got another reward."""
    clear_cache()
    for kind in KINDS:
        places = [place for place, one in enumerate(trials) if one.kind == kind][::-1]
        started = time.perf_counter()
        try:
            again = _score(rewards, [trials[place] for place in places])
        except RewardFailed as error:
            report.errors.append(str(error))
            return
        report.speed[kind] = Speed(len(places), time.perf_counter() - started)
        for place, second in zip(places, again, strict=True):
            if second != totals[place]:
                trial = trials[place]
                attempt = Attempt(kind, trial.completion, totals[place])
                report.changed.append((str(trial.row.get("id", "")), attempt, second))


def _try_constants(
    report: Audit, rewards: Sequence[Reward], rows: Sequence[Row], transcript: str
) -> None:
    """Note the answers that are paid on many rows of a task whose gold answer is another."""
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        if gold_answer(row).strip():
            tasks.setdefault(str(row.get("task", "")), []).append(row)
    for task, members in tasks.items():
        tries = [
            (answer, row)
            for answer in constants(members)
            for row in members
            if same(answer) != same(gold_answer(row))
        ]
        asked = [(gold_answer(row), row) for row in members] + tries
        texts = [completion_of(answer, transcript) for answer, _ in asked]
        words: dict[str, int] = {}
        trials = [
            _Trial(row, "constant", text, [words.setdefault(w, len(words)) for w in text.split()])
            for (_, row), text in zip(asked, texts, strict=True)
        ]
        try:
            totals = _score(rewards, trials)
        except RewardFailed as error:
            report.errors.append(str(error))
            return
        golds = {id(row): total for row, total in zip(members, totals, strict=False)}
        tried, paid = Counter[str](), Counter[str]()
        for (answer, row), total in zip(tries, totals[len(members) :], strict=True):
            gold = golds[id(row)]
            if gold is not None and total is not None:
                tried[answer] += 1
                paid[answer] += total >= gold
        report.constants.extend(
            Constant(task, answer, tried[answer], count)
            for answer, count in paid.most_common()
            if count >= max(LEAST, OFTEN * tried[answer])
        )
