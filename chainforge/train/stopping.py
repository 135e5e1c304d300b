"""End training in good order when a signal asks for it, as Slurm and spot machines do."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chainforge.core.errors import Stopped
from chainforge.core.process import leave_terminal, stop_signals
from chainforge.train.checkpoints import window
from chainforge.train.stage import Stage

logger = logging.getLogger(__name__)


class StopCallback(TrainerCallback):
    """On SIGINT, SIGTERM or SIGHUP save a checkpoint and stop, at the next step to resume from.

    In GRPO that is the end of a generation window: a checkpoint does not hold the completions that
    are still to be trained on. Whoever cannot wait for it kills the run, which then goes on from
    the last checkpoint that there is. A second Ctrl-C ends the process at once; SIGTERM may well
    come twice, from a scheduler and from a launcher that passes it on.
    """

    def __init__(self, trainer: Any, stage: Stage) -> None:
        self.asked = 0
        self._told = False
        self._stage = stage
        self._window = window(trainer.args)
        self._accelerator = trainer.accelerator

    @contextlib.contextmanager
    def heeding(self) -> Iterator[None]:
        """Note the signals instead of dying of them."""
        before = {}
        for number in stop_signals():
            with contextlib.suppress(ValueError):  # not in the main thread
                before[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        leave_terminal()
        if self.asked and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = self.asked or number

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop if any process was asked to, all of them at the same step."""
        over = state.global_step % self._window
        if over == 0:
            self._ask_the_others()
        if not self.asked or control.should_training_stop:
            return
        name, step = signal.Signals(self.asked).name, state.global_step
        if over:
            end = step - over + self._window
            words = f"{name}: to stop after step {end}, where this generation is trained on"
            if not self._told:
                logger.warning("%s; killed before, the run goes on from its last checkpoint", words)
            self._told = True
        else:
            words = f"{name}: stopping after step {step}"
            control.should_save = control.should_training_stop = True
        self._stage.progress(step, state.max_steps, "steps", words)

    def _ask_the_others(self) -> None:
        if self._accelerator.num_processes > 1:
            mine = torch.tensor([self.asked], device=self._accelerator.device)
            self.asked = int(self._accelerator.gather(mine).max())

    def check(self, state: TrainerState) -> None:
        """Raise `Stopped` when a signal has ended training before its last step."""
        if self.asked and state.global_step < state.max_steps:
            raise Stopped(
                f"by {signal.Signals(self.asked).name} after step {state.global_step} of "
                f"{state.max_steps}; run the same command again to go on from there",
                128 + self.asked,
            )
