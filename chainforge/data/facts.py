"""Measure scored samples: what selection must know of each, small enough for millions of rows."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, has_answer
from chainforge.core.transcript import chat_mark, is_blank
from chainforge.data.duplicates import text_key
from chainforge.data.filters import FilterArgs, Finding, filters, parts
from chainforge.data.shingles import (
    Hashes,
    Sketches,
    hashed,
    hashed_tokens,
    shingles,
    sketches,
    tokens,
)

if TYPE_CHECKING:
    from chainforge.data.rejection import SelectionArgs

# A verdict in one byte.
WRONG, RIGHT, UNKNOWN = 0, 1, 2
AT_ONCE = 2_000  # rows whose sketches are made with one call


@dataclass
class Facts:
    """What is known of samples, by position; prompts are numbered as they first come."""

    prompts: dict[str, int] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    prompt: array[int] = field(default_factory=lambda: array("l"))
    verdict: bytearray = field(default_factory=bytearray)
    reward: array[float] = field(default_factory=lambda: array("d"))
    length: array[int] = field(default_factory=lambda: array("l"))
    key: array[int] = field(default_factory=lambda: array("Q"))
    finding: list[Finding | None] = field(default_factory=list)
    sketch: list[Sketches] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)
    rewarded: bool = False

    def __len__(self) -> int:
        return len(self.finding)

    def add(self, row: Row, finding: Finding | None) -> None:
        """Note one sample."""
        identity = row["id"]
        number = self.prompts.setdefault(identity, len(self.prompts))
        if number == len(self.tasks):
            self.tasks.append(str(row.get("task", "")))
            self.questions.append(asked(row))
        reward, tokens, correct = row.get("reward"), row.get("tokens"), row.get("correct")
        self.prompt.append(number)
        # Later rounds go to prompts that lacked successes: counted in, they would bias the rate.
        unknown = correct is None or row.get("round")
        self.verdict.append(UNKNOWN if unknown else RIGHT if correct else WRONG)
        self.reward.append(float("-inf") if reward is None else float(reward))
        self.length.append(len(row["completion"]) if tokens is None else int(tokens))
        self.key.append(0 if finding else text_key(row["completion"]))
        self.finding.append(finding)
        self.columns.update(row)
        self.rewarded = self.rewarded or reward is not None

    def extend(self, other: Facts) -> None:
        """Take over what was measured of the samples that follow."""
        numbers = []
        for identity, own in other.prompts.items():
            number = self.prompts.setdefault(identity, len(self.prompts))
            if number == len(self.tasks):
                self.tasks.append(other.tasks[own])
                self.questions.append(other.questions[own])
            numbers.append(number)
        self.prompt.extend(numbers[number] for number in other.prompt)
        self.verdict += other.verdict
        self.reward += other.reward
        self.length += other.length
        self.key += other.key
        self.finding += other.finding
        self.sketch += other.sketch
        self.columns |= other.columns
        self.rewarded = self.rewarded or other.rewarded


def asked(row: Row) -> str:
    """Return what the user said, all turns of it; an empty text for a row without prompt."""
    turns = row.get("prompt") or ()
    return "\n".join(turn["content"] for turn in turns if turn.get("role") == "user")


def measure(rows: Iterable[Row], args: SelectionArgs, texts: FilterArgs | None = None) -> Facts:
    """Measure samples in their order; the finding is the first that speaks against one.

    The texts are looked at only where nothing else speaks against a sample, and sketched only
    when near duplicates or diversity are asked for.
    """
    checks = filters(texts) if texts is not None else []
    sketched = bool(args.near_duplicates) or args.select == "diverse"
    facts = Facts()
    waiting: list[Hashes] = []
    for row in rows:
        finding = fault(row, args)
        if finding is None and (checks or sketched):
            said = parts(row["completion"])
            finding = next((found for check in checks if (found := check(row, said))), None)
            if sketched and finding is None:
                text = [hashed_tokens(said.reasoning), hashed(tokens(said.answer))]
                waiting.append(shingles(np.concatenate(text)))
                if len(waiting) >= AT_ONCE:
                    facts.sketch.append(sketches(waiting))
                    waiting = []
        facts.add(row, finding)
    if waiting:
        facts.sketch.append(sketches(waiting))
    return facts


def fault(row: Row, args: SelectionArgs) -> Finding | None:
    """Return the first thing that speaks against a sample's scores; None when nothing does."""
    if not isinstance(row.get("completion"), str) or "id" not in row:
        raise InputError(f"a sample needs `id` and `completion` (text), found {str(row)[:120]}")
    ended, correct, reward = row.get("finish_reason"), row.get("correct"), row.get("reward")
    if ended not in ("stop", None):
        return "truncated", f"ended by {ended}"
    if mark := row.get("chat_token") or chat_mark(row["completion"]):
        return "chat_token", f"holds {str(mark)[:60]}"
    if is_blank(row["completion"]):
        return "empty", "an empty completion"
    if args.require_format and not row.get("formatted"):
        return "format", "no strict transcript"
    if args.require_correct and correct is None and has_answer(row):
        return "unverified", "the answer could not be checked"
    if args.require_correct and correct is not None and not correct:
        return "wrong", f"answered {str(row.get('extracted'))[:60]!r}"
    if args.min_reward is not None and (reward is None or reward < args.min_reward):
        return "below_min_reward", f"reward {reward}"
    return None
