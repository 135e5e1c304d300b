"""Lay out the report's training curves: logs in, coordinates out, with warnings where they arose.

The template draws them as inline SVG, so that all text passes through its escaping, and the
style sheet colours them, so that they follow light, dark and print.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from chainforge.core.jsonl import Row
from chainforge.report import axes
from chainforge.report.axes import Frame, number, percent
from chainforge.report.rows import finite

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
    lone: bool  # one point only
    dots: list[tuple[float, float]] = field(default_factory=list)  # instead of a line


@dataclass(frozen=True)
class Alarm:
    """What a rule of health found while a stage trained; `level` is what followed of it."""

    number: int
    step: float
    rule: str
    level: str
    seen: str
    means: str = ""
    change: str = ""


@dataclass(frozen=True)
class Mark:
    """Where an alarm's step is in a plot."""

    at: float
    alarm: Alarm


@dataclass(frozen=True)
class Plot:
    """A line plot, ready to draw."""

    title: str
    note: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark] = field(default_factory=list)


Series = dict[str, tuple[list[float], list[float]]]  # by logged name: steps, values
# What a plot shows: title, note, how to write a value, and each logged name with its label.
Wanted = tuple[str, str, Callable[[float], str], dict[str, str]]
ENDS = "evaluated"  # no logged name
RL = ("reward", "eval_reward", "eval_accuracy")


def training_plots(
    metrics: list[Row], alarms: Sequence[Alarm] = (), ends: tuple[float, float] | None = None
) -> list[Plot]:
    """Plot what a trainer logged: rewards and their health for RL, losses otherwise.

    An alarm is marked in the plots of the numbers that it names, or in all if it names none.
    `ends` is the accuracy of the models before and after, as an evaluation found it.
    """
    series = _collect(metrics)
    if ends and "accuracy" in series:
        series[ENDS] = ([0.0, max(series["accuracy"][0])], list(ends))
    wanted = _of_rl(series) if any(key in series for key in RL) else _of_losses()
    drawn = [entry for entry in wanted if any(key in series for key in entry[3])]
    keys = {key for entry in drawn for key in entry[3]}
    named = {alarm: _names(alarm, keys) for alarm in alarms}
    return [
        _plot(
            *entry[:3],
            {label: series[key] for key, label in entry[3].items() if key in series},
            {label for key, label in entry[3].items() if key == ENDS},
            [w for w in alarms if not named[w] or named[w] & entry[3].keys()],
        )
        for entry in drawn
    ]


def _of_rl(series: Series) -> list[Wanted]:
    # Our own count, where the stage logged it: rounding makes TRL's miss groups.
    alike = "frac_zero_advantage" if "frac_zero_advantage" in series else "frac_reward_zero_std"
    found = ((key, re.fullmatch(r"rewards/(.+)/mean", key)) for key in sorted(series))
    functions = {key: match[1] for key, match in found if match}
    cut = "completions/clipped_ratio"
    return [
        ("Reward", "weighted sum", number, {"reward": "training", "eval_reward": "held out"}),
        ("Accuracy", "strict", percent, {"accuracy": "rollouts", "eval_accuracy": "held out",
                                         ENDS: "held out, as evaluated"}),
        ("Reward by function", "before weights", number, functions),
        ("Completion length", "tokens", number, {"completions/mean_length": ""}),
        ("Entropy", "nats a token", number, {"entropy": ""}),
        ("KL to the reference", "nats a token", number, {"kl": ""}),
        ("Groups without spread", "prompts whose completions scored alike", percent, {alike: ""}),
        ("Truncated", "completions cut at the length limit", percent, {cut: ""}),
    ]  # fmt: skip


def _of_losses() -> list[Wanted]:
    accuracy = {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "held out"}
    return [
        ("Loss", "mean over tokens", number, {"loss": "training", "eval_loss": "held out"}),
        ("Token accuracy", "next tokens that were right", percent, accuracy),
    ]


def alarms_of(health: list[Row]) -> list[Alarm]:
    """Read `health.jsonl`: what was seen (or a `message`), what it means, what to change."""
    found: list[Alarm] = []
    for row in health:
        step = finite(row.get("step"))
        text = row.get("seen") or row.get("message")
        if step is not None and text:
            level = "stop" if (row.get("action") or row.get("level")) == "stop" else "warn"
            more = (str(row.get(key) or "") for key in ("means", "change"))
            rule = str(row.get("rule") or "")
            found.append(Alarm(len(found) + 1, step, rule, level, str(text), *more))
    return found


def _names(alarm: Alarm, keys: set[str]) -> set[str]:
    """Return which of the logged numbers an alarm speaks of, as words of their own."""
    return {
        key
        for key in keys
        if re.search(rf"(?<![\w/]){re.escape(key)}(?![\w/])", alarm.seen)
    }  # fmt: skip


def _collect(metrics: list[Row]) -> Series:
    """Gather each logged name's steps and values; what is no finite number is left out."""
    series: Series = {}
    for row in metrics:
        if (step := finite(row.get("step"))) is None:
            continue
        for key, value in row.items():
            if key != "step" and (logged := finite(value)) is not None:
                steps, values = series.setdefault(key, ([], []))
                steps.append(step)
                values.append(logged)
    return series


def _plot(
    title: str,
    note: str,
    write: Callable[[float], str],
    series: Series,
    dotted: set[str],
    alarms: Sequence[Alarm],
) -> Plot:
    """Scale the series to one frame and smooth what is long; those `dotted` are points alone."""
    courses = [_course(ys, write) for _, ys in series.values()]
    thin = [axes.thin(xs, ys) for xs, ys in series.values()]
    x_low, x_high = axes.span(x for xs, _ in thin for x in xs)
    y_low, y_high = axes.span(y for _, ys in thin for y in ys)
    if 0 < y_low < 0.6 * y_high:  # near enough to zero to show it
        y_low = 0.0
    if write is percent:
        y_low, y_high = max(y_low, 0.0), min(y_high, 1.0)
    frame = Frame(x_low, x_high, y_low, y_high)
    lines = [
        Line(
            label=label,
            colour=index % COLOURS,
            smooth=frame.path(xs, axes.smooth(ys)),
            # Several noisy lines over one another hide each other.
            raw=frame.path(xs, ys) if len(series) == 1 and axes.window(ys) > 1 else "",
            course=courses[index],
            lone=len(xs) == 1,
            dots=[(frame.x(x), frame.y(y)) for x, y in zip(xs, ys, strict=True)]
            if label in dotted
            else [],
        )
        for index, (label, (xs, ys)) in enumerate(zip(series, thin, strict=True))
    ]
    return Plot(
        title=title,
        note=note,
        lines=lines,
        x_ticks=[Tick(frame.x(at), number(at)) for at in axes.round_numbers(x_low, x_high)],
        y_ticks=[Tick(frame.y(at), write(at)) for at in axes.round_numbers(y_low, y_high)],
        marks=[Mark(frame.x(min(max(w.step, x_low), x_high)), w) for w in alarms],
    )


def course(metrics: list[Row], key: str) -> tuple[float, float] | None:
    """Return a logged number at the start and at the end, each the mean of a tenth of the run."""
    values = _collect(metrics).get(key, ([], []))[1]
    if not values:
        return None
    start, end = axes.ends(values)
    return axes.mean(start), axes.mean(end)


def _course(values: list[float], write: Callable[[float], str]) -> str:
    return " → ".join(write(axes.mean(part)) for part in axes.ends(values))
