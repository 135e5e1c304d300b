"""Rules over the logs: what ends a run of RL, as an error or in good order."""

import math

import pytest
from transformers import TrainerControl, TrainerState

from chainforge.train.guards import (
    ALIKE,
    TRUNCATED,
    FiniteGuard,
    GuardArgs,
    LearningGuard,
    NotFinite,
    NothingTrained,
    idle_since,
)


def logs(alike, rewards=None, every=1, **more):
    """Make a history: a log every so many steps."""
    rewards = rewards or [0.5] * len(alike)
    return [
        {"step": every * (n + 1), "loss": 0.0, ALIKE: share, "reward": reward} | more
        for n, (share, reward) in enumerate(zip(alike, rewards, strict=True))
    ]


def look(history, limit=3):
    """Feed the logs one by one, as a trainer does; return the guard and where it stopped."""
    guard = LearningGuard(GuardArgs(max_zero_advantage_steps=limit), [])
    state, control = TrainerState(max_steps=100), TrainerControl()
    for log in history:
        state.log_history.append(log)
        state.global_step = log["step"]
        guard.on_log(None, state, control)
        if control.should_training_stop:
            break
    return guard, state


def test_steps_without_a_signal_are_counted_from_the_logs_alone():
    assert idle_since(logs([1, 0.5, 1, 1]), ALIKE) == 2
    assert idle_since(logs([1, 1, 1]), ALIKE) == 3
    assert idle_since(logs([1, 0.9, 1], every=10), ALIKE) == 10
    assert idle_since([{"step": 7}], ALIKE) == 0
    # Steps that train again on the same completions log no groups.
    history = logs([0.5, 1, 1])
    del history[1][ALIKE]
    assert idle_since(history, ALIKE) == 2


def test_never_a_signal_is_an_error_that_says_what_to_do():
    with pytest.raises(NothingTrained, match=r"in all 3 steps .*on average 0.000.*cold start"):
        look(logs([1, 1, 1], [0.0, 0.0, 0.0]))


def test_a_signal_now_and_then_is_enough():
    guard, state = look(logs([1, 1, 0.9] * 10))
    assert guard.learnt is None
    assert state.global_step == 30


def test_a_policy_as_good_as_ever_ends_the_stage_in_good_order():
    history = logs([0.5, 0.2, 0.1, 1, 1, 1, 1], [0.4, 0.8, 0.9, 1.2, 1.2, 1.2, 1.2])
    guard, state = look(history)
    assert state.global_step == 6
    assert "after step 6 of 100" in guard.learnt
    assert "1.200 and 0.700" in guard.learnt
    # A run that goes on from its last checkpoint knows that it has ended.
    again = LearningGuard(GuardArgs(max_zero_advantage_steps=3), [])
    again.on_train_begin(None, state, TrainerControl())
    assert again.learnt == guard.learnt


def test_a_policy_that_fell_is_an_error():
    with pytest.raises(NothingTrained, match="fell from 0.700 to 0.000: the policy has collapsed"):
        look(logs([0.5, 0.2, 0.1, 1, 1, 1], [0.4, 0.8, 0.9, 0, 0, 0]))


def test_completions_that_never_end_are_an_error_whatever_their_rewards():
    cut = {TRUNCATED: 1.0, "completions/max_length": 72.0}
    with pytest.raises(NothingTrained, match=r"for 3 steps every .*max_completion_length \(72 tok"):
        look(logs([0.5] * 3, **cut))
    look(logs([0.5] * 9, **cut | {TRUNCATED: 0.99}))


def test_the_limit_may_be_off():
    guard, _ = look(logs([1] * 50, **{TRUNCATED: 1.0}), limit=0)
    assert guard.learnt is None


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_an_error(key, value):
    class Args:
        fp16 = False

    state = TrainerState(global_step=7)
    FiniteGuard().on_log(Args, state, None, logs={"loss": 1.0, "grad_norm": 2.0})
    with pytest.raises(NotFinite, match=f"{key} is {value} at step 7: .*Lower learning_rate"):
        FiniteGuard().on_log(Args, state, None, logs={"loss": 1.0, key: value})
    Args.fp16 = True  # there a gradient may overflow, and that step is left out
    FiniteGuard().on_log(Args, state, None, logs={"loss": 1.0, "grad_norm": math.inf})
