"""Rejection sampling: which of the scored samples are worth training on, and why not the others.

Every sample that goes in comes out once: kept, or dropped with its reason in the column `drop` and
what was measured in `drop_detail`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.data.decisions import decide
from chainforge.data.facts import measure
from chainforge.data.filters import FilterArgs

KINDS = ("task", "difficulty")


@dataclass
class SelectionArgs:
    """What to keep of the samples of each prompt."""

    max_per_prompt: int = field(default=1, metadata={"help": "Most samples kept of one prompt."})
    select: Literal["best", "random", "shortest", "median", "diverse", "all"] = field(
        default="best",
        metadata={
            "help": "Which are kept: those of highest reward (at random among equals), any, the "
            "shortest, those nearest to the median length, those that differ most, or all of them "
            "whatever `max_per_prompt` says."
        },
    )
    min_reward: float | None = field(
        default=None, metadata={"help": "Least total reward; none when left out."}
    )
    require_correct: bool = field(
        default=True,
        metadata={
            "help": "Drop samples that are wrong or could not be verified; of prompts without an "
            "answer none is."
        },
    )
    require_format: bool = field(
        default=True, metadata={"help": "Drop samples that are not a strict transcript."}
    )
    min_pass_rate: float | None = field(
        default=None,
        metadata={"help": "Least share of a prompt's samples that must be right: pass_rate."},
    )
    max_pass_rate: float | None = field(
        default=None, metadata={"help": "Most of them that may be: easier prompts teach little."}
    )
    drop_duplicates: bool = field(
        default=True,
        metadata={
            "help": "Keep one of equal completions of a prompt, and one of prompts that ask the "
            "same; case and white space do not count."
        },
    )
    near_duplicates: float | None = field(
        default=None,
        metadata={
            "help": "Keep one of a prompt's completions that are so alike, as the share of "
            "5-word runs in common (0.8, say): near_duplicate."
        },
    )
    near_duplicate_prompts: float | None = field(
        default=None,
        metadata={
            "help": "The same for prompts, by the runs that are no template's; prompts with other "
            "numbers are never alike: near_duplicate_prompt."
        },
    )
    decontaminate: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Evaluations whose questions no kept prompt may give away: YAML files of "
            "evaluate.py, .jsonl files, folders, Hub ids, tasks written as text: '{fn: hub, "
            "params: {dataset: gsm8k}, split: test}'. A chain adds its own evaluate stages."
        },
    )
    max_rows: int | None = field(
        default=None, metadata={"help": "Most rows kept in all, see `balance`: over_quota."}
    )
    balance: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Spread max_rows evenly over each `task`, each `difficulty` (band of the pass "
            "rate), or both."
        },
    )
    max_per_task: int | None = field(
        default=None, metadata={"help": "Most rows kept of one task: over_quota."}
    )

    def check(self) -> None:
        """Raise `InputError` for settings that can mean nothing."""
        for name in ("max_per_prompt", "max_rows", "max_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: expected 1 or more, found {value}")
        for name in ("near_duplicates", "near_duplicate_prompts", "min_pass_rate", "max_pass_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{name}: expected a share from 0 to 1, found {value}")
        low, high = self.min_pass_rate, self.max_pass_rate
        if low is not None and high is not None and low > high:
            raise InputError(f"min_pass_rate ({low}) is more than max_pass_rate ({high})")
        for kind in self.balance:
            if kind not in KINDS:
                raise InputError(f"balance: {kind!r} is none of {', '.join(KINDS)}")
        if self.balance and self.max_rows is None:
            raise InputError("balance: say how many rows to spread, as `max_rows: 10000`")


# Reasons to drop a sample that one setting turns off.
ACCEPTING = {
    "wrong": "require_correct: false",
    "unverified": "require_correct: false",
    "format": "require_format: false",
}


@dataclass
class Selected:
    """Where every sample went."""

    kept: list[Row]
    dropped: list[Row]
    funnel: dict[str, Any]

    def why_none(self) -> str:
        """Return why no row is kept: the commonest reason, an answer, what would accept it."""
        reason, count = Counter(row["drop"] for row in self.dropped).most_common(1)[0]
        row = next(row for row in self.dropped if row["drop"] == reason)
        setting = ACCEPTING.get(reason)
        return (
            f"no row was kept; {count:,} of {len(self.dropped):,} are dropped as {reason}. One of "
            f"them, where {str(row.get('answer'))[:60]!r} is right: "
            f"{str(row.get('completion'))[:200]!r}"
            + (f". `{setting}` would accept it" if setting else "")
            + ". funnel.json has all reasons"
        )


def select_rows(
    samples: list[Row],
    args: SelectionArgs,
    seed: int = 0,
    texts: FilterArgs | None = None,
) -> Selected:
    """Divide scored samples into kept and dropped; both in the order in which they came.

    Each row gains `pass_rate` (share of correct ones among the prompt's verified samples, None
    without any) and `drop` (None, or the reason). Raises `InputError` when a column that a filter
    needs is in no row.
    """
    decisions = decide(measure(samples, args, texts), args, seed)
    marked = [decisions.mark(position, row) for position, row in enumerate(samples)]
    kept = [row for row in marked if row["drop"] is None]
    dropped = [row for row in marked if row["drop"] is not None]
    return Selected(kept, dropped, decisions.funnel())
