"""Scale series of numbers to a drawing: a frame, round ticks, and lines short enough to draw."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 8, 26
MOST_POINTS = 240  # more than a plot of this width can show


@dataclass(frozen=True)
class Frame:
    """The span of steps and values that a plot shows."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        """Return where a step is, in the drawing's units."""
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + (WIDTH - LEFT - RIGHT) * share, 1)

    def y(self, value: float) -> float:
        """Return where a value is, in the drawing's units."""
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - share), 1)

    def path(self, xs: list[float], ys: list[float]) -> str:
        """Return a line's points, as SVG has them."""
        points = [f"{self.x(x)},{self.y(y)}" for x, y in zip(xs, ys, strict=True)]
        # A line of one point draws nothing; of two equal ones, a dot.
        return " ".join(points * 2 if len(points) == 1 else points)


def ends(values: list[float]) -> tuple[list[float], list[float]]:
    """Return the first and the last tenth."""
    tenth = max(1, len(values) // 10)
    return values[:tenth], values[-tenth:]


def mean(values: list[float]) -> float:
    """Return the mean."""
    return math.fsum(values) / len(values)


def thin(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """Average neighbours until the line has no more points than the drawing can show."""
    size = math.ceil(len(xs) / MOST_POINTS)
    parts = range(0, len(xs), size)
    return [mean(xs[i : i + size]) for i in parts], [mean(ys[i : i + size]) for i in parts]


def window(ys: list[float]) -> int:
    """Return over how many points to smooth: none for short lines."""
    return 1 if len(ys) < 20 else 2 * (len(ys) // 24) + 3


def smooth(ys: list[float]) -> list[float]:
    """Return the centred moving mean, over fewer points at the ends."""
    half = window(ys) // 2
    return [mean(ys[max(0, i - half) : i + half + 1]) for i in range(len(ys))]


def span(values: Iterable[float]) -> tuple[float, float]:
    """Return lowest and highest, moved apart when they are one."""
    found = list(values)
    low, high = min(found), max(found)
    if high - low > 1e-9 * max(abs(low), abs(high), 1e-9):
        return low, high
    if low == 0:
        return 0.0, 1.0
    return low - abs(low) / 2, high + abs(high) / 2


def round_numbers(low: float, high: float) -> list[float]:
    """Return two to six round numbers between the ends."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def percent(value: float) -> str:
    """Write a share in as few digits as an axis needs: 25 %, 0.5 %."""
    if 0.99 < value < 1:
        return f"{100 * value:.1f} %"
    return f"{100 * value:.2g} %" if 0 < abs(value) < 0.1 else f"{100 * value:.0f} %"


def number(value: float) -> str:
    """Write a number in at most four digits or so: 12,000, 0.25, −0.003, 2e-05."""
    if value == 0 or abs(value) < 1e-12:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        text = f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    elif size >= 100:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "−")
