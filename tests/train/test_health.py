"""Findings are told once for each episode, by a run that was cut as by one that was not."""

import json
from types import SimpleNamespace

import pytest

from chainforge.core.errors import InputError, Stopped
from chainforge.core.jsonl import read_rows
from chainforge.train.health import PAUSE, HealthArgs, HealthCallback, watches

CUT = "completions/clipped_ratio"
RULES = {"truncated": {"window": 2, "most": 0.5}}


class Run:
    """A stage's logs, fed to a callback as a trainer does."""

    def __init__(self, path, **settings):
        self.stage = SimpleNamespace(path=lambda name: path / name, notes={})
        self.callback = HealthCallback(
            HealthArgs(**({"health_rules": RULES} | settings)), self.stage
        )

    def begin(self, step=0):
        self.callback.on_train_begin(None, SimpleNamespace(global_step=step), None)
        return self

    def log(self, step, value):
        logs = {CUT: value, "loss": float("nan"), "note": "x"}
        with open(self.stage.path("metrics.jsonl"), "a") as file:
            file.write(json.dumps({"step": step, CUT: value}) + "\n")
        self.callback.on_log(None, SimpleNamespace(global_step=step), None, logs=logs)

    def found(self):
        return [row["step"] for row in read_rows(self.stage.path("health.jsonl"))]


VALUES = [0.9] * 6 + [0.1] * (PAUSE + 2) + [0.9] * 4


def test_an_episode_is_told_once(tmp_path, caplog):
    run = Run(tmp_path).begin()
    for step, value in enumerate(VALUES, start=1):
        run.log(step, value)
    second = len(VALUES) - 2
    assert run.found() == [2, second]
    assert caplog.text.count("It usually means that") == 2
    assert f"step {second}, truncated: completions/clipped_ratio is 0.9" in caplog.text
    assert [row["step"] for row in run.stage.notes["health"]] == [2, second]
    assert run.stage.notes["health"][0]["change"].startswith("a larger `max_completion_length`")


@pytest.mark.parametrize("cut", [1, 4])
def test_a_resumed_run_tells_the_same(tmp_path, cut):
    first = Run(tmp_path).begin()
    for step, value in enumerate(VALUES[: cut + 3], start=1):
        first.log(step, value)
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:cut]
    (tmp_path / "metrics.jsonl").write_text("".join(kept))
    again = Run(tmp_path).begin(cut)
    for step, value in enumerate(VALUES[cut:], start=cut + 1):
        again.log(step, value)
    assert again.found() == [2, len(VALUES) - 2]


def test_a_rule_may_stop_the_stage(tmp_path):
    run = Run(tmp_path, health="stop").begin()
    run.log(1, 0.9)
    with pytest.raises(Stopped, match="truncated.*`health_rules: {truncated: warn}`") as stopped:
        run.log(2, 0.9)
    assert stopped.value.code == 1
    assert run.found() == [2]


def test_rules_have_actions_of_their_own():
    of = {watch.name: watch for watch in watches(HealthArgs(health="off", health_rules=RULES))}
    assert of == {}
    mixed = {"truncated": {"action": "stop", "most": 0.5}, "kl_growth": "warn"}
    found = watches(HealthArgs(health="off", health_rules=mixed))
    assert [(watch.name, watch.action) for watch in found] == [
        ("truncated", "stop"),
        ("kl_growth", "warn"),
    ]
    off = watches(HealthArgs(health_rules={"truncated": False}))  # YAML's bare off
    assert "truncated" not in {watch.name for watch in off}
    assert len(off) > 5


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"entropy": "off"}, "no rule 'entropy'"),
        ({"truncated": {"most": "half"}}, "most: expected a number from 0, found 'half'"),
        ({"truncated": {"window": 1}}, "window: expected a whole number from 2"),
        ({"truncated": None}, "None is none of warn, stop, off"),
    ],
)
def test_what_is_no_rule_is_refused(rules, words):
    with pytest.raises(InputError, match=words):
        watches(HealthArgs(health_rules=rules))
