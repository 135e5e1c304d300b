"""Try to fool the rewards: the gold answer must beat every other answer.

Each row is scored with its gold answer, and with the tricks that models are known to find when a
reward can be earned without the right answer. Run it before training.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.core.transcript import DEFAULT, is_blank, tags_of, write
from chainforge.rewards.answers import clean
from chainforge.rewards.reward import Reward, RewardFailed, score
from chainforge.rewards.values import number, squeeze

logger = logging.getLogger(__name__)

KINDS = ("gold", "wrong", "empty", "stuffed", "tags", "misplaced", "hostile", "injecting")
# A constant is paid often if it earns as much as the gold answer on this share of the rows whose
# answer is another, and on two rows at least: one may be a spelling of the same answer.
OFTEN, LEAST = 0.1, 2
CONSTANTS = ("0", "1", "nan", "inf", "True", "None", "A", "[]", "I do not know.")
COPIED = 6  # gold answers of other rows that are tried as a constant
# Answers that cost a verifier minutes, or its life, when it is not guarded.
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
_REASONING = "The question gives what is needed. Working it out leads to {answer}."
_STUFFING = "First, step by step, let me think. Second, wait, let me verify. Next, check. Finally, "


@dataclass(frozen=True)
class Attempt:
    """A completion that was scored: its kind, what it got, and what the row's gold answer got.

    `gold` is None where there is no gold answer, or no reward for it: nothing to compare with.
    """

    row: Row
    kind: str
    completion: str
    total: float | None
    gold: float | None


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


@dataclass
class Audit:
    """The audit of some rewards over some rows.

    `milliseconds` is the mean time of a completion by kind; `constants` are the answers that are
    paid on many rows, whatever was asked.
    """

    rows: int
    attempts: list[Attempt] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    milliseconds: dict[str, float] = field(default_factory=dict)
    constants: list[Constant] = field(default_factory=list)

    @property
    def scored(self) -> int:
        """Return the number of rows whose gold answer got a reward."""
        return sum(one.kind == "gold" and one.gold is not None for one in self.attempts)

    @property
    def failures(self) -> list[Attempt]:
        """Return the attempts that earned as much as the gold answer, or more."""
        others = (one for one in self.attempts if one.kind != "gold" and one.gold is not None)
        return [one for one in others if one.total is not None and one.total >= (one.gold or 0)]

    @property
    def passed(self) -> bool:
        """Return whether at least one row was scored, gold won in each, and nothing went wrong."""
        return bool(self.scored) and not (self.failures or self.errors or self.constants)

    @property
    def means(self) -> dict[str, float | None]:
        """Return the mean total by kind, None where no attempt of the kind could be scored."""
        tried = {one.kind for one in self.attempts}
        totals: dict[str, list[float]] = {kind: [] for kind in KINDS if kind in tried}
        for one in self.attempts:
            total = one.gold if one.kind == "gold" else one.total
            if total is not None:
                totals[one.kind].append(total)
        return {kind: fmean(found) if found else None for kind, found in totals.items()}


def audit(
    rewards: Sequence[Reward],
    rows: Sequence[Row],
    transcript: str = DEFAULT,
    many: Sequence[Row] = (),
) -> Audit:
    """Score the gold answer and the attempts to fool the rewards; `Audit.passed` is the result.

    Constant answers and copied gold answers are tried on `many` rows (those of `rows` when left
    out). A reward that asks for token ids gets one number per word. A judge or a reward model is
    tried alone, on planted answers. Raises `InputError` without rows.
    """
    if not rows:
        raise InputError("audit: no rows to try the rewards on")
    report, rules = Audit(len(rows)), [one for one in rewards if not one.is_opinion]
    try:
        if rules:
            with_gold = [row for row in rows if gold_answer(row)]
            tries = [(row, attempts(row, wrong_answer(row, rows), transcript)) for row in with_gold]
            _try(report, rules, tries)
        for opinion in (one for one in rewards if one.is_opinion):
            tries = planted(rows, opinion.task, transcript)
            report.rows += len(tries)
            _try(report, [opinion], tries)
        report.errors += [
            f"reward {reward.__name__} failed on {reward.failed} of {reward.seen} completions"
            for reward in rewards
            if reward.failed
        ]
        for idle in (one for one in rules if one.seen and not (one.scored or one.failed)):
            what = "reward %s returned None for all %d completions that were tried"
            logger.warning(f"{what}: it changes nothing here", idle.__name__, idle.seen)
        if rules and not report.errors:
            report.constants += _constants(rules, many or rows, transcript)
    except RewardFailed as error:
        report.errors.append(str(error))
    return report


def _try(
    report: Audit, rewards: Sequence[Reward], tries: Sequence[tuple[Row, dict[str, list[str]]]]
) -> None:
    """Score each row's attempts, the gold answer first; add them to the report."""
    golds: dict[int, float | None] = {}
    for kind in KINDS:
        trials = [(row, text) for row, texts in tries for text in texts.get(kind, ())]
        if not trials:
            continue
        started = time.perf_counter()
        totals = _totals(rewards, trials)
        report.milliseconds[kind] = 1000 * (time.perf_counter() - started) / len(trials)
        for (row, text), total in zip(trials, totals, strict=True):
            if kind == "gold":
                golds[id(row)] = total
            report.attempts.append(Attempt(row, kind, text, total, golds[id(row)]))


def planted(
    rows: Sequence[Row], task: str | None, transcript: str
) -> list[tuple[Row, dict[str, list[str]]]]:
    """Return rows with a good answer, which is `gold`, and with those that must get less, by kind.

    They are those of `rows` that have the columns `good` and `bad`, or else those of planted.yaml.
    """
    plants = yaml.safe_load(Path(__file__).with_name("planted.yaml").read_text(encoding="utf-8"))
    own = [row for row in rows if row.get("good") and row.get("bad")]
    own = [row for row in own if task in (None, row.get("task"))] or [
        {"prompt": [{"role": "user", "content": one["question"]}], "task": task} | one
        for one in plants["answers"]
    ]
    tries = []
    for row in own:
        tricks = [row["bad"] + trick for trick in plants["injections"]]
        said = {"gold": [row["good"]], "wrong": [row["bad"]], "injecting": tricks, "empty": [""]}
        texts = {kind: [completion_of(one, transcript) for one in of] for kind, of in said.items()}
        texts["empty"].append("")
        tries.append((row, texts))
    return tries


def _totals(rewards: Sequence[Reward], trials: Sequence[tuple[Row, str]]) -> list[float | None]:
    rows, texts = [row for row, _ in trials], [text for _, text in trials]
    words = [text.encode("utf-8", "surrogatepass").split() for text in texts]
    ids = [[*map(zlib.crc32, of)] for of in words]
    return [one.total for one in score(rewards, rows, texts, ids)]


def _constants(rewards: Sequence[Reward], rows: Sequence[Row], form: str) -> list[Constant]:
    """Return the answers that are paid on many rows of a task whose gold answer is another."""
    found = []
    golds = [(row, gold) for row in rows if (gold := gold_answer(row))]
    totals = _totals(rewards, [(row, completion_of(gold, form)) for row, gold in golds])
    tasks: dict[str, list[tuple[Row, str, float]]] = defaultdict(list)
    for (row, gold), total in zip(golds, totals, strict=True):
        if total is not None:
            tasks[str(row.get("task", ""))].append((row, gold, total))
    for task, members in tasks.items():
        answers = {same(gold): gold for _, gold, _ in members}
        for answer in dict.fromkeys((*CONSTANTS, *list(answers.values())[:COPIED])):
            others = [(row, best) for row, gold, best in members if same(gold) != same(answer)]
            said = _totals(rewards, [(row, completion_of(answer, form)) for row, _ in others])
            earned = zip(said, others, strict=True)
            paid = sum(total is not None and total >= best for total, (_, best) in earned)
            if paid >= max(LEAST, OFTEN * len(others)):
                found.append(Constant(task, answer, len(others), paid))
    return sorted(found, key=lambda constant: -constant.paid)


def gold_answer(row: Row) -> str:
    """Return a row's gold answer, empty where it has none."""
    gold = "" if row.get("answer") is None else str(row["answer"])
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
    """Return a key that spellings of one answer share: its number, or its characters."""
    text = clean(answer)
    value = number(text)
    return squeeze(text).casefold() if value is None else value


def attempts(row: Row, wrong: str, transcript: str) -> dict[str, list[str]]:
    """Return the gold answer's completion, and those that must lose, by kind."""
    gold, tags = gold_answer(row), tags_of(transcript)
    right, false = completion_of(gold, transcript), completion_of(wrong, transcript)
    reasoning = _REASONING.format(answer=gold)
    boxed = f"{reasoning} \\boxed{{{gold}}}"
    second = f"{tags.answer_open}{gold}{tags.answer_close}" if tags.answer_open else right
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
    return {
        "gold": [right],
        "wrong": [false, write(_STUFFING + wrong, wrong, transcript)],
        "empty": ["", _tags_around(reasoning, "", transcript)],
        "stuffed": [completion_of(text, transcript) for text in stuffed]
        + [f"{false}\n{second}", f"{false}\n{right}"],
        "tags": ["".join(tags.all), "".join(tags.all) * 20],
        "misplaced": [
            _tags_around(boxed, "I do not know.", transcript),
            f"{tags.reasoning_open}{boxed}",
        ],
        "hostile": [_tags_around("A trick.", text, transcript) for text in HOSTILE],
    }
