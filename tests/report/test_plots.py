"""Plots stay inside their frame and show what was logged."""

from __future__ import annotations

import math
from typing import Any

import pytest

from chainforge.report.axes import HEIGHT, WIDTH
from chainforge.report.plots import Plot, alarms_of, course, training_plots


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in path.split())]


def only(metrics: list[dict[str, Any]]) -> Plot:
    plots = training_plots(metrics)
    assert len(plots) == 1
    return plots[0]


def test_rl_logs_give_the_plots_of_rl_and_sft_logs_those_of_sft() -> None:
    rl = training_plots([{"step": i, "reward": i, "kl": 0.1, "loss": 1.0} for i in range(3)])
    assert [plot.title for plot in rl] == ["Reward", "KL to the reference"]
    sft = training_plots([{"step": i, "loss": i, "eval_loss": i} for i in range(3)])
    assert [line.label for line in sft[0].lines] == ["training", "held out"]
    assert training_plots([{"step": 1, "train_runtime": 3.0}]) == []
    assert training_plots([]) == []


@pytest.mark.parametrize(
    "values",
    [
        [0.0],
        [0.0, 0.0, 0.0],
        [5.0, 5.0],
        [-3.0, -3.0],
        [1e-9, 2e-9],
        [-1e6, 1e6],
        [1.0, 1.0 + 1e-12],
        [math.sin(i) for i in range(1000)],
    ],
)
def test_every_point_and_tick_is_inside_the_frame(values: list[float]) -> None:
    plot = only([{"step": step, "loss": value} for step, value in enumerate(values)])
    for line in plot.lines:
        for x, y in points(line.smooth) + points(line.raw):
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT
    assert 1 <= len(plot.x_ticks) <= 7
    assert 1 <= len(plot.y_ticks) <= 7
    assert all(0 <= tick.at <= WIDTH for tick in plot.x_ticks)
    assert all(0 <= tick.at <= HEIGHT for tick in plot.y_ticks)
    assert len({tick.text for tick in plot.y_ticks}) == len(plot.y_ticks)


def test_what_is_no_number_is_left_out() -> None:
    plot = only(
        [
            {"step": 1, "loss": 1.0},
            {"step": 2, "loss": None},
            {"step": 3, "loss": math.nan},
            {"step": None, "loss": 9.0},
            {"loss": 9.0},
            {"step": 4, "loss": 2.0},
        ]
    )
    assert len(points(plot.lines[0].smooth)) == 2
    assert plot.lines[0].course == "1 → 2"


def test_a_long_run_is_thinned_and_keeps_its_course() -> None:
    metrics = [{"step": step, "reward": step / 10_000} for step in range(10_000)]
    line = only(metrics).lines[0]
    assert len(points(line.smooth)) <= 240
    assert line.course == "0.05 → 0.95"
    assert course(metrics, "reward") == pytest.approx((0.05, 0.95), abs=0.001)
    assert course(metrics, "kl") is None


@pytest.mark.parametrize("ours", [{}, {"frac_zero_advantage": 0.0}])
def test_shares_are_written_in_percent(ours: dict[str, float]) -> None:
    trl = "frac_reward_zero_std"
    metrics = [
        {"step": i, "reward": 1.0, trl: 0.0 if ours else i / 10} | dict.fromkeys(ours, i / 10)
        for i in range(10)
    ]
    plot = next(p for p in training_plots(metrics) if p.title == "Groups without spread")
    assert plot.lines[0].course == "0 % → 90 %"
    assert all(tick.text.endswith(" %") for tick in plot.y_ticks)


def test_a_share_is_never_drawn_beyond_all_and_a_lone_point_is_seen() -> None:
    plots = training_plots([{"step": 1, "reward": 1.0, "frac_zero_advantage": 1.0}])
    assert all(line.lone for plot in plots for line in plot.lines)
    assert [tick.text for tick in plots[-1].y_ticks][-1] == "100 %"


def test_warnings_are_marked_in_the_plots_that_they_speak_of() -> None:
    metrics = [{"step": i, "reward": i, "kl": 0.1, "entropy": 0.2} for i in range(9)]
    health = [
        {"step": 3, "rule": "kl_growth", "seen": "kl is 0.9, from 0.1"},
        {"step": 99, "message": "the reward/kl_like number is odd", "level": "stop"},
        {"step": None, "seen": "no step"},
        {"step": 4},
    ]
    alarms = alarms_of(health)
    assert [(alarm.number, alarm.level) for alarm in alarms] == [(1, "warn"), (2, "stop")]
    marks = {plot.title: plot.marks for plot in training_plots(metrics, alarms)}
    assert [mark.alarm.number for mark in marks["KL to the reference"]] == [1, 2]
    assert [mark.alarm.number for mark in marks["Entropy"]] == [2]
    assert max(mark.at for mark in marks["Entropy"]) <= WIDTH
