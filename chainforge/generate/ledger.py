"""Account for every request: what it may cost before it is sent, what it did cost afterwards.

`requests.jsonl` has a line for a request about to be sent, with the most that it can cost, and one
for its outcome, with the answer. It is written before and after, so that a killed run knows
what it sent. A request without an outcome, or whose price nobody told, counts in full. The file is
forced to disk before a request is sent, unless that was done less than `SYNC_SECONDS` ago: a power
cut can lose no more than the requests of so many seconds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chainforge.core.disk import to_disk
from chainforge.core.errors import InputError
from chainforge.core.jsonl import JsonLines, Row, read_rows, write_rows

LIMITS = ("max_usd", "max_tokens_total", "max_requests")
# Sums of many small prices differ in the last places; a limit of exactly their sum is not passed.
ROUNDING = 1e-9
SYNC_SECONDS = 1.0


@dataclass(frozen=True)
class Amount:
    """Money and tokens; `usd` is None where no price is known."""

    usd: float | None
    tokens: int

    def __add__(self, other: Amount) -> Amount:
        usd = None if self.usd is None or other.usd is None else self.usd + other.usd
        return Amount(usd, self.tokens + other.tokens)


NOTHING = Amount(0.0, 0)


@dataclass(frozen=True)
class Limits:
    """The most that may be spent; None is without limit."""

    usd: float | None = None
    tokens: int | None = None
    requests: int | None = None


@dataclass
class Spending:
    """What requests have cost: as told, and at most where nobody told."""

    requests: int = 0
    told: Amount = NOTHING
    unsure: Amount = NOTHING
    unsure_requests: int = 0
    reserved: dict[int, Amount] = field(default_factory=dict)

    def total(self) -> Amount:
        """Return the most that can have been spent, requests under way left out."""
        return self.told + self.unsure


class Ledger:
    """The account of one directory, over all of its runs."""

    def __init__(self, path: Path, limits: Limits, *, unused: bool = False) -> None:
        for name, limit in zip(LIMITS, vars(limits).values(), strict=True):
            if limit is not None and not limit > 0:
                raise InputError(f"{name}: expected more than 0, found {limit}")
        self.path, self.limits, self.spending = path, limits, Spending()
        self.answers: dict[str, Row] = {}  # by key; from an earlier run
        self._sent = 0
        self._synced = -SYNC_SECONDS
        self._unused = unused  # where nothing is paid, no account is kept
        if not unused:
            self._lines = JsonLines(path)
            self._recall()

    def _recall(self) -> None:
        """Read what earlier runs sent, and count in full what they never heard of again."""
        for line in read_rows(self.path):
            number = line["request"]
            self._sent = max(self._sent, number)
            if "outcome" not in line:
                self.spending.requests += 1
                self.spending.reserved[number] = Amount(line["usd"], line["tokens"])
                continue
            self._book(number, Amount(line["usd"], line["tokens"]), line["told"])
            if line.get("answer"):
                self.answers[line["key"]] = line["answer"]
        for number, worst in list(self.spending.reserved.items()):
            self._book(number, worst, told=False)

    def forbids(self, worst: Amount) -> str | None:
        """Name the limit that one more request might break; None when there is none."""
        spent = self.spending.total()
        for amount in self.spending.reserved.values():
            spent += amount
        spent += worst
        if self.limits.usd is not None and (
            spent.usd is None or spent.usd > self.limits.usd + ROUNDING
        ):
            return "max_usd"
        if self.limits.tokens is not None and spent.tokens > self.limits.tokens:
            return "max_tokens_total"
        if self.limits.requests is not None and self.spending.requests >= self.limits.requests:
            return "max_requests"
        return None

    def send(self, key: str, worst: Amount) -> int:
        """Write down that a request is about to be sent; return its number."""
        self._sent += 1
        self._lines.append(
            {"request": self._sent, "key": key, "usd": worst.usd, "tokens": worst.tokens,
             "sent": datetime.now(UTC).isoformat(timespec="milliseconds")}
        )  # fmt: skip
        self.spending.requests += 1
        self.spending.reserved[self._sent] = worst
        self._sync()
        return self._sent

    def _sync(self) -> None:
        """Force the account to disk, now and then; its name in the directory too, to begin with."""
        if time.monotonic() - self._synced < SYNC_SECONDS:
            return
        self._lines.sync()
        if self._synced < 0:
            to_disk(self.path.parent)
        self._synced = time.monotonic()

    def settle(
        self, number: int, key: str, outcome: str, paid: Amount | None, answer: Row | None = None
    ) -> None:
        """Write down what came of a request; `paid` is None when nobody told what it cost."""
        amount = self.spending.reserved[number] if paid is None else paid
        line: dict[str, Any] = {"request": number, "key": key, "outcome": outcome,
                                "usd": amount.usd, "tokens": amount.tokens,
                                "told": paid is not None}  # fmt: skip
        self._lines.append(line | {"answer": answer} if answer else line)
        self._book(number, amount, told=paid is not None)

    def _book(self, number: int, amount: Amount, told: bool) -> None:
        self.spending.reserved.pop(number, None)
        if told:
            self.spending.told += amount
        else:
            self.spending.unsure += amount
            self.spending.unsure_requests += 1

    def summary(self) -> dict[str, Any]:
        """Return what was spent, for a manifest: money is None where no price is known."""
        if self._unused:
            return {}
        spending = self.spending
        return {
            "requests": spending.requests,
            "tokens": spending.told.tokens,
            "usd": spending.told.usd,
            "untold_requests": spending.unsure_requests,
            "untold_usd_at_most": spending.unsure.usd,
        }

    def forget_answers(self) -> None:
        """Leave out the answers once they stand in samples.jsonl, or nowhere by decision."""
        if self._unused:
            return
        self._lines.close()
        lines = read_rows(self.path)
        write_rows(self.path, ({k: v for k, v in line.items() if k != "answer"} for line in lines))
        self._lines = JsonLines(self.path)

    def close(self) -> None:
        """Force the lines to disk."""
        if not self._unused:
            self._lines.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
