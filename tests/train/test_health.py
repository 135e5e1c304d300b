"""Health rules warn once per episode or stop, and RL without a learning signal ends."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from chainforge.core.errors import InputError, Stopped
from chainforge.core.jsonl import read_rows
from chainforge.train.callbacks import NothingTrained
from chainforge.train.health import (
    PAUSE,
    RULES,
    TRUNCATED,
    ZERO_ADVANTAGE,
    HealthCallback,
    active_rules,
    steps_at_one,
)
from chainforge.train.rl_args import RLArgs

FIRES = {
    "truncated": ([0.2] * 8 + [0.9] * 8, [0.9] * 16 + [0.1] * 8),
    "zero_advantage": ([0.9] * 8, [0.1, 0.8] * 12),
    "entropy_collapse": ([0.5] * 4 + [0.004] * 8, [0.16, 0.045] * 12),
    "kl_growth": ([0.0] * 8 + [1.0] * 8, [0.0, 0.3] * 12),
}


def values(series):
    return list(enumerate(series, start=1))


def test_the_help_names_every_rule():
    text = RLArgs.__dataclass_fields__["health_rules"].metadata["help"]
    assert all(name in text for name in RULES)
    assert set(FIRES) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_fires_with_numbers_and_steps_and_not_on_a_sound_run(name):
    sick, sound = FIRES[name]
    rule = RULES[name]
    seen = rule.seen(values(sick))
    assert seen.startswith(f"{rule.metric} is {sick[-1]:.3g} (steps {len(sick) - 7}-{len(sick)}), ")
    assert "`" in rule.change
    assert rule.seen(values(sound)) is None
    assert rule.seen(values(sick)[-7:]) is None  # too few logs


class Run:
    """A stage's logs, passed to a callback as a trainer does."""

    def __init__(self, path, **settings):
        self.stage = SimpleNamespace(path=lambda name: path / name, notes={})
        self.callback = HealthCallback(RLArgs(**settings), self.stage)
        self.callback.rules = {
            name: replace(rule, window=2, limit=0.5) for name, rule in self.callback.rules.items()
        }

    def begin(self, step=0):
        self.callback.on_train_begin(None, TrainerState(global_step=step), None)
        return self

    def log(self, step, value):
        logs = {TRUNCATED: value, "loss": float("nan"), "note": "x"}
        with open(self.stage.path("metrics.jsonl"), "a") as file:
            file.write(json.dumps({"step": step, TRUNCATED: value}) + "\n")
        self.callback.on_log(None, TrainerState(global_step=step), None, logs=logs)

    def found(self):
        return [row["step"] for row in read_rows(self.stage.path("health.jsonl"))]


VALUES = [0.9] * 6 + [0.1] * (PAUSE + 2) + [0.9] * 4


@pytest.mark.parametrize("cut", [1, 4, None])
def test_an_episode_is_reported_once_also_by_a_resumed_run(tmp_path, caplog, cut):
    run = Run(tmp_path).begin()
    for step, value in enumerate(VALUES[: cut + 3] if cut else [], start=1):
        run.log(step, value)
    if cut:
        kept = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:cut]
        (tmp_path / "metrics.jsonl").write_text("".join(kept))
        run = Run(tmp_path).begin(cut)
    else:
        cut = 0
    for step, value in enumerate(VALUES[cut:], start=cut + 1):
        run.log(step, value)
    second = len(VALUES) - 2
    assert run.found() == [row["step"] for row in run.stage.notes["health"]] == [2, second]
    assert f"step {second}, truncated: completions/clipped_ratio is 0.9" in caplog.text
    assert caplog.text.count(f"step {second}, truncated: ") == 1
    assert run.stage.notes["health"][0]["change"].startswith("a larger `max_completion_length`")


def test_a_rule_may_stop_the_stage(tmp_path):
    run = Run(tmp_path, health="stop").begin()
    run.log(1, 0.9)
    with pytest.raises(Stopped, match="truncated.*`health_rules: {truncated: warn}`") as stopped:
        run.log(2, 0.9)
    assert stopped.value.code == 1
    assert run.found() == [2]


def test_rules_have_actions_and_limits_of_their_own():
    assert active_rules(RLArgs(health="off", health_rules={"truncated": 0.5})) == {}
    found = active_rules(RLArgs(health="off", health_rules={"truncated": "stop"}))
    assert [(name, rule.action) for name, rule in found.items()] == [("truncated", "stop")]
    off = active_rules(RLArgs(health_rules={"truncated": False, "kl_growth": 2}))
    assert set(off) == set(RULES) - {"truncated"}  # YAML's bare off
    assert off["kl_growth"].limit == 2


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"entropy": "off"}, "no rule 'entropy'"),
        ({"truncate": "stop"}, "did you mean 'truncated'"),
        ({"truncated": "half"}, "expected warn, stop, off or a limit >= 0, found 'half'"),
        ({"truncated": -1}, "found -1"),
        ({"truncated": None}, "found None"),
    ],
)
def test_a_wrong_rule_is_refused(rules, words):
    with pytest.raises(InputError, match=words):
        active_rules(RLArgs(health_rules=rules))


def logs(alike, rewards=None, every=1, **more):
    """Make a history: a log every so many steps."""
    rewards = rewards or [0.5] * len(alike)
    return [
        {"step": every * (n + 1), "loss": 0.0, ZERO_ADVANTAGE: share, "reward": reward} | more
        for n, (share, reward) in enumerate(zip(alike, rewards, strict=True))
    ]


def look(history, limit=3):
    """Pass the logs one by one, as a trainer does; return why it stopped, and where."""
    stage = SimpleNamespace(notes={})
    callback = HealthCallback(RLArgs(health="off", max_zero_advantage_steps=limit), stage)
    state, control = TrainerState(max_steps=100), TrainerControl()
    for log in history:
        state.log_history.append(log)
        state.global_step = log["step"]
        callback.on_log(None, state, control, logs={})
        if control.should_training_stop:
            break
    return stage.notes.get("stopped_early"), state


def test_steps_without_a_signal_are_counted_from_the_logs_alone():
    assert steps_at_one(logs([1, 0.5, 1, 1]), ZERO_ADVANTAGE) == 2
    assert steps_at_one(logs([1, 1, 1]), ZERO_ADVANTAGE) == 3
    assert steps_at_one(logs([1, 0.9, 1], every=10), ZERO_ADVANTAGE) == 10
    assert steps_at_one([{"step": 7}], ZERO_ADVANTAGE) == 0
    # Steps that train again on the same completions log no groups.
    history = logs([0.5, 1, 1])
    del history[1][ZERO_ADVANTAGE]
    assert steps_at_one(history, ZERO_ADVANTAGE) == 2


CUT = {TRUNCATED: 1.0, "completions/max_length": 72.0}
ERRORS = {
    "never a signal": (
        logs([1, 1, 1], [0.0] * 3),
        r"in 3 steps .*0.000 on average.*cold start",
    ),
    "a policy that fell": (
        logs([0.5, 0.2, 0.1, 1, 1, 1], [0.4, 0.8, 0.9, 0, 0, 0]),
        "fell from 0.700 to 0.000: the policy has collapsed",
    ),
    "no completion ends": (logs([0.5] * 3, **CUT), r"for 3 steps every .*_length \(72 tokens\)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_no_signal_is_an_error_that_says_what_to_do(case):
    history, words = ERRORS[case]
    with pytest.raises(NothingTrained, match=words):
        look(history)
    assert look(history, limit=0)[0] is None


def test_a_signal_now_and_then_is_enough():
    assert look(logs([1, 1, 0.9] * 10))[0] is None
    assert look(logs([0.5] * 9, **CUT | {TRUNCATED: 0.99}))[0] is None


def test_a_policy_as_good_as_before_ends_the_stage_without_an_error(tmp_path):
    history = logs([0.5, 0.2, 0.1, 1, 1, 1, 1], [0.4, 0.8, 0.9, 1.2, 1.2, 1.2, 1.2])
    why, state = look(history)
    assert state.global_step == 6
    assert "after step 6 of 100" in why
    assert "1.200 and 0.700" in why
    # A run that resumes from its last checkpoint knows that it has ended.
    control = TrainerControl()
    again = Run(tmp_path, max_zero_advantage_steps=3)
    again.callback.on_train_begin(None, state, control)
    assert control.should_training_stop
    assert again.stage.notes["stopped_early"] == why
