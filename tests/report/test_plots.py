"""Plots show what was logged, in the page's colours, and draw no text of others."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from chainforge.report.plots import Plot, alarms_of, training_plots


def only(metrics: list[dict[str, Any]]) -> Plot:
    plots = training_plots(metrics)
    assert len(plots) == 1
    return plots[0]


def texts(plot: Plot) -> list[str]:
    """Return what is written into a drawing."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", plot.drawing)


def test_rl_logs_give_the_plots_of_rl_and_sft_logs_those_of_sft() -> None:
    rl = training_plots([{"step": i, "reward": i, "kl": 0.1, "loss": 1.0} for i in range(3)])
    assert [plot.title for plot in rl] == ["Reward", "KL to the reference"]
    sft = training_plots([{"step": i, "loss": i, "eval_loss": i} for i in range(3)])
    assert [label for label, _, _ in sft[0].lines] == ["training", "held out"]
    assert training_plots([{"step": 1, "train_runtime": 3.0}]) == training_plots([]) == []


@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [0.0, 0.0, 0.0],
        [-3.0, -3.0],
        [1e-9, 2e-9],
        [-1e6, 1e6],
        [1.0, 1.0 + 1e-12],
        [math.sin(i) for i in range(1000)],
    ],
)
def test_any_values_can_be_drawn_with_the_page_s_colours_alone(values: list[float]) -> None:
    drawing = only([{"step": step, "loss": value} for step, value in enumerate(values)]).drawing
    assert 'stroke="var(--c0)"' in drawing
    assert not re.search("#[0-9a-f]{6}|style=|id=|url|://|href|nan", drawing)
    assert len(drawing) < 20_000


def test_names_of_others_are_left_to_the_template() -> None:
    hostile = "<b>$x$"
    plots = training_plots([{"step": i, "reward": i, f"rewards/{hostile}/mean": i} for i in (1, 2)])
    assert [label for label, _, _ in plots[1].lines] == [hostile]
    assert "b" not in "".join(texts(plots[1]))


def test_what_is_no_number_is_left_out() -> None:
    losses = [(1, 1.0), (2, None), (3, math.nan), (None, 9.0), (4, 2.0)]
    plot = only([{"step": step, "loss": loss} for step, loss in losses] + [{"loss": 9.0}])
    assert plot.lines == [("training", 0, "1 → 2")]


def test_a_long_run_keeps_its_course() -> None:
    metrics = [{"step": step, "reward": step / 10_000} for step in range(10_000)]
    assert only(metrics).lines[0][2] == "0.05 → 0.95"


@pytest.mark.parametrize("ours", [{}, {"frac_zero_advantage": 0.0}])
def test_shares_are_written_in_percent_and_never_beyond_all(ours: dict[str, float]) -> None:
    trl = "frac_reward_zero_std"
    metrics = [
        {"step": i, "reward": 1.0, trl: 0.0 if ours else i / 9} | dict.fromkeys(ours, i / 9)
        for i in range(10)
    ]
    plot = next(p for p in training_plots(metrics) if p.title == "Groups without spread")
    assert plot.lines[0][2] == "0 % → 100 %"
    assert "100 %" in texts(plot)
    assert "120 %" not in texts(plot)


def test_warnings_are_marked_in_the_plots_that_they_name() -> None:
    metrics = [{"step": i, "reward": i, "kl": 0.1, "entropy": 0.2} for i in range(9)]
    health = [
        {"step": 3, "rule": "kl_growth", "seen": "kl is 0.9, from 0.1"},
        {"step": 99, "seen": "the reward/kl_like number is odd", "action": "stop"},
        {"step": None, "seen": "no step"},
    ]
    alarms = alarms_of(health)
    assert [(alarm.number, alarm.level) for alarm in alarms] == [(1, "warn"), (2, "stop")]
    plots = {plot.title: plot for plot in training_plots(metrics, alarms)}
    assert [alarm.number for alarm in plots["KL to the reference"].alarms] == [1, 2]
    assert [alarm.number for alarm in plots["Entropy"].alarms] == [2]
    assert "var(--bad)" in plots["Entropy"].drawing
    assert "var(--warn)" not in plots["Entropy"].drawing
