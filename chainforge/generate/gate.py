"""Leave out of RL what teaches nothing: prompts that the policy always or never gets right.

A group of completions that are all right, or all wrong, has no advantage, and TRL draws no other
in its place. What counts is correctness, not the reward: shaping makes rewards differ where
answers do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.generate.harvest import read_pool
from chainforge.generate.rounds import pass_rates

LEAST, MOST = 0.1, 0.9  # as in open-r1


@dataclass
class GateArgs:
    """Which prompts are worth training on, by how often they were solved before."""

    gate_pool: str | None = field(
        default=None,
        metadata={
            "help": "Directory of a reject or GRPO stage, or a .jsonl of samples, whose pass rates "
            "decide; all prompts when left out."
        },
    )
    min_pass_rate: float | None = field(
        default=None, metadata={"help": f"Least share of right answers; {LEAST} if left out."}
    )
    max_pass_rate: float | None = field(
        default=None, metadata={"help": f"Largest share of right answers; {MOST} if left out."}
    )
    unmeasured_prompts: Literal["refuse", "keep", "drop"] = field(
        default="refuse",
        metadata={"help": "What to do with prompts that the pool does not have: stop, or ..."},
    )

    def band(self) -> tuple[float, float]:
        """Return the least and the largest pass rate; raise `InputError` when there is no such."""
        low = LEAST if self.min_pass_rate is None else self.min_pass_rate
        high = MOST if self.max_pass_rate is None else self.max_pass_rate
        if not 0 <= low <= high <= 1:
            raise InputError(
                f"min_pass_rate, max_pass_rate: expected 0 <= least <= largest <= 1, found {low} "
                f"and {high}"
            )
        return low, high


@dataclass
class Gated:
    """The prompts that are left, and how many went for which reason."""

    rows: list[Row]
    counts: dict[str, int]


def gate(examples: Sequence[Row], args: GateArgs) -> Gated:
    """Return the Examples whose pass rate lies in the band, each with it in `pass_rate`.

    `counts` holds `in`, `kept`, `too_hard`, `too_easy` and `unmeasured`. Raises `InputError` for
    a band that is none or has no pool, for prompts without a measurement unless told what to do
    with them, and when nothing is left.
    """
    low, high = args.band()
    if args.gate_pool is None:
        if args.min_pass_rate is not None or args.max_pass_rate is not None:
            raise InputError("min_pass_rate, max_pass_rate: go with gate_pool, which is not set")
        return Gated(list(examples), {})
    rates = pass_rates(read_pool([args.gate_pool]))
    counts = {"in": len(examples), "kept": 0, "too_hard": 0, "too_easy": 0, "unmeasured": 0}
    kept = []
    for row in examples:
        measured = rates.get(row["id"], {})
        rate = measured.get("pass_rate")
        if rate is None:
            counts["unmeasured"] += 1
        elif rate < low:
            counts["too_hard"] += 1
            continue
        elif rate > high:
            counts["too_easy"] += 1
            continue
        if rate is not None or args.unmeasured_prompts == "keep":
            kept.append(row | {"pass_rate": rate})
    counts["kept"] = len(kept)
    if counts["unmeasured"] and args.unmeasured_prompts == "refuse":
        raise InputError(
            f"gate_pool: {args.gate_pool} has no verdict on {counts['unmeasured']} of "
            f"{len(examples)} prompts (a prompt is the same only with the same task name and "
            "system prompt); set `unmeasured_prompts: keep` or `drop`"
        )
    if not kept:
        raise InputError(
            f"gate_pool: no prompt has a pass rate from {low:g} to {high:g} ({counts}); widen "
            "min_pass_rate and max_pass_rate, or take other tasks"
        )
    return Gated(kept, counts)
