"""Lay out the report's drawings: numbers in, coordinates out.

The template draws them as inline SVG, so that all text passes through its escaping, and the
style sheet colours them, so that they follow light, dark and print.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from chainforge.core.records import Row

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 8, 26
MOST_POINTS = 240  # more than a plot of this width can show
COLOURS = 6  # that the style sheet has


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in the drawing's units, and what stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """One series: smoothed, as it was (where that can be drawn), and from where to where."""

    label: str
    colour: int
    smooth: str
    raw: str
    course: str


@dataclass(frozen=True)
class Plot:
    """A line plot, ready to draw."""

    title: str
    note: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True)
class _Frame:
    """The span of steps and values that a plot shows."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + (WIDTH - LEFT - RIGHT) * share, 1)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - share), 1)

    def path(self, xs: list[float], ys: list[float]) -> str:
        points = [f"{self.x(x)},{self.y(y)}" for x, y in zip(xs, ys, strict=True)]
        # A line of one point draws nothing; of two equal ones, a dot.
        return " ".join(points * 2 if len(points) == 1 else points)


Series = tuple[str, list[float], list[float]]  # label, steps, values


def training_plots(metrics: list[Row]) -> list[Plot]:
    """Plot what a trainer logged: rewards and their health for RL, losses otherwise."""
    series = _collect(metrics)
    if "reward" in series:
        # Our own count, where the stage kept it: TRL's misses groups for rounding.
        alike = "groups/alike" if "groups/alike" in series else "frac_reward_zero_std"
        functions = {
            key: match[1]
            for key in sorted(series)
            if (match := re.fullmatch(r"rewards/(.+)/mean", key))
        }
        wanted = [
            ("Reward", "weighted sum", _number, {"reward": "training", "eval_reward": "held out"}),
            ("Held-out accuracy", "strict", _percent, {"eval_accuracy": ""}),
            ("Reward by function", "before weights", _number, functions),
            ("Completion length", "tokens", _number, {"completions/mean_length": ""}),
            ("Entropy", "nats a token", _number, {"entropy": ""}),
            ("KL to the reference", "nats a token", _number, {"kl": ""}),
            (
                "Groups without spread",
                "prompts whose completions all scored alike",
                _percent,
                {alike: ""},
            ),
            (
                "Truncated",
                "completions cut at the length limit",
                _percent,
                {"completions/clipped_ratio": ""},
            ),
        ]
    else:
        wanted = [
            ("Loss", "mean over tokens", _number, {"loss": "training", "eval_loss": "held out"}),
            (
                "Token accuracy",
                "next tokens that were right",
                _percent,
                {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "held out"},
            ),
        ]
    plots = []
    for title, note, write, labels in wanted:
        lines = [(label, *series[key]) for key, label in labels.items() if key in series]
        if lines:
            plots.append(_plot(title, note, write, lines))
    return plots


def _collect(metrics: list[Row]) -> dict[str, tuple[list[float], list[float]]]:
    """Gather each logged name's steps and values; what is no finite number is left out."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in metrics:
        step = row.get("step")
        if not _finite(step):
            continue
        for key, value in row.items():
            if key != "step" and _finite(value):
                steps, values = series.setdefault(key, ([], []))
                steps.append(float(step))  # type: ignore[arg-type]
                values.append(float(value))
    return series


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plot(title: str, note: str, write: Callable[[float], str], series: list[Series]) -> Plot:
    """Scale the series to one frame and smooth what is long."""
    courses = [" → ".join(write(_mean(part)) for part in _ends(ys)) for _, _, ys in series]
    series = [(label, *_thin(xs, ys)) for label, xs, ys in series]
    x_low, x_high = _span(x for _, xs, _ in series for x in xs)
    y_low, y_high = _span(y for _, _, ys in series for y in ys)
    if 0 < y_low < 0.6 * y_high:  # near enough to zero to show it
        y_low = 0.0
    frame = _Frame(x_low, x_high, y_low, y_high)
    return Plot(
        title=title,
        note=note,
        lines=[
            Line(
                label=label,
                colour=index % COLOURS,
                smooth=frame.path(xs, _smooth(ys)),
                # Several noisy lines over one another hide each other.
                raw=frame.path(xs, ys) if len(series) == 1 and _window(ys) > 1 else "",
                course=courses[index],
            )
            for index, (label, xs, ys) in enumerate(series)
        ],
        x_ticks=[Tick(frame.x(at), _number(at)) for at in _round_numbers(x_low, x_high)],
        y_ticks=[Tick(frame.y(at), write(at)) for at in _round_numbers(y_low, y_high)],
    )


def course(metrics: list[Row], key: str) -> tuple[float, float] | None:
    """Return a logged number at the start and at the end, each the mean of a tenth of the run."""
    values = _collect(metrics).get(key, ([], []))[1]
    if not values:
        return None
    start, end = _ends(values)
    return _mean(start), _mean(end)


def _ends(values: list[float]) -> tuple[list[float], list[float]]:
    tenth = max(1, len(values) // 10)
    return values[:tenth], values[-tenth:]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _thin(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """Average neighbours until the line has no more points than the drawing can show."""
    size = math.ceil(len(xs) / MOST_POINTS)
    parts = range(0, len(xs), size)
    return [_mean(xs[i : i + size]) for i in parts], [_mean(ys[i : i + size]) for i in parts]


def _window(ys: list[float]) -> int:
    """Return over how many points to smooth: none for short lines."""
    return 1 if len(ys) < 20 else 2 * (len(ys) // 24) + 3


def _smooth(ys: list[float]) -> list[float]:
    """Return the centred moving mean, over fewer points at the ends."""
    half = _window(ys) // 2
    return [_mean(ys[max(0, i - half) : i + half + 1]) for i in range(len(ys))]


def _span(values: Iterable[float]) -> tuple[float, float]:
    """Return lowest and highest, moved apart when they are one."""
    found = list(values)
    low, high = min(found), max(found)
    if high - low > 1e-9 * max(abs(low), abs(high), 1e-9):
        return low, high
    if low == 0:
        return 0.0, 1.0
    return low - abs(low) / 2, high + abs(high) / 2


def _round_numbers(low: float, high: float) -> list[float]:
    """Return two to six round numbers between the ends."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %" if 0 < abs(value) < 0.1 else f"{100 * value:.0f} %"


def _number(value: float) -> str:
    """Write a number in at most four digits or so: 12,000, 0.25, −0.003, 2e-05."""
    if value == 0 or abs(value) < 1e-12:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        text = f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    elif size >= 100:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "−")
