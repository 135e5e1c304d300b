"""Watch RL while it trains: warn when a metric leaves its healthy range, stop without a signal.

A finding goes to the log, to `health.jsonl` and into the manifest, once for each rule. Everything
is computed from the logs, which a checkpoint has as well, so a resumed run decides the same.

Limits: axolotl, docs/training_stability.qmd, "Key Metrics for RL (GRPO)"; DAPO (arXiv 2503.14476),
sections 3 and 4.3.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from transformers import TrainerCallback, TrainerState

from chainforge.core.errors import Stopped
from chainforge.core.jsonl import JsonLines, Row
from chainforge.generate.rollouts import GateArgs
from chainforge.generate.settings import TemplateArgs
from chainforge.rewards.reward import Reward
from chainforge.train.callbacks import NotFinite, NothingTrained, keep_until
from chainforge.train.stage import Stage, is_main_process

logger = logging.getLogger(__name__)

HEALTH = "health.jsonl"
WINDOW = 8  # logs
ZERO_ADVANTAGE = "frac_zero_advantage"
WAIT = "`max_zero_advantage_steps` sets how long to wait"


@dataclass
class RLArgs(GateArgs, TemplateArgs):
    """Which prompts RL trains on, what it saves and measures, and when it stops."""

    log_rollouts: bool = field(
        default=True,
        metadata={"help": "Save every completion with its rewards in rollouts.jsonl."},
    )
    rollout_engine: Literal["auto", "chainforge", "trl"] = field(
        default="auto",
        metadata={
            "help": "Who samples completions. chainforge: completions that ended leave the batch, "
            "each has a seed of its own, and little is computed for padding. trl: `generate`, or "
            "vLLM. auto: chainforge, but trl with vLLM, FSDP2, ZeRO-3 and settings that only "
            "TRL's generation knows."
        },
    )
    max_zero_advantage_steps: int = field(
        default=30,
        metadata={
            "help": "End the stage after this many steps in a row in which all completions of "
            "every group have the same reward. The stage fails, unless the reward is as high as "
            "before: then nothing is left to learn, and the stage is done. 0: never."
        },
    )
    health: Literal["warn", "stop", "off"] = field(
        default="warn", metadata={"help": "Action when a health rule fires."}
    )
    heldout_size: int = field(
        default=0,
        metadata={
            "help": "Number of rows of the tasks' validation split on which accuracy is measured "
            "during training, every eval_steps (default: save_steps); 0: none. With 100 rows a "
            "difference of ten points is visible."
        },
    )
    keep_best: bool = field(
        default=False,
        metadata={
            "help": "Make the checkpoint with the best held-out accuracy the stage's model instead "
            "of the last one; of equal ones the earlier."
        },
    )


@dataclass(frozen=True)
class Rule:
    """A metric and the limit that its mean over the last `WINDOW` logs must not pass."""

    metric: str
    side: str  # "above" or "below": where it fires
    limit: float
    means: str
    change: str

    def seen(self, logs: Sequence[Row]) -> str | None:
        """Return the mean, its steps and the limit when the rule fires at the last log."""
        values = [
            (log["step"], log[self.metric])
            for log in logs[-20 * WINDOW :]
            if math.isfinite(log.get(self.metric, math.nan))
        ]
        last = values[-WINDOW:]
        if len(last) < WINDOW:
            return None
        mean = fmean(value for _, value in last)
        if not (mean > self.limit if self.side == "above" else mean < self.limit):
            return None
        steps = f"steps {last[0][0]}-{last[-1][0]}"
        return f"{self.metric} is {mean:.3g} ({steps}), {self.side} {self.limit:g}"


RULES = {
    "truncated": Rule(
        "completions/clipped_ratio",
        "above",
        0.3,
        means="a completion that is cut off has no answer and gets no reward, right or wrong",
        change="a larger `max_completion_length`; or the reward `soft_overlong` with "
        "`mask_truncated_completions: true`",
    ),
    "zero_advantage": Rule(
        ZERO_ADVANTAGE,
        "above",
        0.8,
        means="in most groups all completions have the same reward and train nothing: the prompts "
        "are too easy or too hard for this policy",
        change="`tasks` of another difficulty; `gate_pool`; a larger `num_generations`",
    ),
    "entropy_collapse": Rule(
        "entropy",
        "below",
        0.01,
        means="the policy writes nearly the same completion each time and stops exploring",
        change="`epsilon_high: 0.28`; a lower `learning_rate`; `temperature: 1.0`; a larger `beta`",
    ),
    "kl_growth": Rule(
        "kl",
        "above",
        0.5,
        means="the policy loses other abilities, or exploits a reward: see `rollouts.jsonl`",
        change="a larger `beta`; a lower `learning_rate`",
    ),
}


class HealthCallback(TrainerCallback):
    """Apply the rules to each log; end RL that has nothing to learn from."""

    def __init__(self, args: RLArgs, stage: Stage, rewards: Sequence[Reward] = ()) -> None:
        self.args, self.stage, self.rewards = args, stage, rewards
        self.found: list[Row] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Forget findings of steps that are trained again."""
        self.found = keep_until(self.stage.path(HEALTH), state.global_step)
        self.stage.notes["health"] = self.found
        self._check_signal(state, control)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Raise `NotFinite` for a reward that is not finite: it may silence a whole group."""
        for reward in self.rewards:
            if reward.nonfinite:
                raise NotFinite(
                    f"reward {reward.__name__} returned {reward.nonfinite}, at step "
                    f"{state.global_step}; let it return None where it does not apply"
                )

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Report findings; raise `Stopped` if asked to, in every process: all have these logs."""
        known = {row["rule"] for row in self.found}
        for name, rule in RULES.items():
            seen = None if name in known else rule.seen(state.log_history)
            if seen and self.args.health != "off":
                self._report(name, rule, seen, state.global_step)
        self._check_signal(state, control)

    def _report(self, name: str, rule: Rule, seen: str, step: int) -> None:
        """Log and save a finding; raise `Stopped` with `health: stop`."""
        row: Row = {"step": step, "rule": name, "action": self.args.health, "seen": seen}
        row |= {"means": rule.means, "change": rule.change}
        self.found.append(row)
        text = f"step {step}, {name}: {seen}: {rule.means}. What to change: {rule.change}"
        if is_main_process():
            logger.warning("health, %s", text)
            with JsonLines(self.stage.path(HEALTH)) as lines:
                lines.append(row)
        if self.args.health == "stop":  # not done, and the same settings would end the same
            raise Stopped(f"{text}. To continue: `health: warn`", 1)

    def _check_signal(self, state: TrainerState, control: Any) -> None:
        """End training after too many steps without a signal, or raise `NothingTrained`."""
        if done := learnt(state.log_history, self.args.max_zero_advantage_steps):
            at = f"after step {state.global_step} of {state.max_steps}"
            self.stage.notes["stopped_early"] = f"{at}, since {done}"
            control.should_training_stop = True


def learnt(logs: Sequence[Row], limit: int) -> str | None:
    """Return why nothing is left to learn, or None while there is a signal or too few steps.

    Raises `NothingTrained` when there never was a signal, or the policy has become worse.
    """
    if not logs or "train_runtime" in logs[-1] or not 0 < limit <= (idle := idle_steps(logs)):
        return None
    same = f"in {idle} steps the completions of every group had the same reward"
    first = int(logs[-1]["step"]) - idle
    before, now = _mean_reward(logs, first - limit, first), _mean_reward(logs, first)
    if first == 0:
        raise NothingTrained(
            f"{same} ({now:.3f} on average). If that is the lowest reward, train a cold start "
            "first, take easier tasks, or raise num_generations; if it is the highest, take harder "
            f"tasks or leave the stage out. {WAIT}"
        )
    if not now >= before:
        raise NothingTrained(
            f"{same}, and it fell from {before:.3f} to {now:.3f}: the policy has collapsed. Start "
            f"again with a lower learning_rate, or `beta` above 0. {WAIT}"
        )
    return f"{same}, no lower than before ({now:.3f} and {before:.3f}): nothing is left to learn"


def idle_steps(logs: Sequence[Row]) -> int:
    """Return for how many steps, up to the last log, no group had two rewards.

    Steps that train again on the same completions log no groups; they count.
    """
    shares = [(log["step"], log[ZERO_ADVANTAGE]) for log in logs if ZERO_ADVANTAGE in log]
    if not shares:
        return 0
    return int(logs[-1]["step"] - next((step for step, share in shares[::-1] if share < 1), 0))


def _mean_reward(logs: Sequence[Row], after: int, until: float = math.inf) -> float:
    """Return the mean reward of some steps, NaN where no completion had one."""
    rewards = [log["reward"] for log in logs if after < log["step"] <= until and "reward" in log]
    return fmean(rewards) if rewards else math.nan
