"""Log, checkpoint, resume and stop while a trainer trains."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from chainforge.core.errors import Failed, Stopped
from chainforge.core.jsonl import JsonLines, Row, read_rows, write_rows
from chainforge.train import checkpoints, trl_internals
from chainforge.train.stage import Stage, is_main_process

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.2  # progress.json is too expensive for each of many short steps
DIVERGED = "Training has diverged: lower learning_rate, or set max_grad_norm or warmup_steps"


class NothingTrained(Failed):
    """A training stage that took no step, changed no weight, or had nothing to learn from."""


class NotFinite(Failed):
    """A loss, a gradient, a weight or a reward that is NaN or infinite."""


class RunIsOver(Exception):
    """Raised when the checkpoint that was loaded is the end of the run."""


class StageCallback(TrainerCallback):
    """Append each log to `metrics.jsonl`, report the progress, and stop when training diverges."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._course: dict[str, list[float]] = {}  # first and last loss and reward
        self._reported = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Remove the logs of steps that a resumed run trains again."""
        for row in keep_until(self.stage.path("metrics.jsonl"), state.global_step):
            self._follow(row)
        self.stage.progress(state.global_step, state.max_steps, "steps", self.note)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write the numbers, null where one is not finite; raise `NotFinite` for loss and gradient.

        The summary at the end is left out: a resumed run's would cover only its own part.
        """
        if not logs or "train_runtime" in logs:
            return
        numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
        if is_main_process():
            row = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
            with JsonLines(self.stage.path("metrics.jsonl")) as metrics:
                metrics.append({"step": state.global_step} | row)
        self._follow(numbers)
        # In fp16 a gradient may overflow: the scaler skips that step and lowers its scale.
        for key in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            if not math.isfinite(numbers.get(key, 0.0)):
                raise NotFinite(f"{key} is {numbers[key]} at step {state.global_step}. {DIVERGED}")

    def _follow(self, numbers: Row) -> None:
        for key in ("loss", "reward"):
            if numbers.get(key) is not None:
                self._course[key] = [*self._course.get(key, ())[:1], numbers[key]]

    @property
    def note(self) -> str:
        """The course of the reward, or of the loss: the loss of RL says nothing."""
        for key in ("reward", "loss"):
            if values := self._course.get(key):
                return f"{key} " + " → ".join(f"{value:.2f}" for value in values)
        return ""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Report the progress, a few times a second."""
        if (now := time.monotonic()) - self._reported >= PROGRESS_SECONDS:
            self.stage.progress(state.global_step, state.max_steps, "steps", self.note)
            self._reported = now

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Report the last step, which is logged after it has ended."""
        self.stage.progress(state.global_step, state.max_steps, "steps", self.note)


def keep_until(path: Path, step: int) -> list[Row]:
    """Return a file's rows up to a checkpoint's step, none for 0, and remove the others.

    What is evaluated before the first step is logged as step 0, and will be again.
    """
    if not path.exists():
        return []
    rows = [row for row in read_rows(path, torn_tail=True) if step and row["step"] <= step]
    if is_main_process():
        write_rows(path, rows)
    return rows


class CheckpointCallback(TrainerCallback):
    """Seal checkpoints, resume exactly from them, and stop at one when a signal asks for it.

    Each checkpoint comes with a log, so that sums between two logs are never divided. Must be the
    last callback: it ends training when the state that was loaded is the end of the run.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.accelerator = trainer, trainer.accelerator
        self.signal = 0
        self.window = checkpoints.window(trainer.args)
        self.limit = trainer.args.save_total_limit
        trainer.args.save_total_limit = None  # transformers would remove the last whole one first

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Restore what transformers and TRL do not: the order of the data, the count of tokens.

        TRL's samplers draw each epoch's order from a generator of their own, which starts from its
        seed in a resumed run: draw the orders of finished epochs, and drop them.
        """
        if 0 < state.max_steps <= state.global_step or control.should_training_stop:
            raise RunIsOver
        batches: Any = getattr(kwargs.get("train_dataloader"), "batch_sampler", None)
        while hasattr(batches, "batch_sampler"):  # several processes share one sampler's batches
            batches = batches.batch_sampler
        sampler: Any = getattr(batches, "sampler", None)
        if hasattr(sampler, "generator") and not hasattr(sampler, "set_epoch"):
            if sampler.generator is None:  # it would draw from what training itself draws from
                seed = args.seed if args.data_seed is None else args.data_seed
                sampler.generator = torch.Generator().manual_seed(seed)
            for _ in range(int(state.epoch or 0)):
                next(iter(sampler), None)
        counts = [log["num_tokens"] for log in state.log_history if "num_tokens" in log]
        if counts:
            trl_internals.set_token_count(self.trainer, int(counts[-1]))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stop if any process was asked to, all at the same step; log before saving.

        In GRPO that is the end of a generation window: a checkpoint does not have the completions
        that are still to be trained on.
        """
        past = state.global_step % self.window
        if past and self.signal:
            name, end = signal.Signals(self.signal).name, state.global_step - past + self.window
            words = "%s: stopping after step %d, the end of this generation window"
            logger.warning(words, name, end)
        elif past == 0:
            if self.accelerator.num_processes > 1:
                mine = torch.tensor([self.signal], device=self.accelerator.device)
                self.signal = int(self.accelerator.gather(mine).max())
            if self.signal:
                control.should_save = control.should_training_stop = True
        ending = control.should_save or control.should_evaluate or control.should_training_stop
        control.should_log = control.should_log or ending  # an evaluation may save, too

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Log before saving, and do not save again what the epoch's last step has just saved."""
        control.should_save = control.should_save and not checkpoints.is_sealed(_place(args, state))
        control.should_log = control.should_log or control.should_save

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint when every process has written its part."""
        self.accelerator.wait_for_everyone()
        if is_main_process():
            place = _place(args, state)
            checkpoints.seal(place)
            checkpoints.rotate(place.parent, self.limit, state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def note_signal(self, number: int) -> None:
        """Note a signal that asks for a stop; a second Ctrl-C ends the process at once."""
        if self.signal and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = self.signal or number

    def check_signal(self, state: TrainerState) -> None:
        """Raise `Stopped` when a signal has ended training before its last step."""
        if self.signal and state.global_step < state.max_steps:
            raise Stopped(
                f"by {signal.Signals(self.signal).name} after step {state.global_step} of "
                f"{state.max_steps}; run the same command again to resume from there",
                128 + self.signal,
            )


def _place(args: Any, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
