"""When a prompt has been sampled enough, and what its samples say about how hard it is.

Sampling in rounds spends tokens where they bring rows: a prompt that is solved at once needs few
samples for `keep` accepted ones, a hard one gets up to `max_samples`. What a prompt is asked next
depends on its own samples alone, so that processes need not wait for one another.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from chainforge.core.jsonl import Row
from chainforge.data.filters import FilterArgs
from chainforge.data.pool import measure
from chainforge.data.select import SelectionArgs
from chainforge.generate.engine import Draw, SamplingArgs, seed_of

Accept = Callable[[list[Row]], Sequence[bool]]
State = Literal["open", "enough", "given_up", "exhausted"]


class Rounds:
    """The samples of every prompt so far, and which are wanted next."""

    def __init__(
        self,
        examples: Sequence[Row],
        args: SamplingArgs,
        accept: Accept | None = None,
        keep: int = 1,
    ) -> None:
        self.examples, self.args, self.accept, self.keep = examples, args, accept, keep
        self.rows: dict[str, dict[int, Row]] = {row["id"]: {} for row in examples}
        self.count = self.right = 0
        self._accepted: dict[str, dict[int, bool]] = defaultdict(dict)
        self._settled: dict[str, State] = {}

    def note(self, rows: Sequence[Row]) -> None:
        """Take in judged Samples."""
        mine = [row for row in rows if row["id"] in self.rows and row["sample"] < self.args.most]
        verdicts: Sequence[bool] = []
        if self.args.adaptive and mine:
            verdicts = (self.accept or _right)(mine)
        for row in mine:
            self.count += row["sample"] not in self.rows[row["id"]]
            self.right += bool(row.get("correct"))
            self.rows[row["id"]][row["sample"]] = row
        for row, verdict in zip(mine, verdicts):
            self._accepted[row["id"]][row["sample"]] = bool(verdict)

    def draws(self, examples: Iterable[Row], seed: int) -> list[Draw]:
        """Return what is to be sampled next for these Examples; nothing when all have enough."""
        wanted = []
        for row in examples:
            state, end = self.state(row["id"])
            if state == "open":
                there = self.rows[row["id"]]
                missing = [sample for sample in range(end) if sample not in there]
                wanted += [Draw(row, one, seed_of(seed, row["id"], one)) for one in missing]
        return wanted

    def state(self, identity: str) -> tuple[State, int]:
        """Return whether a prompt has enough, and up to which sample it is wanted.

        A round counts once it is whole: a run that was cut within one decides as the whole run.
        """
        there, args = self.rows[identity], self.args
        if identity in self._settled:
            return self._settled[identity], len(there)
        size = args.round_size if args.adaptive else args.most
        for end in [*range(size, args.most, size), args.most]:
            if any(sample not in there for sample in range(end)):
                return "open", end
            if state := self._verdict(identity, end):
                self._settled[identity] = state
                return state, end
        raise AssertionError("the last round settles a prompt")

    def _verdict(self, identity: str, end: int) -> State | None:
        """Return why a prompt needs no more after `end` samples; None when it does."""
        if self.args.adaptive:
            taken, there = self._accepted[identity], self.rows[identity]
            # Of equal completions only one can be kept.
            found = {there[sample]["completion"] for sample in range(end) if taken[sample]}
            if len(found) >= self.keep:
                return "enough"
            limit = self.args.max_failed_samples
            if limit is not None and end >= limit and end < self.args.most and not found:
                return "given_up"
        return "exhausted" if end >= self.args.most else None

    def settled(self) -> int:
        """Count the prompts that need no more samples."""
        return sum(self.state(row["id"])[0] != "open" for row in self.examples)

    def samples(self) -> list[Row]:
        """Return all Samples, in the order of the Examples."""
        return [
            self.rows[row["id"]][sample]
            for row in self.examples
            for sample in sorted(self.rows[row["id"]])
        ]

    def report(self) -> dict[str, Any]:
        """Return what was sampled, and what stopping early saved and may have cost."""
        rows = self.samples()
        found: dict[str, Any] = {
            "prompts": len(self.examples),
            "samples": len(rows),
            "tokens": sum(row.get("tokens") or 0 for row in rows),
        }
        if self.args.adaptive:
            states = Counter(self.state(row["id"])[0] for row in self.examples)
            found |= {name: states[name] for name in ("enough", "exhausted", "given_up")}
            found["samples_saved"] = len(self.examples) * self.args.most - len(rows)
            # The prompts that were given up are the hardest; more samples might have found these.
            found["rows_given_up_at_most"] = states["given_up"] * self.keep
        return found


def accepted_by(selection: SelectionArgs, texts: FilterArgs | None = None) -> Accept:
    """Accept what nothing in the row itself speaks against; what else is sampled does not count."""
    alone = replace(selection, near_duplicates=None, select="all")  # these compare rows

    def accept(rows: list[Row]) -> list[bool]:
        return measure(rows, alone, texts).accepted

    return accept


def _right(rows: list[Row]) -> list[bool]:
    return [bool(row.get("correct")) for row in rows]


def pass_rates(rows: Iterable[Row]) -> dict[str, Row]:
    """Return by prompt `pass_rate`, `n_samples` and `n_correct`; rows without verdict left out.

    Who stops at a success has, of what was sampled, too large a share of successes. Where samples
    came in rounds (column `round`) the rate is therefore that of the first round, which every
    prompt got whole, whatever came of it: an unbiased estimate, if a coarse one. The two counts
    are of all samples.
    """
    counted: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for row in rows:
        counts = counted[row["id"]]
        if row.get("correct") is not None:
            first = not row.get("round")
            counts[0] += 1
            counts[1] += bool(row["correct"])
            counts[2] += first
            counts[3] += first and bool(row["correct"])
    return {
        identity: {"pass_rate": right / first if first else None, "n_samples": n, "n_correct": c}
        for identity, (n, c, first, right) in counted.items()
    }
