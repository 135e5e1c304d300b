"""End a run in which nothing is learnt: as an error, or in good order when all is learnt."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chainforge.core.errors import Failed
from chainforge.rewards.reward import Reward

logger = logging.getLogger(__name__)

ALIKE = "groups/alike"
TRUNCATED = "completions/clipped_ratio"
Log = dict[str, Any]


class NothingTrained(Failed):
    """A training stage that took no step, changed no weight, or had nothing to learn from."""


class NotFinite(Failed):
    """A loss, a gradient, a weight or a reward that is NaN or infinite."""


@dataclass
class GuardArgs:
    """When RL is in vain."""

    max_zero_advantage_steps: int = field(
        default=30,
        metadata={
            "help": "End the stage when this many steps in a row teach nothing: in every group all "
            "completions have the same reward, or every completion is cut off at "
            "max_completion_length. An error, but for groups that are alike because the policy is "
            "as good as it ever was: then training ends there and the stage is done. 0: never."
        },
    )
    nonfinite_rewards: Literal["error", "neutral"] = field(
        default="error",
        metadata={
            "help": "A reward function that returns NaN or an infinite number: an error, or "
            "neutral, left out like None and counted under max_reward_failures."
        },
    )


class FiniteGuard(TrainerCallback):
    """Stop at a loss or a gradient that is not finite, before a checkpoint is made of it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Log | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the numbers of the steps since the last log."""
        # In fp16 a gradient may overflow: the scaler leaves that step out and lowers its scale.
        for key in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            value = (logs or {}).get(key)
            if isinstance(value, int | float) and not math.isfinite(value):
                raise NotFinite(
                    f"{key} is {value} at step {state.global_step}: training has diverged. "
                    f"{DIVERGED}"
                )


DIVERGED = (
    "Lower learning_rate, set max_grad_norm (1.0 is usual) or warmup_steps, and look at the rows "
    "or rewards of these steps; with fp16, use bf16. The last checkpoint is from before"
)


class LearningGuard(TrainerCallback):
    """End RL when it has nothing to learn from.

    What it knows is in the logs alone, which a checkpoint holds, so that a resumed run ends where
    an undisturbed one does.
    """

    def __init__(self, args: GuardArgs, rewards: Sequence[Reward]) -> None:
        self.args, self.rewards = args, rewards
        self.learnt: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See whether the run had ended here already."""
        self._look(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Name a reward that is not finite: one such value may silence a whole group."""
        if self.args.nonfinite_rewards == "neutral":
            return
        for reward in self.rewards:
            if reward.nonfinite:
                raise NotFinite(
                    f"reward {reward.__name__} returned {reward.nonfinite}, at step "
                    f"{state.global_step}. Mend the function (a division by zero, the logarithm "
                    "of zero?), or set `nonfinite_rewards: neutral` to leave such completions out "
                    "and go on from the last checkpoint"
                )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the steps that taught nothing; stop, or raise `NothingTrained`."""
        self._look(state)
        if self.learnt:
            control.should_training_stop = True

    def _look(self, state: TrainerState) -> None:
        limit, logs = self.args.max_zero_advantage_steps, state.log_history
        if limit < 1 or not logs or "train_runtime" in logs[-1]:
            return
        if idle_since(logs, TRUNCATED) >= limit:
            raise NothingTrained(_truncated(logs, limit))
        idle = idle_since(logs, ALIKE)
        if idle < limit:
            return
        first = int(logs[-1]["step"]) - idle
        before, now = _mean_reward(logs, first - limit, first), _mean_reward(logs, first)
        if first == 0:
            raise NothingTrained(_never(idle, now))
        if before is None or now is None or now < before:
            raise NothingTrained(_collapsed(idle, before, now))
        self.learnt = (
            f"after step {state.global_step} of {state.max_steps}, since in the last {idle} steps "
            "all completions of every group had the same reward, and that was no lower than "
            f"before ({now:.3f} and {before:.3f}): nothing is left to learn from these tasks"
        )


def idle_since(logs: Sequence[Log], key: str) -> int:
    """Return for how many steps, up to the last log, a share has been 1 throughout.

    Logs without it say nothing; 0 when there is none with it.
    """
    seen = [log for log in logs if log.get(key) is not None]
    if not seen:
        return 0
    moved = [log["step"] for log in seen if log[key] < 1]
    return int(logs[-1]["step"]) - int(moved[-1] if moved else 0)


def _mean_reward(logs: Sequence[Log], after: int, until: int | None = None) -> float | None:
    rewards = [
        log["reward"]
        for log in logs
        if log.get("reward") is not None
        and log["step"] > after
        and (until is None or log["step"] <= until)
    ]
    return fmean(rewards) if rewards else None


def _never(idle: int, reward: float | None) -> str:
    level = "no completion had a reward at all" if reward is None else f"on average {reward:.3f}"
    return (
        f"in all {idle} steps the completions of every group had the same reward ({level}), so "
        "that none was better than another. If that is the lowest reward, the tasks are too hard "
        "or the form is not known yet: train it first (a cold start), make the tasks easier, raise "
        "num_generations or temperature, or add a reward that tells bad from worse; rollouts.jsonl "
        "has what was written. If it is the highest, there is nothing to learn: take harder tasks "
        "or leave the stage out. `max_zero_advantage_steps` says how long to wait"
    )


def _collapsed(idle: int, before: float | None, now: float | None) -> str:
    levels = f"from {before:.3f} to {now:.3f}" if before is not None and now is not None else ""
    return (
        f"for {idle} steps the completions of every group have had the same reward, and it fell "
        f"{levels}: the policy has collapsed. Begin anew with a lower learning_rate, a higher "
        "temperature or `beta` above 0; an earlier checkpoint may be better than this one. "
        "`max_zero_advantage_steps` says how long to wait"
    )


def _truncated(logs: Sequence[Log], limit: int) -> str:
    length = logs[-1].get("completions/max_length")
    return (
        f"for {limit} steps every completion was cut off at max_completion_length"
        + (f" ({length:.0f} tokens)" if length else "")
        + ", so that no answer was ever finished. Raise max_completion_length, reward short "
        "answers, or see that the model ends its turn (its end-of-sequence token); "
        "`max_zero_advantage_steps` says how long to wait"
    )
