"""Plots show what was logged, in the page's colours, and draw no text of others."""

import base64
import math
import re

import pytest

from chainforge.report.plots import alarms_of, training_plots


def only(metrics):
    (plot,) = training_plots(metrics)
    return plot


def svg(plot, scheme="light"):
    return base64.b64decode(plot.images[scheme].partition("base64,")[2]).decode()


def texts(plot):
    """Return what is written into a drawing."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg(plot))


def test_rl_logs_give_the_plots_of_rl_and_sft_logs_those_of_sft():
    rl = training_plots([{"step": i, "reward": i, "kl": 0.1, "loss": 1.0} for i in range(3)])
    assert [plot.title for plot in rl] == ["Reward", "KL to the reference"]
    sft = training_plots([{"step": i, "loss": i, "eval_loss": i} for i in range(3)])
    assert [label for label, _ in sft[0].lines] == ["training", "held out"]
    assert training_plots([{"step": 1, "train_runtime": 3.0}]) == training_plots([]) == []


LONG = [math.sin(i) for i in range(10_000)]


@pytest.mark.parametrize(
    "values", [[0.0], [0.0] * 3, [-3.0] * 2, [1e-9, 2e-9], [-1e6, 1e6], [1.0, 1.0 + 1e-12], LONG]
)
def test_any_values_are_drawn_small_and_in_the_colours_of_both_schemes(values):
    plot = only([{"step": step, "loss": value} for step, value in enumerate(values)])
    for scheme, colour in (("light", "#0b62b8"), ("dark", "#6db3f8")):
        drawing = svg(plot, scheme)
        assert f"stroke: {colour}" in drawing
        assert not re.search('nan|<script|<image|href="[^#]', drawing)
        assert len(drawing) < 20_000


def test_names_of_others_are_left_to_the_template_and_what_is_no_number_is_left_out():
    hostile = "<b>$x$"
    plots = training_plots([{"step": i, "reward": i, f"rewards/{hostile}/mean": i} for i in (1, 2)])
    assert [label for label, _ in plots[1].lines] == [hostile]
    assert "b" not in "".join(texts(plots[1]))
    losses = [(1, 1.0), (2, None), (3, math.nan), (None, 9.0), (4, 2.0)]
    plot = only([{"step": step, "loss": loss} for step, loss in losses] + [{"loss": 9.0}])
    assert plot.lines == [("training", "1 → 2")]


def test_shares_are_in_percent_and_never_beyond_all_and_a_long_run_keeps_its_course():
    shares = {"reward": 1e-4, "frac_zero_advantage": 1 / 9999}
    metrics = [{"step": i} | {k: i * one for k, one in shares.items()} for i in range(10_000)]
    reward, plot = training_plots(metrics)
    assert reward.lines == [("training", "0.05 → 0.95")]
    assert plot.lines == [("", "5.0 % → 95.0 %")]
    assert "100 %" in texts(plot)
    assert "120 %" not in texts(plot)


def test_warnings_are_marked_in_the_plots_that_they_name():
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
    assert "#b3261e" in svg(plots["Entropy"])  # of a stop
    assert "#8a5a00" not in svg(plots["Entropy"])
