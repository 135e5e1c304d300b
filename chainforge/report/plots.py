"""Plot training curves with matplotlib, as SVG that follows the page's light and dark colours.

Only numbers are drawn: every text that a user or a model may have written is left to the template,
which escapes it. Colours are written as placeholders and replaced by the page's CSS variables.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from chainforge.core.jsonl import Row
from chainforge.report.formatting import MINUS
from chainforge.report.transcripts import finite

WIDTH, HEIGHT = 340, 190  # in points, which are the units of the SVG
MOST_POINTS = 240  # more than a plot of this width can show
COLOURS = {f"#a0b0c{number}": f"var(--c{number})" for number in range(6)} | {
    "#a0b0d0": "var(--soft)", "#a0b0d1": "var(--line)", "#a0b0d2": "var(--warn)",
    "#a0b0d3": "var(--bad)", "#a0b0d4": "var(--card)",
}  # fmt: skip
LINES, SOFT, GRID, WARN, STOP, CARD = list(COLOURS)[:6], *list(COLOURS)[6:]
DASHES = ["-", (0, (6, 3)), (0, (2, 3)), (0, (9, 3, 2, 3)), (0, (4, 2)), (0, (1, 4))]
RL = ("reward", "eval_reward", "eval_accuracy")
ENDS = "evaluated"  # no logged name

Series = dict[str, tuple[list[float], list[float]]]  # by logged name: steps, values
Format = Callable[[float], str]


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
    """A plot to put into a page: the inside of an SVG, and each line's label, colour and course."""

    title: str
    note: str
    drawing: Markup
    lines: list[tuple[str, int, str]]
    alarms: list[Alarm]


def percent(value: float) -> str:
    """Format a share in as few digits as an axis needs: 25 %, 0.5 %."""
    return f"{100 * value:.2g} %" if 0 < abs(value) < 0.1 else f"{100 * value:.0f} %"


def number(value: float) -> str:
    """Format a number in at most four digits or so: 12,000, 0.25, −0.003, 2e-05."""
    text = f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("-", MINUS)


# Title, note, how to write a value, and logged names with labels.
PLOTS_OF_RL: list[tuple[str, str, Format, dict[str, str]]] = [
    ("Reward", "weighted sum", number, {"reward": "training", "eval_reward": "held out"}),
    ("Accuracy", "strict", percent, {"accuracy": "rollouts", "eval_accuracy": "held out",
                                     ENDS: "held out, as evaluated"}),
    ("Reward by function", "before weights", number, {}),
    ("Completion length", "tokens", number, {"completions/mean_length": ""}),
    ("Entropy", "nats a token", number, {"entropy": ""}),
    ("KL to the reference", "nats a token", number, {"kl": ""}),
    ("Groups without spread", "prompts whose completions scored alike", percent,
     {"frac_reward_zero_std": ""}),
    ("Truncated", "completions cut at the length limit", percent,
     {"completions/clipped_ratio": ""}),
]  # fmt: skip
PLOTS_OF_LOSSES: list[tuple[str, str, Format, dict[str, str]]] = [
    ("Loss", "mean over tokens", number, {"loss": "training", "eval_loss": "held out"}),
    ("Token accuracy", "next tokens that were right", percent,
     {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "held out"}),
]  # fmt: skip


def training_plots(
    metrics: list[Row], alarms: Sequence[Alarm] = (), ends: tuple[float, float] | None = None
) -> list[Plot]:
    """Plot what a trainer logged: rewards and their health for RL, losses otherwise.

    An alarm is marked in the plots of the numbers that it names, or in all if it names none.
    `ends` is the accuracy of the models before and after, as an evaluation found it.
    """
    series = _collect(metrics)
    if "frac_zero_advantage" in series:  # our own count: rounding makes TRL's miss groups
        series["frac_reward_zero_std"] = series["frac_zero_advantage"]
    if ends and "accuracy" in series:
        series[ENDS] = ([0.0, max(series["accuracy"][0])], list(ends))
    rl = any(key in series for key in RL)
    rewards = {k: m[1] for k in sorted(series) if (m := re.fullmatch(r"rewards/(.+)/mean", k))}
    plots = []
    wanted = PLOTS_OF_RL if rl else PLOTS_OF_LOSSES
    drawn = series.keys() & (rewards.keys() | {key for entry in wanted for key in entry[3]})
    for title, note, write, names in wanted:
        labels = names or rewards
        keys = [key for key in labels if key in series]
        if not keys:
            continue
        shown = [a for a in alarms if not (named := _named(a, drawn)) or named & set(keys)]
        lines = [(labels[k], i % 6, _course(series[k][1], write)) for i, k in enumerate(keys)]
        drawing = _draw([series[key] for key in keys], write, shown)
        plots.append(Plot(title, note, drawing, lines, shown))
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


def _collect(metrics: list[Row]) -> Series:
    """Gather each logged name's steps and values; what is not a finite number is left out."""
    series: Series = {}
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


def _course(values: list[float], write: Format) -> str:
    """Return a number at the start and at the end, each the mean of a tenth of the run."""
    tenth = max(1, len(values) // 10)
    return f"{write(_mean(values[:tenth]))} → {write(_mean(values[-tenth:]))}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(value / len(values) for value in values)


def _draw(
    lines: list[tuple[list[float], list[float]]], write: Format, alarms: list[Alarm]
) -> Markup:
    """Draw lines, and a numbered mark for each alarm; return the inside of the SVG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
    axes = figure.add_axes((46 / WIDTH, 24 / HEIGHT, (WIDTH - 64) / WIDTH, (HEIGHT - 46) / HEIGHT))
    axes.set_frame_on(False)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.tick_params(length=0, labelsize=9, labelcolor=SOFT)
    for axis, form in ((axes.xaxis, number), (axes.yaxis, write)):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(FuncFormatter(lambda value, _, form=form: form(value)))
    for place, (xs, ys) in enumerate(lines):
        size = math.ceil(len(xs) / MOST_POINTS)
        xs, ys = ([_mean(v[i : i + size]) for i in range(0, len(v), size)] for v in (xs, ys))
        half = len(ys) // 24 + 1 if len(ys) >= 20 else 0
        smooth = [_mean(ys[max(0, i - half) : i + half + 1]) for i in range(len(ys))]
        style: dict[str, Any] = {"color": LINES[place % 6], "clip_on": False}
        if len(lines) == 1 and half:  # several noisy lines over one another hide each other
            axes.plot(xs, ys, linewidth=1, alpha=0.3, **style)
        if len(xs) == 1:  # a line of no length draws its round ends: a dot
            axes.plot(xs * 2, ys * 2, linewidth=6, solid_capstyle="round", **style)
        else:
            axes.plot(xs, smooth, linewidth=1.8, linestyle=DASHES[place % 6], **style)
    if write is percent:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(high, 1.02))
    low, high = axes.get_xlim()
    top = axes.get_xaxis_transform()
    for alarm in alarms:
        colour, at = STOP if alarm.level == "stop" else WARN, min(max(alarm.step, low), high)
        axes.plot([at, at], [0, 1.03], transform=top, color=colour, linewidth=1.2, linestyle=":",
                  clip_on=False, scalex=False, scaley=False)  # fmt: skip
        axes.text(at, 1.07, str(alarm.number), transform=top, color=CARD, size=8, weight="bold",
                  ha="center", va="center", parse_math=False,
                  bbox={"boxstyle": "circle,pad=0.25", "color": colour})  # fmt: skip
    return _svg(figure)


def _svg(figure: Any) -> Markup:
    """Return the inside of a figure's SVG, with presentation attributes and the page's colours.

    The page's security policy allows no `style` attributes.
    """
    from matplotlib import rc_context

    out = io.StringIO()
    figure.patch.set_visible(False)
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata=nothing)
    inside = re.sub(r"(?s)^.*?<svg[^>]*>|</svg>\s*$|<metadata>.*?</metadata>|<!--.*?-->"
                    r"|<defs>.*?</defs>|<g/>", "", out.getvalue())  # fmt: skip
    inside = re.sub(r' (?:id|clip-path|xmlns\S*)="[^"]*"', "", inside)
    inside = re.sub(r' style="([^"]*)"', lambda match: _attributes(match[1]), inside)
    for placeholder, colour in COLOURS.items():
        inside = inside.replace(placeholder, colour)
    return Markup(inside)


def _attributes(style: str) -> str:
    """Return CSS declarations as presentation attributes."""
    found = []
    for declaration in style.replace("&quot;", "'").split(";"):
        name, colon, value = declaration.strip().partition(": ")
        if name == "font":  # a shorthand has no attribute: `bold 8px 'DejaVu Sans', ...`
            size = re.search(r"([\d.]+)px", value)
            found.append(f'font-size="{size[1] if size else 9}"')
            found += ['font-weight="700"'] if value.startswith("bold") else []
        elif colon and name != "font-family":  # the page's own
            found.append(f'{name}="{value}"')
    return " " + " ".join(found)
