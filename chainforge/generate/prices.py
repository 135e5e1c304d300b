"""What an answer costs, from a dated table that a user may override.

A model that is in no table has an unknown price: its cost is None, and never 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from datetime import date as Day
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.yaml12 import read_yaml

SHIPPED = Path(__file__).with_name("prices.yaml")
MILLION = 1_000_000
KINDS = ("cache_hit", "cache_miss", "output")
SECTION_KEYS = ("date", "source", "peak_hours", "holidays", "models")
_HOURS = re.compile(r"([01]\d|2[0-4]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")


@dataclass(frozen=True)
class Rates:
    """USD per million tokens: input that was cached, input that was not, and output."""

    cache_hit: float
    cache_miss: float
    output: float

    def cost(self, hit: int, miss: int, output: int) -> float:
        """Return USD for so many tokens."""
        total = hit * self.cache_hit + miss * self.cache_miss + output * self.output
        return total / MILLION


@dataclass(frozen=True)
class Price:
    """What one model costs: off-peak, at peak hours, and when those are."""

    date: str
    source: str
    off_peak: Rates
    peak: Rates
    peak_minutes: tuple[tuple[int, int], ...] = ()  # of the day, UTC
    holidays: frozenset[Day] = frozenset()

    def is_peak(self, moment: datetime) -> bool:
        """True in peak hours, which are on working days."""
        moment = moment.astimezone(UTC)
        minute = 60 * moment.hour + moment.minute
        working = moment.weekday() < 5 and moment.date() not in self.holidays
        return working and any(start <= minute < end for start, end in self.peak_minutes)

    def cost(self, usage: Any, *moments: datetime) -> float | None:
        """Return USD for an answer's `usage`; None where it does not say enough.

        Of the moments at which a request was sent and answered, the dearer one counts: a
        provider's page does not say which does.
        """
        counts = token_counts(usage)
        if counts is None:
            return None
        rates = (self.peak if self.is_peak(moment) else self.off_peak for moment in moments)
        return max(rate.cost(*counts) for rate in rates)

    def worst(self, prompt: int, completion: int) -> float:
        """Return the most that so many tokens can cost at any hour."""
        return max(rate.cost(0, prompt, completion) for rate in (self.peak, self.off_peak))


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
    assert prompt is not None  # for the type checker, as the next
    assert output is not None
    total = usage.get("total_tokens")
    output = max(output, total - prompt) if type(total) is int else output
    return min(hit, prompt), prompt - min(hit, prompt), output


def find_price(host: str, model: str, own: str | None = None) -> Price | None:
    """Return the price of a model at a host, the user's table before the shipped one."""
    for path in (Path(own), SHIPPED) if own else (SHIPPED,):
        table = read_yaml(path)
        for name, section in table.items():
            if not isinstance(section, dict) or not isinstance(section.get("models"), dict):
                raise InputError(f"{path}: {name}: expected a host with date, source and models")
            if unknown := [key for key in section if key not in SECTION_KEYS]:
                raise InputError(f"{path}: {name}: unknown key {unknown[0]!r}")
        section = table.get(host)
        if section is not None and model in section["models"]:
            return _price(section, section["models"][model], f"{path}: {host}: {model}")
    return None


def _price(section: dict[str, Any], entry: Any, where: str) -> Price:
    if not isinstance(entry, dict) or section.get("date") is None:
        raise InputError(f"{where}: expected the prices {', '.join(KINDS)}, under a dated host")
    try:
        holidays = frozenset(Day.fromisoformat(day) for day in section.get("holidays") or [])
    except (TypeError, ValueError):
        raise InputError(f"{where}: holidays: expected dates such as 2026-10-01") from None
    off_peak = _rates(entry, where)
    return Price(
        date=str(section["date"]),
        source=str(section.get("source") or ""),
        off_peak=off_peak,
        peak=_rates(entry["peak"], f"{where}: peak") if "peak" in entry else off_peak,
        peak_minutes=tuple(_minutes(text, where) for text in section.get("peak_hours") or []),
        holidays=holidays,
    )


def _rates(entry: Any, where: str) -> Rates:
    values: list[float] = []
    for kind in KINDS:
        value = entry.get(kind) if isinstance(entry, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise InputError(f"{where}: {kind}: expected USD per million tokens, found {value!r}")
        values.append(float(value))
    return Rates(*values)


def _minutes(text: Any, where: str) -> tuple[int, int]:
    match = _HOURS.fullmatch(str(text))
    if match is None:
        raise InputError(f"{where}: peak_hours: expected UTC such as 01:00-04:00, found {text!r}")
    a, b, c, d = map(int, match.groups())
    return 60 * a + b, 60 * c + d
