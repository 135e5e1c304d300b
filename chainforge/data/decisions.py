"""Decide what becomes of measured samples: prompts first, then a prompt's samples, then quotas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.data import filters
from chainforge.data.benchmarksets import evaluation_questions
from chainforge.data.choice import beyond_quota, choose, difficulty
from chainforge.data.contamination import Screen
from chainforge.data.duplicates import (
    alike_completions,
    alike_prompts,
    equal_completions,
    equal_prompts,
)
from chainforge.data.facts import RIGHT, UNKNOWN, Facts
from chainforge.data.filters import Finding

if TYPE_CHECKING:
    from chainforge.data.rejection import SelectionArgs
    from chainforge.data.shingles import Sketches

# In the order in which they are looked for: a sample's reason is the first that holds.
REASONS = (
    "truncated",
    "empty",
    "chat_token",
    "format",
    "unverified",
    "wrong",
    "below_min_reward",
    *filters.REASONS,
    "contaminated",
    "pass_rate",
    "duplicate_prompt",
    "near_duplicate_prompt",
    "duplicate",
    "near_duplicate",
    "not_selected",
    "over_quota",
)


@dataclass
class Decisions:
    """What becomes of samples, by position, and the pass rate of each prompt, by its number."""

    findings: list[Finding | None]
    pass_rates: list[float | None]
    facts: Facts
    screened: dict[str, int] = field(default_factory=dict)

    def mark(self, position: int, row: Row) -> Row:
        """Return a sample with its `pass_rate`, `drop` and, if dropped, `drop_detail`."""
        finding = self.findings[position]
        row = row | {"pass_rate": self.pass_rates[self.facts.prompt[position]], "drop": None}
        row.pop("drop_detail", None)
        if finding is not None:
            row["drop"], row["drop_detail"] = finding
        return row

    def funnel(self) -> dict[str, Any]:
        """Count samples and prompts: `in` is `kept` and all that was dropped, by reason."""
        counts = Counter(finding[0] for finding in self.findings if finding is not None)
        kept = len(self.findings) - counts.total()
        numbers = (n for n, finding in zip(self.facts.prompt, self.findings) if finding is None)
        prompts = {"in": len(self.facts.tasks), "kept": len(set(numbers))}
        dropped = {reason: counts[reason] for reason in REASONS if reason in counts}
        funnel = {"in": len(self.findings), "kept": kept, "dropped": dropped, "prompts": prompts}
        return funnel | ({"decontamination": self.screened} if self.screened else {})


def decide(facts: Facts, args: SelectionArgs, seed: int = 0) -> Decisions:
    """Say of every sample that was measured whether it is kept, or else why not."""
    args.check()
    _check_columns(facts, args)
    questions = evaluation_questions(args.decontaminate, seed)
    rates = _pass_rates(facts)
    findings = list(facts.finding)
    groups = _eligible(facts, findings)
    against = _prompt_findings(facts, args, rates, groups, questions)
    for number, finding in against.items():
        for position in groups.pop(number):
            findings[position] = finding
    sketches_at = _sketches_at(facts)
    names = list(facts.prompts)
    for number, positions in groups.items():
        _select(positions, args, f"{seed}/{names[number]}", facts, findings, sketches_at)
    _limit(facts, args, seed, rates, findings)
    screened = {"questions": len(questions)} if questions else {}
    if questions:
        hits = sum(finding[0] == "contaminated" for finding in against.values())
        screened |= {"prompts": len(groups) + len(against), "prompts_dropped": hits}
    return Decisions(findings, rates, facts, screened)


def _check_columns(facts: Facts, args: SelectionArgs) -> None:
    if not len(facts):
        raise InputError("no samples to select from")
    if args.min_reward is not None and not facts.rewarded:
        raise InputError("min_reward: no sample has a reward; score them first, or leave it out")
    needs = {
        "correct": ("require_correct: false", args.require_correct),
        "formatted": ("require_format: false", args.require_format),
        "reward": ("select: random", args.select == "best"),
    }
    for column, (otherwise, needed) in needs.items():
        if needed and column not in facts.columns:
            raise InputError(f"no sample has {column!r}: score them first, or set {otherwise}")
    if (args.min_pass_rate is not None or args.max_pass_rate is not None) and not any(
        verdict != UNKNOWN for verdict in facts.verdict
    ):
        raise InputError("min_pass_rate and max_pass_rate need samples with a verdict, `correct`")


def _pass_rates(facts: Facts) -> list[float | None]:
    right, judged = [0] * len(facts.tasks), [0] * len(facts.tasks)
    for number, verdict in zip(facts.prompt, facts.verdict, strict=True):
        if verdict != UNKNOWN:
            judged[number] += 1
            right[number] += verdict == RIGHT
    return [r / n if n else None for r, n in zip(right, judged, strict=True)]


def _eligible(facts: Facts, findings: list[Finding | None]) -> dict[int, list[int]]:
    """Return the positions nothing speaks against, by prompt, in the order of the first."""
    groups: dict[int, list[int]] = {}
    for position, (number, finding) in enumerate(zip(facts.prompt, findings, strict=True)):
        if finding is None:
            groups.setdefault(number, []).append(position)
    return groups


def _prompt_findings(
    facts: Facts,
    args: SelectionArgs,
    rates: list[float | None],
    groups: dict[int, list[int]],
    questions: list[tuple[str, str]],
) -> dict[int, Finding]:
    """Return what speaks against whole prompts, by number; only those with eligible samples."""
    found: dict[int, Finding] = {}
    names = list(facts.prompts)
    texts = [(number, facts.questions[number]) for number in groups if facts.questions[number]]
    if questions:
        hits = Screen(questions).screen([(facts.tasks[n], text) for n, text in texts])
        for (number, _), hit in zip(texts, hits, strict=True):
            if hit is not None:
                found[number] = "contaminated", str(hit)
    low, high = args.min_pass_rate, args.max_pass_rate
    for number in groups:
        rate = rates[number]
        if number in found or rate is None or (low is None and high is None):
            continue
        if (low is not None and rate < low) or (high is not None and rate > high):
            found[number] = "pass_rate", f"{rate:.0%} of the samples are right"
    texts = [(number, text) for number, text in texts if number not in found]
    if args.drop_duplicates:
        for number, first in equal_prompts(texts).items():
            found[number] = "duplicate_prompt", f"asks the same as {names[first]}"
    if args.near_duplicate_prompts:
        texts = [(number, text) for number, text in texts if number not in found]
        for number, (first, alike) in alike_prompts(texts, args.near_duplicate_prompts).items():
            found[number] = "near_duplicate_prompt", f"{alike:.0%} as {names[first]}"
    return found


def _sketches_at(facts: Facts) -> Callable[[list[int]], Sketches]:
    """Return a function from positions to their sketches; samples with a finding have none."""
    import numpy as np

    if not facts.sketch:
        return lambda positions: np.zeros((len(positions), 0), dtype=np.uint32)
    whole = np.concatenate(facts.sketch)
    row_of = np.cumsum([finding is None for finding in facts.finding], dtype=np.int64) - 1
    return lambda positions: whole[row_of[positions]]


def _select(
    positions: list[int],
    args: SelectionArgs,
    seed: str,
    facts: Facts,
    findings: list[Finding | None],
    sketches_at: Callable[[list[int]], Sketches],
) -> None:
    """Mark what is not kept of one prompt's eligible samples."""
    if args.drop_duplicates and len(positions) > 1:
        equal = equal_completions({position: facts.key[position] for position in positions})
        for position in equal:
            findings[position] = "duplicate", "the same text as another sample of the prompt"
        positions = [position for position in positions if position not in equal]
    if args.near_duplicates and len(positions) > 1:
        twins = alike_completions(positions, sketches_at(positions), args.near_duplicates)
        for position, (_, alike) in twins.items():
            findings[position] = "near_duplicate", f"about {alike:.0%} as another sample"
        positions = [position for position in positions if position not in twins]
    chosen = choose(
        positions,
        args.select,
        args.max_per_prompt,
        seed,
        reward=facts.reward.__getitem__,
        length=facts.length.__getitem__,
        sketch=lambda: sketches_at(positions),
    )
    for position in positions:
        if position not in chosen:
            findings[position] = "not_selected", f"{args.select}, {len(chosen)} kept"


def _limit(
    facts: Facts,
    args: SelectionArgs,
    seed: int,
    rates: list[float | None],
    findings: list[Finding | None],
) -> None:
    """Mark what is more than the quotas allow."""
    names = list(facts.prompts)

    def drop(groups: dict[str, list[int]], most: int, why: str) -> None:
        def identity(position: int) -> str:
            return f"{names[facts.prompt[position]]}/{facts.key[position]}"

        for position in beyond_quota(groups, most, seed, identity):
            findings[position] = "over_quota", why

    def kept(kinds: list[str]) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = {}
        for position, finding in enumerate(findings):
            if finding is None:
                number = facts.prompt[position]
                of = {"task": facts.tasks[number], "difficulty": difficulty(rates[number])}
                groups.setdefault(" ".join(of[kind] for kind in kinds), []).append(position)
        return groups

    if args.max_per_task is not None:
        for task, members in kept(["task"]).items():
            drop({task: members}, args.max_per_task, f"max_per_task: {args.max_per_task}")
    if args.max_rows is not None:
        drop(kept(args.balance), args.max_rows, f"max_rows: {args.max_rows}")
