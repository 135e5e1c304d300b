"""Where the numbers of a training log stand, and where they stood before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """What is seen, with numbers and steps; what it usually means; which key to change."""

    seen: str
    means: str
    change: str


@dataclass(frozen=True)
class Span:
    """The mean of a number over some rows, and their steps."""

    mean: float
    first: int
    last: int

    def __str__(self) -> str:
        steps = (
            f"step {self.first}" if self.first == self.last else f"steps {self.first}-{self.last}"
        )
        return f"{self.mean:.3g} ({steps})"


def values_of(history: History, key: str) -> list[tuple[int, float]]:
    """Return the steps and values of a number, where it was logged."""
    return [(row["step"], row[key]) for row in history if row.get(key) is not None]


def latest(history: History, key: str, window: int) -> Span | None:
    """Return the mean of the last `window` values; None while there are fewer."""
    values = values_of(history, key)[-window:]
    return mean_of(values) if len(values) == window else None


def course(history: History, key: str, window: int) -> tuple[Span, Span] | None:
    """Return the means of the first and of the last `window` values; None while they overlap."""
    values = values_of(history, key)
    if len(values) < 2 * window:
        return None
    return mean_of(values[:window]), mean_of(values[-window:])


def mean_of(values: list[tuple[int, float]]) -> Span:
    """Return the mean of some values, and where they are from."""
    mean = sum(value for _, value in values) / len(values)
    return Span(mean, values[0][0], values[-1][0])
