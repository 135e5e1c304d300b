"""Plot training curves with matplotlib, each as an SVG image for a light and for a dark page.

Only numbers are drawn: every text that a user or a model may have written is left to the template,
which escapes it.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from chainforge.core.jsonl import Row
from chainforge.report.formatting import finite, number, percent

WIDTH, HEIGHT = 340, 190  # in points
MOST_POINTS = 240  # more than a plot of this width can show
STYLES = Path(__file__).with_name("page.css")
SCHEMES = ("light", "dark")
COLOURS = 6
DASHES = ("-", (0, (6, 3)), (0, (2, 3)), (0, (9, 3, 2, 3)), (0, (4, 2)), (0, (1, 4)))
RL = ("reward", "eval_reward", "eval_accuracy")
REWARDS = re.compile(r"rewards/(.+)/mean")

# Title, note, whether values are shares, and the labels of logged names.
Wanted = tuple[str, str, bool, dict[str, str]]
LOSS = {"loss": "training", "eval_loss": "held out"}
TOKEN_ACCURACY = {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "held out"}
OF_LOSSES: list[Wanted] = [
    ("Loss", "mean over tokens", False, LOSS),
    ("Token accuracy", "next tokens that were right", True, TOKEN_ACCURACY),
]
REWARD = {"reward": "training", "eval_reward": "held out"}
ACCURACY = {"accuracy": "rollouts", "eval_accuracy": "held out"}
NO_SPREAD = {"frac_zero_advantage": ""}  # our own count: rounding makes TRL's miss groups
OF_RL: list[Wanted] = [
    ("Reward", "weighted sum", False, REWARD),
    ("Accuracy", "strict", True, ACCURACY),
    ("Reward by function", "before weights", False, {}),
    ("Completion length", "tokens", False, {"completions/mean_length": ""}),
    ("Entropy", "nats a token", False, {"entropy": ""}),
    ("KL to the reference", "nats a token", False, {"kl": ""}),
    ("Groups without spread", "prompts whose completions scored alike", True, NO_SPREAD),
    ("Truncated", "completions cut at the length limit", True, {"completions/clipped_ratio": ""}),
]

Line = tuple[Sequence[float], Sequence[float]]  # steps, values


@dataclass(frozen=True)
class Alarm:
    """What a health rule found while a stage trained; `level` is warn or stop."""

    number: int
    step: float
    rule: str
    level: str
    seen: str
    means: str = ""
    change: str = ""


@dataclass(frozen=True)
class Plot:
    """A plot to put into a page: its images by colour scheme, and each line's label and course."""

    title: str
    note: str
    images: dict[str, str]
    lines: list[tuple[str, str]]
    alarms: list[Alarm]


def training_plots(metrics: list[Row], alarms: Sequence[Alarm] = ()) -> list[Plot]:
    """Plot what a trainer logged: rewards and their health for RL, losses otherwise.

    An alarm is marked in the plots of the numbers that it names, or in all if it names none.
    """
    series = _series(metrics)
    rewards = {key: m[1] for key in sorted(series) if (m := REWARDS.fullmatch(key))}
    wanted = OF_RL if any(key in series for key in RL) else OF_LOSSES
    drawn = series.keys() & (rewards.keys() | {key for entry in wanted for key in entry[3]})
    plots = []
    for title, note, shares, names in wanted:
        labels = {key: label for key, label in (names or rewards).items() if key in series}
        if not labels:
            continue
        shown = [a for a in alarms if not (named := _named(a, drawn)) or named & labels.keys()]
        lines = tuple((tuple(series[key][0]), tuple(series[key][1])) for key in labels)
        images = {scheme: _draw(lines, shares, tuple(shown), scheme) for scheme in SCHEMES}
        courses = [(label, _course(series[key][1], shares)) for key, label in labels.items()]
        plots.append(Plot(title, note, images, courses, shown))
    return plots


def alarms_of(health: list[Row]) -> list[Alarm]:
    """Read `health.jsonl`: what was seen, what it means, what to change."""
    found: list[Alarm] = []
    for row in health:
        if (step := finite(row.get("step"))) is not None:
            level = "stop" if row.get("action") == "stop" else "warn"
            rule, *more = (str(row.get(key) or "") for key in ("rule", "seen", "means", "change"))
            found.append(Alarm(len(found) + 1, step, rule, level, *more))
    return found


def _named(alarm: Alarm, keys: set[str]) -> set[str]:
    """Return which of the logged numbers an alarm names."""
    return {k for k in keys if re.search(rf"(?<![\w/]){re.escape(k)}(?![\w/])", alarm.seen)}


def _series(metrics: list[Row]) -> dict[str, tuple[list[float], list[float]]]:
    """Return each logged name's steps and values, without what is not a finite number."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in metrics:
        if (step := finite(row.get("step"))) is None:
            continue
        for key, value in row.items():
            logged = finite(value)
            if key != "step" and logged is not None and abs(logged) < 1e100:
                steps, values = series.setdefault(key, ([], []))
                steps.append(step)
                values.append(logged)
    return series


def _course(values: Sequence[float], shares: bool) -> str:
    """Return a number at the start and at the end, each the mean of a tenth of the run."""
    tenth = max(1, len(values) // 10)
    write = percent if shares else number
    return f"{write(fmean(values[:tenth]))} → {write(fmean(values[-tenth:]))}"


@lru_cache(maxsize=512)  # a chain writes its report at each stage, most of it as before
def _draw(lines: tuple[Line, ...], shares: bool, alarms: tuple[Alarm, ...], scheme: str) -> str:
    """Draw lines, and a numbered mark for each alarm; return a `data:` address of the image."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    colours = _colours(scheme)
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), facecolor="none")
    axes = figure.add_axes((46 / WIDTH, 24 / HEIGHT, (WIDTH - 64) / WIDTH, (HEIGHT - 46) / HEIGHT))
    axes.set_frame_on(False)
    axes.grid(axis="y", color=colours["line"], linewidth=1)
    axes.tick_params(length=0, labelsize=10, labelcolor=colours["soft"])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    for place, line in enumerate(lines):
        _draw_line(axes, line, colours[f"c{place % COLOURS}"], DASHES[place % COLOURS], len(lines))
    if shares:
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0), min(high, 1))
    _draw_alarms(axes, alarms, colours)
    out = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": ""}):
        figure.savefig(out, format="svg", metadata=nothing)
    return f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"


def _draw_line(axes: Any, line: Line, colour: str, dash: Any, of: int) -> None:
    """Draw one line: its moving mean and, if it is alone, what was logged."""
    size = math.ceil(len(line[0]) / MOST_POINTS)
    xs, ys = ([fmean(v[i : i + size]) for i in range(0, len(v), size)] for v in line)
    half = len(ys) // 24 + 1 if len(ys) >= 20 else 0
    smooth = [fmean(ys[max(0, i - half) : i + half + 1]) for i in range(len(ys))]
    style: dict[str, Any] = {"color": colour, "clip_on": False}
    if of == 1 and half:  # several noisy lines over one another hide each other
        axes.plot(xs, ys, linewidth=1, alpha=0.3, **style)
    if len(xs) == 1:
        axes.plot(xs, ys, "o", **style)
    else:
        axes.plot(xs, smooth, linewidth=1.8, linestyle=dash, **style)


def _draw_alarms(axes: Any, alarms: Sequence[Alarm], colours: dict[str, str]) -> None:
    low, high = axes.get_xlim()
    top = axes.get_xaxis_transform()
    for alarm in alarms:
        at = min(max(alarm.step, low), high)
        colour = colours["bad" if alarm.level == "stop" else "warn"]
        mark = {"boxstyle": "circle,pad=0.25", "color": colour}
        dotted: dict[str, Any] = {"linewidth": 1.2, "linestyle": ":", "clip_on": False}
        axes.plot([at, at], [0, 1.03], color=colour, transform=top, scaley=False, **dotted)
        text = axes.text(at, 1.07, str(alarm.number), transform=top, color=colours["card"], size=8)
        text.set(weight="bold", ha="center", va="center", parse_math=False, bbox=mark)


def _colours(scheme: str) -> dict[str, str]:
    """Return the page's colours by name: its style has those of each scheme in turn."""
    parts = re.findall(r":root \{(.*?)\}", STYLES.read_text(encoding="utf-8"), re.DOTALL)
    return dict(re.findall(r"--(\w+): (#\w+)", parts[SCHEMES.index(scheme)]))
