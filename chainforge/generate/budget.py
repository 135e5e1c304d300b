"""Money and tokens: prices, and the ledger of every request.

`requests.jsonl` has a line for a request about to be sent, with the most that it can cost, and one
for its outcome, with the answer. So a killed run knows what it sent. A request without an outcome,
or without a known cost, counts in full. The file is forced to disk before a request is sent, unless
that was done less than `SYNC_SECONDS` ago: a power cut loses only the requests of that time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec

from chainforge.core.config import read_yaml
from chainforge.core.errors import InputError
from chainforge.core.jsonl import JsonLines, Row, read_rows, write_rows

SHIPPED = Path(__file__).with_name("prices.yaml")
MILLION = 1_000_000
# Sums of many small prices differ in the last places; a limit of exactly their sum is not passed.
ROUNDING = 1e-9
SYNC_SECONDS = 1.0
LIMITS = ("max_usd", "max_tokens_total", "max_requests")

_Usd = Annotated[float, msgspec.Meta(ge=0)]
_Hours = Annotated[str, msgspec.Meta(pattern=r"^\d\d:\d\d-\d\d:\d\d$")]


def usd(value: float) -> str:
    """Write money: $3.66, and small amounts with more digits: $0.0037."""
    digits = 2 if value == 0 or value >= 0.1 else 4 if value >= 0.001 else 6
    return f"${value:,.{digits}f}"


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """USD per million tokens: cached input, other input, and output; and the same at peak hours."""

    cache_hit: _Usd
    cache_miss: _Usd
    output: _Usd
    peak: Rates | None = None

    def cost(self, hit: int, miss: int, output: int) -> float:
        """Return USD for these tokens."""
        return (hit * self.cache_hit + miss * self.cache_miss + output * self.output) / MILLION


class _Host(msgspec.Struct, forbid_unknown_fields=True):
    """The prices of one host, as a price table has them."""

    date: str
    models: dict[str, Rates]
    source: str = ""
    peak_hours: list[_Hours] = []


@dataclass(frozen=True)
class Price:
    """What one model costs; peak hours are UTC, from Monday to Friday."""

    date: str
    source: str
    off_peak: Rates
    peak_hours: tuple[str, ...] = ()

    @property
    def peak(self) -> Rates:
        """Return the rates of the peak hours."""
        return self.off_peak.peak or self.off_peak

    def at(self, moment: datetime) -> Rates:
        """Return the rates at a moment."""
        moment = moment.astimezone(UTC)
        clock = f"{moment:%H:%M}"
        peak = any(hours[:5] <= clock < hours[6:] for hours in self.peak_hours)
        return self.peak if peak and moment.weekday() < 5 else self.off_peak

    def cost(self, usage: Any, *moments: datetime) -> float | None:
        """Return USD for a `usage` at the dearest of the moments; None where it lacks counts.

        A provider's page does not say whether the time of sending or of the answer counts.
        """
        counts = token_counts(usage)
        return None if counts is None else max(self.at(moment).cost(*counts) for moment in moments)

    def worst(self, prompt: int, completion: int) -> float:
        """Return the most that these tokens can cost at any hour."""
        return max(rates.cost(0, prompt, completion) for rates in (self.peak, self.off_peak))


def token_counts(usage: Any) -> tuple[int, int, int] | None:
    """Return a usage's tokens: cached input, other input, output; None for impossible ones.

    Every request has a prompt and every answer tokens. Some servers count the reasoning in the
    total only; it is output, too.
    """
    if not isinstance(usage, dict):
        return None
    prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    hit = usage.get("prompt_cache_hit_tokens", cached) or 0
    if not (type(prompt) is type(output) is type(hit) is int and prompt > 0 and output > 0):
        return None
    total = usage.get("total_tokens")
    output = max(output, total - prompt) if type(total) is int else output
    hit = max(0, min(hit, prompt))
    return hit, prompt - hit, output


def find_price(host: str, model: str, own: str | None = None) -> Price | None:
    """Return the price of a model at a host, from the user's table or else the shipped one.

    A model in neither has an unknown price: None, never 0. Raises `InputError` for a wrong table.
    """
    for path in (Path(own), SHIPPED) if own else (SHIPPED,):
        section = read_yaml(path).get(host)
        if section is None:
            continue
        try:
            found = msgspec.convert(section, _Host)
        except msgspec.ValidationError as error:
            raise InputError(f"{path}: {host}: {error}; prices.yaml shows the shape") from None
        if model in found.models:
            return Price(found.date, found.source, found.models[model], tuple(found.peak_hours))
    return None


@dataclass(frozen=True)
class Amount:
    """Money and tokens; `usd` is None where no price is known."""

    usd: float | None
    tokens: int

    def __add__(self, other: Amount) -> Amount:
        usd = None if self.usd is None or other.usd is None else self.usd + other.usd
        return Amount(usd, self.tokens + other.tokens)


NOTHING = Amount(0.0, 0)


class Ledger:
    """The cost of the requests in one file, over all runs: as reported, or else the maximum.

    `limits` are those of `LIMITS`; None is without limit.
    """

    def __init__(self, path: Path, limits: Mapping[str, float | None] | None = None) -> None:
        self.path, self.limits = path, limits or {}
        self.requests = self.unsure_requests = 0
        self.told = self.unsure = NOTHING
        self.reserved: dict[int, Amount] = {}
        self.answers: dict[str, Row] = {}  # of an earlier run, by key
        self._sent, self._synced = 0, -SYNC_SECONDS
        self._lines = JsonLines(path)
        for line in read_rows(path):
            self._sent = max(self._sent, line["request"])
            amount = Amount(line["usd"], line["tokens"])
            if "outcome" not in line:
                self.requests += 1
                self.reserved[line["request"]] = amount
                continue
            self._book(line["request"], amount, line["told"])
            if line.get("answer"):
                self.answers[line["key"]] = line["answer"]
        for number, worst in list(self.reserved.items()):  # a killed run never heard of these
            self._book(number, worst, told=False)

    @property
    def spent(self) -> Amount:
        """Return what all requests cost at most, those under way left out."""
        return self.told + self.unsure

    def forbids(self, worst: Amount) -> str | None:
        """Return the limit that one more request might break; None when there is none."""
        spent = self._by_limit(sum(self.reserved.values(), self.spent) + worst, 1)
        limits = ((name, self.limits.get(name)) for name in LIMITS)
        over = (name for name, most in limits if most and spent[name] > most + ROUNDING)
        return next(over, None)

    def _by_limit(self, total: Amount, more: int = 0) -> dict[str, float]:
        money = math.inf if total.usd is None else total.usd
        return dict(zip(LIMITS, (money, total.tokens, self.requests + more), strict=True))

    def stop_message(self, limit: str) -> str:
        """Return which limit ended the run, what was spent, and how to continue."""
        spent = self._by_limit(self.spent)[limit]
        return (
            f"by {limit} ({self.limits[limit]:,}): {usd(spent) if limit == 'max_usd' else spent} "
            "spent, and one more request could exceed it. Every answer so far is kept; raise "
            f"{limit} and run the same command to continue"
        )

    def send(self, key: str, worst: Amount) -> int:
        """Record that a request is about to be sent; return its number."""
        self._sent += 1
        line: Row = {"request": self._sent, "key": key} | asdict(worst)
        line["sent"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._lines.append(line)
        self.requests += 1
        self.reserved[self._sent] = worst
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self._lines.sync()
            self._synced = time.monotonic()
        return self._sent

    def settle(
        self, number: int, key: str, outcome: str, paid: Amount | None, answer: Row | None = None
    ) -> None:
        """Record the outcome of a request; `paid` is None when its cost is unknown."""
        amount = self.reserved[number] if paid is None else paid
        line: Row = {"request": number, "key": key, "outcome": outcome} | asdict(amount)
        line["told"] = paid is not None
        self._lines.append(line | {"answer": answer} if answer else line)
        self._book(number, amount, told=paid is not None)

    def _book(self, number: int, amount: Amount, told: bool) -> None:
        self.reserved.pop(number, None)
        if told:
            self.told += amount
        else:
            self.unsure += amount
            self.unsure_requests += 1

    def summary(self) -> Row:
        """Return what was spent, for a manifest: money is None where no price is known."""
        return {
            "requests": self.requests,
            "tokens": self.told.tokens,
            "usd": self.told.usd,
            "untold_requests": self.unsure_requests,
            "untold_usd_at_most": self.unsure.usd,
        }

    def forget_answers(self) -> None:
        """Drop the answers once they are in samples.jsonl or were deliberately left out."""
        self._lines.close()
        lines = read_rows(self.path)
        write_rows(self.path, ({k: v for k, v in line.items() if k != "answer"} for line in lines))
        self._lines = JsonLines(self.path)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.close()
