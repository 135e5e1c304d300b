"""Watch over RL while it runs: say what goes wrong, once, and stop it where that was asked for.

The rules are in `symptoms.py`. What they find goes to the log, to `health.jsonl` and into the
manifest, once for each episode: an episode is over when a rule has been silent for `PAUSE` logs.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chainforge.core.errors import InputError, Stopped, hint
from chainforge.core.jsonl import JsonLines, Row, write_rows
from chainforge.generate.shards import world_size
from chainforge.train.callbacks import rows_until
from chainforge.train.stage import Stage, is_main_process
from chainforge.train.symptoms import RULES
from chainforge.train.trends import Finding

logger = logging.getLogger(__name__)

HEALTH = "health.jsonl"
ACTIONS = ("warn", "stop", "off")
PAUSE = 8
FAILED = 1  # exit code: the stage is not done, and the same again would end the same


@dataclass
class HealthArgs:
    """What is watched, and what a finding leads to."""

    health: Literal["warn", "stop", "off"] = field(
        default="warn",
        metadata={
            "help": "What follows when a rule finds RL unwell: a warning, a stop of the stage "
            "(its checkpoints stay), or nothing at all."
        },
    )
    health_rules: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Rules with another action or other thresholds, such as {truncated: stop, "
            "kl_growth: {action: warn, most: 1.0}}. Rules: " + ", ".join(RULES) + "."
        },
    )


@dataclass(frozen=True)
class Watch:
    """A rule with its action and thresholds."""

    name: str
    action: str
    thresholds: Mapping[str, float]

    def look(self, history: list[Row]) -> Finding | None:
        """Return what the rule finds."""
        return RULES[self.name](history, **self.thresholds)


def watches(args: HealthArgs) -> list[Watch]:
    """Return the rules that are to be applied; raise `InputError` for what is none."""
    for name in args.health_rules:
        if name not in RULES:
            raise InputError(f"health_rules: no rule {name!r}; {hint(str(name), RULES)}")
    found = []
    for name, rule in RULES.items():
        own = args.health_rules.get(name, {})
        # YAML reads a bare off as false.
        given = dict(own) if isinstance(own, Mapping) else {"action": own}
        action = given.pop("action", args.health)
        action = "off" if action is False else action
        if action not in ACTIONS:
            raise InputError(f"health_rules: {name}: {action!r} is none of {', '.join(ACTIONS)}")
        known = list(inspect.signature(rule).parameters)[1:]
        for key, value in given.items():
            where = f"health_rules: {name}: {key}"
            if key not in known:
                raise InputError(f"{where}: no such threshold; {hint(str(key), known)}")
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise InputError(f"{where}: expected a number from 0, found {value!r}")
            if key in ("window", "evaluations") and (value != int(value) or value < 2):
                raise InputError(f"{where}: expected a whole number from 2, found {value!r}")
        if action != "off":
            found.append(Watch(name, action, given))
    return found


class HealthCallback(TrainerCallback):
    """Apply the rules to each log."""

    def __init__(self, args: HealthArgs, stage: Stage) -> None:
        self.watches = watches(args)
        self.stage = stage
        self.history: list[Row] = []
        self.silent: dict[str, int] = {}  # logs since a rule last fired, while an episode lasts

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the logs of steps before; forget what was found in steps to be taken again."""
        if not is_main_process():
            return
        self.history = rows_until(self.stage.path("metrics.jsonl"), state.global_step)
        found = rows_until(self.stage.path(HEALTH), state.global_step)
        if found or self.stage.path(HEALTH).exists():
            write_rows(self.stage.path(HEALTH), found)
        self.stage.notes["health"] = found
        self.silent = {watch.name: 0 for watch in self.watches if watch.look(self.history)}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at what was logged; raise `Stopped` in every process when a rule says so."""
        reason = None
        if is_main_process() and logs:
            numbers = {
                key: value
                for key, value in logs.items()
                if isinstance(value, int | float) and math.isfinite(value)
            }
            self.history.append({"step": state.global_step} | numbers)
            reason = self._look(state.global_step)
        if any(watch.action == "stop" for watch in self.watches):
            reason = _of_main(reason)
        if reason:
            raise Stopped(reason, FAILED)

    def _look(self, step: int) -> str | None:
        """Report what is new; return why to stop, if a rule says so."""
        reason = None
        for watch in self.watches:
            finding = watch.look(self.history)
            if finding is None:
                if watch.name in self.silent:
                    self.silent[watch.name] += 1
                    if self.silent[watch.name] >= PAUSE:
                        del self.silent[watch.name]
                continue
            known = watch.name in self.silent
            self.silent[watch.name] = 0
            if known:
                continue
            row = {"step": step, "rule": watch.name, "action": watch.action} | asdict(finding)
            with JsonLines(self.stage.path(HEALTH)) as lines:
                lines.append(row)
            self.stage.notes["health"].append(row)
            text = (
                f"step {step}, {watch.name}: {finding.seen}. It usually means that "
                f"{finding.means}. What to change: {finding.change}."
            )
            logger.warning("health, %s", text)
            if watch.action == "stop":
                reason = reason or f"{text} To go on: `health_rules: {{{watch.name}: warn}}`."
        return reason


def _of_main(reason: str | None) -> str | None:
    """Return the first process's answer in every process: all stop, or none does."""
    if world_size() == 1:
        return reason
    from accelerate.utils import broadcast_object_list

    answer = [reason]
    broadcast_object_list(answer)
    return answer[0]
