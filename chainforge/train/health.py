"""Watch RL while it trains: warn when a metric leaves its healthy range, stop without a signal.

A finding goes to the log, to `health.jsonl` and into the manifest, once for each episode: an
episode ends when a rule has not fired for `PAUSE` logs. Everything is computed from the logs, which
a checkpoint has as well, so a resumed run finds and decides the same.

Limits: axolotl, docs/training_stability.qmd, "Key Metrics for RL (GRPO)"; DAPO (arXiv 2503.14476),
sections 3 and 4.3.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerState

from chainforge.core.errors import InputError, Stopped, hint
from chainforge.core.jsonl import JsonLines, Row, write_rows
from chainforge.rewards.reward import Reward
from chainforge.train.callbacks import NotFinite, NothingTrained, rows_until
from chainforge.train.rl_args import RLArgs
from chainforge.train.stage import Stage, is_main_process

logger = logging.getLogger(__name__)

HEALTH = "health.jsonl"
ACTIONS = ("warn", "stop", "off")
PAUSE = 8
ZERO_ADVANTAGE = "frac_zero_advantage"
TRUNCATED = "completions/clipped_ratio"
Values = Sequence[tuple[int, float]]  # steps and what was logged there


@dataclass(frozen=True)
class Rule:
    """A metric and the limit that its mean over the last `window` logs must not pass."""

    metric: str
    limit: float
    above: bool  # whether it fires above or below the limit
    means: str
    change: str
    window: int = 8
    action: str = "warn"

    def seen(self, values: Values) -> str | None:
        """Return the mean, its steps and the limit when the rule fires."""
        last = values[-self.window :]
        if len(last) < self.window:
            return None
        mean = fmean(value for _, value in last)
        if not (mean > self.limit if self.above else mean < self.limit):
            return None
        side = "above" if self.above else "below"
        steps = f"steps {last[0][0]}-{last[-1][0]}"
        return f"{self.metric} is {mean:.3g} ({steps}), {side} {self.limit:g}"

    def finding(self, values: Values) -> str | None:
        """Return what is seen, unless an episode of the rule has begun before the last value."""
        values = values[-self.window - PAUSE :]
        if not values or any(self.seen(values[:-n]) for n in range(1, PAUSE + 1)):
            return None
        return self.seen(values)


RULES = {
    "truncated": Rule(
        TRUNCATED,
        0.3,
        above=True,
        means="a completion that is cut off has no answer and gets no reward, right or wrong",
        change="a larger `max_completion_length`; or `mask_truncated_completions: true` and the "
        "reward `soft_overlong`, as in `preset: modern`",
    ),
    "zero_advantage": Rule(
        ZERO_ADVANTAGE,
        0.8,
        above=True,
        means="in most groups all completions have the same reward, so most of what is generated "
        "trains nothing: the prompts are too easy or too hard for this policy",
        change="`tasks` of another difficulty, or `gate_pool` with pass rates of this policy; a "
        "larger `num_generations`",
    ),
    "entropy_collapse": Rule(
        "entropy",
        0.01,
        above=False,
        means="the policy writes nearly the same completion each time and stops exploring",
        change="`epsilon_high: 0.28` with several updates per rollout; a lower `learning_rate`; "
        "`temperature: 1.0`; `beta` above 0, or `entropy_coef`",
    ),
    "kl_growth": Rule(
        "kl",
        0.5,
        above=True,
        means="the policy is moving far from the one it started from: it loses other abilities, "
        "or exploits a reward",
        change="a larger `beta`; a lower `learning_rate`; see `rollouts.jsonl` for what is "
        "rewarded",
    ),
}


def active_rules(args: RLArgs) -> dict[str, Rule]:
    """Return the rules to apply, with the user's actions and limits; raise `InputError`."""
    found = {name: replace(rule, action=args.health) for name, rule in RULES.items()}
    for name, value in args.health_rules.items():
        if name not in RULES:
            raise InputError(f"health_rules: no rule {name!r}; {hint(str(name), RULES)}")
        action = "off" if value is False else value  # YAML reads a bare off as false
        if action in ACTIONS:
            found[name] = replace(found[name], action=action)
        elif isinstance(value, int | float) and value is not True and value >= 0:
            found[name] = replace(found[name], limit=float(value))
        else:
            raise InputError(
                f"health_rules: {name}: expected {', '.join(ACTIONS)} or a limit >= 0, found "
                f"{value!r}"
            )
    return {name: rule for name, rule in found.items() if rule.action != "off"}


class HealthCallback(TrainerCallback):
    """Apply the rules to each log; end RL that has nothing to learn from."""

    def __init__(self, args: RLArgs, stage: Stage, rewards: Sequence[Reward] = ()) -> None:
        self.args, self.stage, self.rewards = args, stage, rewards
        self.rules = active_rules(args)
        self.values: dict[str, list[tuple[int, float]]] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Read the logs of earlier steps; forget findings of steps that are trained again."""
        if is_main_process():
            self.values = {}
            for row in rows_until(self.stage.path("metrics.jsonl"), state.global_step):
                self._add(row["step"], row)
            found = rows_until(self.stage.path(HEALTH), state.global_step)
            if found or self.stage.path(HEALTH).exists():
                write_rows(self.stage.path(HEALTH), found)
            self.stage.notes["health"] = found
        self._check_signal(state, control)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Raise `NotFinite` for a reward that is not finite: it may silence a whole group."""
        for reward in self.rewards:
            if reward.nonfinite:
                raise NotFinite(
                    f"reward {reward.__name__} returned {reward.nonfinite}, at step "
                    f"{state.global_step}. Fix the function (a division by zero, the logarithm of "
                    "zero?), or let it return None where it does not apply, and run the same "
                    "command again"
                )

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Report findings; raise `Stopped` in every process when a rule's action is stop."""
        reason: list[str | None] = [None]  # the first process decides for all
        if is_main_process() and logs:
            self._add(state.global_step, logs)
            reason = [self._report(state.global_step)]
        if any(rule.action == "stop" for rule in self.rules.values()):
            broadcast_object_list(reason)
        if reason[0]:
            raise Stopped(reason[0], 1)  # not done, and the same settings would end the same
        self._check_signal(state, control)

    def _add(self, step: int, logs: Mapping[str, Any]) -> None:
        for rule in self.rules.values():
            value = logs.get(rule.metric)
            if isinstance(value, int | float) and math.isfinite(value):
                self.values.setdefault(rule.metric, []).append((step, value))

    def _report(self, step: int) -> str | None:
        """Write down what is new at this step; return why to stop, if a rule says so."""
        reason = None
        for name, rule in self.rules.items():
            values = self.values.get(rule.metric, ())
            seen = rule.finding(values) if values and values[-1][0] == step else None
            if seen is None:
                continue
            row: Row = {"step": step, "rule": name, "action": rule.action, "seen": seen}
            row |= {"means": rule.means, "change": rule.change}
            with JsonLines(self.stage.path(HEALTH)) as lines:
                lines.append(row)
            self.stage.notes["health"].append(row)
            text = f"step {step}, {name}: {seen}. It usually means: {rule.means}. "
            text += f"What to change: {rule.change}."
            logger.warning("health, %s", text)
            if rule.action == "stop":
                reason = reason or f"{text} To continue: `health_rules: {{{name}: warn}}`."
        return reason

    def _check_signal(self, state: TrainerState, control: Any) -> None:
        """End training after too many steps without a signal, or raise `NothingTrained`."""
        limit = self.args.max_zero_advantage_steps
        done = learnt(state.log_history, limit) if limit > 0 else None
        if done:
            at = f"after step {state.global_step} of {state.max_steps}"
            self.stage.notes["stopped_early"] = f"{at}, since {done}"
            control.should_training_stop = True


_LIMIT = "`max_zero_advantage_steps` sets how long to wait"


def learnt(logs: Sequence[Row], limit: int) -> str | None:
    """Return why nothing is left to learn, or None while there is a signal or too few steps.

    Raises `NothingTrained` when there never was a signal, when the policy has become worse, or
    when no completion ended, for `limit` steps.
    """
    if not logs or "train_runtime" in logs[-1]:
        return None
    if steps_at_one(logs, TRUNCATED) >= limit:
        length = logs[-1].get("completions/max_length", math.nan)
        raise NothingTrained(
            f"for {limit} steps every completion was cut off at max_completion_length "
            f"({length:.0f} tokens): raise it, or see that the model ends its turn (its "
            f"end-of-sequence token). {_LIMIT}"
        )
    idle = steps_at_one(logs, ZERO_ADVANTAGE)
    if idle < limit:
        return None
    same = f"in {idle} steps the completions of every group had the same reward"
    first = int(logs[-1]["step"]) - idle
    before, now = _mean_reward(logs, first - limit, first), _mean_reward(logs, first)
    if first == 0:
        raise NothingTrained(
            f"{same} ({now:.3f} on average). If that is the lowest reward, train a cold start "
            "first, take easier tasks, raise num_generations or temperature, or add a reward that "
            "tells bad from worse; see rollouts.jsonl. If it is the highest, take harder tasks or "
            f"leave the stage out. {_LIMIT}"
        )
    if not now >= before:
        raise NothingTrained(
            f"{same}, and it fell from {before:.3f} to {now:.3f}: the policy has collapsed. Start "
            "again with a lower learning_rate, a higher temperature or `beta` above 0; an earlier "
            f"checkpoint may be better than this one. {_LIMIT}"
        )
    return f"{same}, no lower than before ({now:.3f} and {before:.3f}): nothing is left to learn"


def steps_at_one(logs: Sequence[Row], key: str) -> int:
    """Return for how many steps, up to the last log, a share has been 1; logs without it count."""
    if all(log.get(key) is None for log in logs):
        return 0
    below = (log["step"] for log in reversed(logs) if log.get(key) is not None and log[key] < 1)
    return int(logs[-1]["step"]) - int(next(below, 0))


def _mean_reward(logs: Sequence[Row], after: int, until: float = math.inf) -> float:
    """Return the mean reward of some steps, NaN where no completion had one."""
    steps = [log for log in logs if after < log["step"] <= until]
    rewards = [log["reward"] for log in steps if log.get("reward") is not None]
    return fmean(rewards) if rewards else math.nan
