"""Rejection sampling: which of the scored samples are worth training on, and why not the others.

Every sample that goes in comes out once: kept, or dropped with its reason in the column `drop`.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from chainforge.core.errors import InputError
from chainforge.core.records import Row

# In the order in which they are looked for: a sample's reason is the first that holds.
REASONS = (
    "truncated",
    "format",
    "unverified",
    "wrong",
    "below_min_reward",
    "duplicate",
    "not_selected",
)


@dataclass
class SelectionArgs:
    """What to keep of the samples of each prompt."""

    keep: int = field(default=1, metadata={"help": "Most samples kept of one prompt."})
    select: Literal["best", "random", "shortest", "all"] = field(
        default="best",
        metadata={
            "help": "Which are kept: those of highest reward (at random among equals), any, the "
            "shortest, or all of them whatever `keep` says."
        },
    )
    min_reward: float | None = field(
        default=None, metadata={"help": "Least total reward; none when left out."}
    )
    require_correct: bool = field(
        default=True, metadata={"help": "Drop samples that are wrong or could not be verified."}
    )
    require_format: bool = field(
        default=True, metadata={"help": "Drop samples that are not a strict transcript."}
    )
    drop_duplicates: bool = field(
        default=True, metadata={"help": "Keep one of equal completions of a prompt."}
    )


@dataclass
class Selected:
    """Where every sample went."""

    kept: list[Row]
    dropped: list[Row]
    funnel: dict[str, Any]


def select_rows(samples: list[Row], args: SelectionArgs, seed: int = 0) -> Selected:
    """Divide scored samples into kept and dropped; both in the order in which they came.

    Each row gains `pass_rate` (share of correct ones among the prompt's verified samples, None
    without any) and `drop` (None, or the reason). Raises `InputError` when a column that a filter
    needs is in no row.
    """
    _check(samples, args)
    prompts: dict[str, list[int]] = {}
    for position, row in enumerate(samples):
        prompts.setdefault(row["id"], []).append(position)
    reasons: list[str | None] = [_fault(row, args) for row in samples]
    rates: list[float | None] = [None] * len(samples)
    for identity, positions in prompts.items():
        rate = _pass_rate([samples[position] for position in positions])
        for position in positions:
            rates[position] = rate
        eligible = [position for position in positions if reasons[position] is None]
        if args.drop_duplicates:
            eligible = _distinct(samples, eligible, reasons)
        chosen = _choose(samples, eligible, args, f"{seed}/{identity}")
        for position in eligible:
            if position not in chosen:
                reasons[position] = "not_selected"
    marked = [
        row | {"pass_rate": rate, "drop": reason}
        for row, rate, reason in zip(samples, rates, reasons, strict=True)
    ]
    kept = [row for row in marked if row["drop"] is None]
    dropped = [row for row in marked if row["drop"] is not None]
    counts = Counter(row["drop"] for row in dropped)
    by_reason = {reason: counts[reason] for reason in REASONS if reason in counts}
    return Selected(kept, dropped, {"in": len(samples), "kept": len(kept), "dropped": by_reason})


def _check(samples: list[Row], args: SelectionArgs) -> None:
    if not samples:
        raise InputError("no samples to select from")
    if args.keep < 1:
        raise InputError(f"keep: expected 1 or more, found {args.keep}")
    if args.min_reward is not None and all(row.get("reward") is None for row in samples):
        raise InputError("min_reward: no sample has a reward; score them first, or leave it out")
    needs = {
        "correct": ("require_correct: false", args.require_correct),
        "formatted": ("require_format: false", args.require_format),
        "reward": ("select: random", args.select == "best"),
    }
    for column, (otherwise, needed) in needs.items():
        if needed and not any(column in row for row in samples):
            raise InputError(f"no sample has {column!r}: score them first, or set {otherwise}")


def _fault(row: Row, args: SelectionArgs) -> str | None:
    """Return the first reason against a sample that lies in itself; None when there is none."""
    correct, reward = row.get("correct"), row.get("reward")
    faults = {
        "truncated": row.get("finish_reason") not in ("stop", None),
        "format": args.require_format and not row.get("formatted"),
        "unverified": args.require_correct and correct is None,
        "wrong": args.require_correct and not correct,
        "below_min_reward": args.min_reward is not None
        and (reward is None or reward < args.min_reward),
    }
    return next((reason for reason, holds in faults.items() if holds), None)


def _pass_rate(rows: list[Row]) -> float | None:
    judged = [bool(row["correct"]) for row in rows if row.get("correct") is not None]
    return sum(judged) / len(judged) if judged else None


def _distinct(samples: list[Row], eligible: list[int], reasons: list[str | None]) -> list[int]:
    """Return the first of each completion among those eligible; mark the others."""
    seen: set[str] = set()
    first = []
    for position in eligible:
        completion = samples[position]["completion"]
        if completion in seen:
            reasons[position] = "duplicate"
        else:
            seen.add(completion)
            first.append(position)
    return first


def _choose(samples: list[Row], eligible: list[int], args: SelectionArgs, seed: str) -> set[int]:
    """Return the positions to keep of one prompt's eligible samples."""
    if args.select == "all" or len(eligible) <= args.keep:
        return set(eligible)
    # Equals are taken at random: by length, the best would be those that reason least.
    order = eligible.copy()
    random.Random(seed).shuffle(order)
    if args.select == "best":
        order.sort(key=lambda position: _reward(samples[position]), reverse=True)
    elif args.select == "shortest":
        order.sort(key=lambda position: _length(samples[position]))
    return set(order[: args.keep])


def _reward(row: Row) -> float:
    reward = row.get("reward")
    return float("-inf") if reward is None else float(reward)


def _length(row: Row) -> int:
    tokens = row.get("tokens")
    return len(row["completion"]) if tokens is None else int(tokens)
