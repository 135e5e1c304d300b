"""Money and tokens: prices, the ledger of every request, and the estimate of a dry run.

`requests.jsonl` has a line for a request about to be sent, with the most that it can cost, and one
for its outcome, with the answer. So a killed run knows what it sent. A request without an outcome,
or without a known cost, counts in full. The file is forced to disk before a request is sent, unless
that was done less than `SYNC_SECONDS` ago: a power cut loses only the requests of that time.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chainforge.core.config import read_yaml
from chainforge.core.disk import to_disk
from chainforge.core.errors import InputError
from chainforge.core.jsonl import JsonLines, Row, read_rows, write_rows

SHIPPED = Path(__file__).with_name("prices.yaml")
MILLION = 1_000_000
KINDS = ("cache_hit", "cache_miss", "output")
SECTION_KEYS = ("date", "source", "peak_hours", "models")
_HOURS = re.compile(r"([01]\d|2[0-4]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")
# Sums of many small prices differ in the last places; a limit of exactly their sum is not passed.
ROUNDING = 1e-9
SYNC_SECONDS = 1.0


def usd(value: float) -> str:
    """Write money: $3.66, and small amounts with more digits: $0.0037."""
    digits = 2 if value == 0 or value >= 0.1 else 4 if value >= 0.001 else 6
    return f"${value:,.{digits}f}"


@dataclass(frozen=True)
class Rates:
    """USD per million tokens: cached input, other input, and output."""

    cache_hit: float
    cache_miss: float
    output: float

    def cost(self, hit: int, miss: int, output: int) -> float:
        """Return USD for these tokens."""
        return (hit * self.cache_hit + miss * self.cache_miss + output * self.output) / MILLION


@dataclass(frozen=True)
class Price:
    """What one model costs: off-peak, at peak hours on working days, and when those are."""

    date: str
    source: str
    off_peak: Rates
    peak: Rates
    peak_minutes: tuple[tuple[int, int], ...] = ()  # of the day, UTC

    def at(self, moment: datetime) -> Rates:
        """Return the rates at a moment."""
        moment = moment.astimezone(UTC)
        minute = 60 * moment.hour + moment.minute
        peak = any(start <= minute < end for start, end in self.peak_minutes)
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
    """Return a usage's tokens: cached input, other input, output; None when it lacks them.

    Some servers count the reasoning in the total only; it is output, too.
    """
    if not isinstance(usage, dict):
        return None
    prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    hit = usage.get("prompt_cache_hit_tokens", cached) or 0
    if not all(type(count) is int and count >= 0 for count in (prompt, output, hit)):
        return None
    assert prompt is not None and output is not None  # noqa: PT018 (for the type checker)
    total = usage.get("total_tokens")
    output = max(output, total - prompt) if type(total) is int else output
    return min(hit, prompt), prompt - min(hit, prompt), output


def find_price(host: str, model: str, own: str | None = None) -> Price | None:
    """Return the price of a model at a host, from the user's table or else the shipped one.

    A model in neither has an unknown price: None, never 0.
    """
    for path in (Path(own), SHIPPED) if own else (SHIPPED,):
        section, where = read_yaml(path).get(host), f"{path}: {host}"
        if section is None:
            continue
        models = section.get("models") if isinstance(section, dict) else None
        if not isinstance(models, dict):
            raise InputError(f"{where}: expected a host with date, source and models")
        if unknown := [key for key in section if key not in SECTION_KEYS]:
            raise InputError(f"{where}: unknown key {unknown[0]!r}")
        if model in models:
            return _price(section, models[model], f"{where}: {model}")
    return None


def _price(section: dict[str, Any], entry: Any, where: str) -> Price:
    if section.get("date") is None:
        raise InputError(f"{where}: expected a date beside the models, such as 2026-11-15")
    minutes = []
    for text in section.get("peak_hours") or []:
        if (match := _HOURS.fullmatch(str(text))) is None:
            raise InputError(
                f"{where}: peak_hours: expected UTC such as 01:00-04:00, found {text!r}"
            )
        a, b, c, d = map(int, match.groups())
        minutes.append((60 * a + b, 60 * c + d))
    off_peak = _rates(entry, where)
    peak = _rates(entry["peak"], f"{where}: peak") if "peak" in entry else off_peak
    source = str(section.get("source") or "")
    return Price(str(section["date"]), source, off_peak, peak, tuple(minutes))


def _rates(entry: Any, where: str) -> Rates:
    values: list[float] = []
    for kind in KINDS:
        value = entry.get(kind) if isinstance(entry, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise InputError(f"{where}: {kind}: expected USD per million tokens, found {value!r}")
        values.append(float(value))
    return Rates(*values)


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

    max_usd: float | None = None
    max_tokens_total: int | None = None
    max_requests: int | None = None


class Ledger:
    """The account of one file, over all runs: what requests cost as told, or else at most."""

    def __init__(self, path: Path, limits: Limits | None = None) -> None:
        self.path, self.limits = path, limits or Limits()
        self.requests = self.unsure_requests = 0
        self.told = self.unsure = NOTHING
        self.reserved: dict[int, Amount] = {}
        self.answers: dict[str, Row] = {}  # of an earlier run, by key
        self._sent, self._synced = 0, -SYNC_SECONDS
        self._lines = JsonLines(path)
        self._recall()

    def _recall(self) -> None:
        """Read what earlier runs sent, and count in full what they never heard of again."""
        for line in read_rows(self.path):
            number, amount = line["request"], Amount(line["usd"], line["tokens"])
            self._sent = max(self._sent, number)
            if "outcome" not in line:
                self.requests += 1
                self.reserved[number] = amount
                continue
            self._book(number, amount, line["told"])
            if line.get("answer"):
                self.answers[line["key"]] = line["answer"]
        for number, worst in list(self.reserved.items()):
            self._book(number, worst, told=False)

    def forbids(self, worst: Amount) -> str | None:
        """Name the limit that one more request might break; None when there is none."""
        spent, limits = sum(self.reserved.values(), self.told + self.unsure) + worst, self.limits
        if limits.max_usd is not None and (
            spent.usd is None or spent.usd > limits.max_usd + ROUNDING
        ):
            return "max_usd"
        if limits.max_tokens_total is not None and spent.tokens > limits.max_tokens_total:
            return "max_tokens_total"
        if limits.max_requests is not None and self.requests >= limits.max_requests:
            return "max_requests"
        return None

    def stop_message(self, limit: str, worst: Amount) -> str:
        """Return which limit ended the run, what was spent, and how to continue."""
        parts = {
            "max_usd": (self.told.usd, self.unsure.usd, worst.usd),
            "max_tokens_total": (self.told.tokens, self.unsure.tokens, worst.tokens),
            "max_requests": (self.requests, 0, 1),
        }[limit]
        spent, unsure, more = (
            usd(part or 0) if limit == "max_usd" else f"{part:,}" for part in parts
        )
        rest = f", and up to {unsure} for {self.unsure_requests} requests of unknown cost"
        return (
            f"by {limit} ({getattr(self.limits, limit):,}): {spent} spent"
            f"{rest if parts[1] else ''}; one more request could take {more}. Every answer so far "
            f"is kept; raise {limit} and run the same command to continue"
        )

    def send(self, key: str, worst: Amount) -> int:
        """Record that a request is about to be sent; return its number."""
        self._sent += 1
        self._lines.append(
            {"request": self._sent, "key": key, "usd": worst.usd, "tokens": worst.tokens,
             "sent": datetime.now(UTC).isoformat(timespec="milliseconds")}
        )  # fmt: skip
        self.requests += 1
        self.reserved[self._sent] = worst
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self._lines.sync()
            if self._synced < 0:
                to_disk(self.path.parent)  # the file's name, too
            self._synced = time.monotonic()
        return self._sent

    def settle(
        self, number: int, key: str, outcome: str, paid: Amount | None, answer: Row | None = None
    ) -> None:
        """Record the outcome of a request; `paid` is None when its cost is unknown."""
        amount = self.reserved[number] if paid is None else paid
        line: Row = {"request": number, "key": key, "outcome": outcome, "usd": amount.usd,
                     "tokens": amount.tokens, "told": paid is not None}  # fmt: skip
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
        """Drop the answers once they are in samples.jsonl, or nowhere by decision."""
        self._lines.close()
        lines = read_rows(self.path)
        write_rows(self.path, ({k: v for k, v in line.items() if k != "answer"} for line in lines))
        self._lines = JsonLines(self.path)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.close()
