"""Health rules warn once or stop, and RL without a learning signal ends."""

from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from chainforge.core.errors import Stopped
from chainforge.core.jsonl import read_rows
from chainforge.train.callbacks import NothingTrained
from chainforge.train.health import RULES, ZERO_ADVANTAGE, HealthCallback, RLArgs

# Values of a sick run, and of a sound one.
FIRES = {
    "truncated": ([0.2] * 8 + [0.9] * 8, [0.9] * 16 + [0.1] * 8),
    "zero_advantage": ([0.9] * 8, [0.1, 0.8] * 12),
    "entropy_collapse": ([0.5] * 4 + [0.004] * 8, [0.16, 0.045] * 12),
    "kl_growth": ([0.0] * 8 + [1.0] * 8, [0.0, 0.3] * 12),
}
TRUNCATED = RULES["truncated"].metric


def logs(values, key=ZERO_ADVANTAGE, rewards=None):
    history = [{"step": n, key: value} for n, value in enumerate(values, 1)]
    return [
        log | {"reward": reward} for log, reward in zip(history, rewards or values, strict=True)
    ]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_fires_with_numbers_and_steps_and_not_on_a_sound_run(name):
    sick, sound = FIRES[name]
    rule = RULES[name]
    seen = rule.seen(logs(sick, rule.metric))
    assert seen.startswith(f"{rule.metric} is {sick[-1]:.3g} (steps {len(sick) - 7}-{len(sick)}), ")
    assert "`" in rule.change
    assert rule.seen(logs(sound, rule.metric)) is None
    assert rule.seen(logs(sick, rule.metric)[-7:]) is None  # too few logs


class Run:
    """A stage's logs, passed to a callback one by one, as a trainer does."""

    def __init__(self, path, begin=(), **settings):
        self.stage = SimpleNamespace(path=lambda name: path / name, notes={})
        self.callback = HealthCallback(RLArgs(**settings), self.stage)
        self.state, self.control = TrainerState(max_steps=100), TrainerControl()
        self._take(begin)
        self.callback.on_train_begin(None, self.state, self.control)

    def _take(self, history):
        for log in history:
            self.state.log_history.append(log)
            self.state.global_step = log["step"]

    def log(self, history):
        for log in history:
            self._take([log])
            self.callback.on_log(None, self.state, self.control)
            if self.control.should_training_stop:
                break
        return self.stage.notes.get("stopped_early")


@pytest.mark.parametrize("cut", [7, 10])
def test_a_rule_reports_once_also_in_a_resumed_run(tmp_path, caplog, cut):
    history = logs([0.9] * 20, TRUNCATED)
    Run(tmp_path).log(history[:12])
    caplog.clear()
    run = Run(tmp_path, begin=history[:cut])
    run.log(history[cut:])
    (found,) = read_rows(tmp_path / "health.jsonl")
    assert (found["step"], found["rule"], found["action"]) == (8, "truncated", "warn")
    assert found["change"].startswith("a larger `max_completion_length`")
    assert run.stage.notes["health"] == [found]
    reported = "step 8, truncated: completions/clipped_ratio is 0.9 (steps 1-8), above 0.3"
    assert caplog.text.count(reported) == (cut < 8)


def test_a_rule_may_stop_the_stage_or_be_off(tmp_path):
    Run(tmp_path, health="off").log(logs([0.9] * 9, TRUNCATED))
    assert not (tmp_path / "health.jsonl").exists()
    with pytest.raises(Stopped, match="truncated.*To continue: `health: warn`") as stopped:
        Run(tmp_path, health="stop").log(logs([0.9] * 9, TRUNCATED))
    assert stopped.value.code == 1
    assert [row["step"] for row in read_rows(tmp_path / "health.jsonl")] == [8]


FELL = logs([0.5, 0.2, 0.1, 1, 1, 1], rewards=[0.4, 0.8, 0.9, 0, 0, 0])
ERRORS = [
    (logs([1] * 3, rewards=[0.0] * 3), r"in 3 steps .*0.000 on average.*cold start"),
    (FELL, "fell from 0.700 to 0.000: the policy has collapsed"),
]


@pytest.mark.parametrize(("history", "words"), ERRORS)
def test_no_signal_is_an_error_with_advice(history, words, tmp_path):
    with pytest.raises(NothingTrained, match=words):
        Run(tmp_path, max_zero_advantage_steps=3).log(history)
    assert Run(tmp_path, max_zero_advantage_steps=0).log(history) is None


def test_a_policy_as_good_as_before_ends_the_stage_without_an_error(tmp_path):
    now_and_then = Run(tmp_path, health="off", max_zero_advantage_steps=3)
    assert now_and_then.log(logs([1, 1, 0.9] * 10)) is None
    run = Run(tmp_path, max_zero_advantage_steps=3)
    why = run.log(logs([0.5, 0.2, 0.1, 1, 1, 1], rewards=[0.4, 0.8, 0.9, 1.2, 1.2, 1.2]))
    assert why.startswith("after step 6 of 100")
    assert "1.200 and 0.700" in why
    # A run that resumes from its last checkpoint knows that it has ended.
    again = Run(tmp_path, begin=run.state.log_history, max_zero_advantage_steps=3)
    assert again.control.should_training_stop
    assert again.stage.notes["stopped_early"] == why
