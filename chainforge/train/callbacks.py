"""What is written down while a trainer trains, and what a run that goes on takes up again."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chainforge.core.jsonl import JsonLines, Row, read_rows, write_rows
from chainforge.generate.harvest import Recorder
from chainforge.generate.shards import own_file
from chainforge.train import checkpoints
from chainforge.train.stage import Stage, is_main_process

# Word of the progress is a file that is replaced: too much for each of many short steps.
TELL_SECONDS = 0.2


class StageCallback(TrainerCallback):
    """Append each log to `metrics.jsonl` and leave word of the progress."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.note = ""
        self._told = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the logs of steps that a resumed run will take again."""
        path = self.stage.path("metrics.jsonl")
        if not is_main_process():
            return
        if path.exists():
            write_rows(path, rows_until(path, state.global_step))
        self.stage.progress(state.global_step, state.max_steps, "steps")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the numbers down; what is not finite is written as null.

        Not those of the whole run, which a resumed run would have for its own part only.
        """
        if not is_main_process() or not logs or "train_runtime" in logs:
            return
        row: dict[str, Any] = {"step": state.global_step}
        for key, value in logs.items():
            if isinstance(value, int | float):
                row[key] = value if math.isfinite(value) else None
        with JsonLines(self.stage.path("metrics.jsonl")) as metrics:
            metrics.append(row)
        for key in ("reward", "loss"):
            if isinstance(logs.get(key), int | float):
                self.note = f"{key} {logs[key]:.3f}"
                break

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar, a few times a second and at the end."""
        now = time.monotonic()
        if now - self._told >= TELL_SECONDS or state.global_step >= state.max_steps:
            self.stage.progress(state.global_step, state.max_steps, "steps", self.note)
            self._told = now


def rows_until(path: Path, step: int) -> list[Row]:
    """Return the rows of the steps that a checkpoint holds; none where a run begins anew.

    What is evaluated before the first step is logged as step 0, and will be again.
    """
    rows = read_rows(path, torn_tail=True) if step and path.exists() else []
    return [row for row in rows if row["step"] <= step]


class RolloutCallback(TrainerCallback):
    """Forget the rollouts of steps that a resumed run will take again."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the recorder's files to the step that training goes on from."""
        self.recorder.resume(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See that a checkpoint never outlasts the rollouts it was trained on."""
        path = own_file(self.recorder.path)
        if path.exists():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


class ResumeCallback(TrainerCallback):
    """Take up what transformers and TRL leave behind when a run goes on.

    TRL's samplers draw each epoch's order from a generator of their own, which a resumed run
    begins anew: it would take the first epoch's order again. The tokens that SFT has seen are
    counted from 0 again.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw, and drop, the orders of the epochs that are over; count tokens on."""
        batches: Any = getattr(kwargs.get("train_dataloader"), "batch_sampler", None)
        while hasattr(batches, "batch_sampler"):  # several processes share one sampler's batches
            batches = batches.batch_sampler
        sampler: Any = getattr(batches, "sampler", None)
        if hasattr(sampler, "generator") and not hasattr(sampler, "set_epoch"):
            if sampler.generator is None:  # it would draw from what training itself draws from
                sampler.generator = _seeded(args.seed if args.data_seed is None else args.data_seed)
            for _ in range(int(state.epoch or 0)):
                next(iter(sampler), None)
        counts = [log["num_tokens"] for log in state.log_history if "num_tokens" in log]
        if counts and hasattr(self.trainer, "_total_train_tokens"):
            self.trainer._total_train_tokens = int(counts[-1])


def _seeded(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)


class CheckpointCallback(TrainerCallback):
    """Make checkpoints count once they are whole, and remove old ones only then.

    Each comes with a log, so that what is summed up between logs is never cut in two.
    """

    def __init__(self, trainer: Any) -> None:
        self.limit = trainer.args.save_total_limit
        self.wait = trainer.accelerator.wait_for_everyone
        trainer.args.save_total_limit = None  # transformers would remove the last whole one first

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log before saving, before evaluating, which may save, and at the end."""
        ending = control.should_training_stop
        control.should_log |= control.should_save or control.should_evaluate or ending

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do not write a checkpoint twice that the epoch's last step has just made."""
        if checkpoints.is_sealed(_place(args, state)):
            control.should_save = False
        self.on_step_end(args, state, control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seal the checkpoint when every process has written its part."""
        self.wait()
        if is_main_process():
            place = _place(args, state)
            checkpoints.seal(place)
            checkpoints.rotate(place.parent, self.limit, state.best_model_checkpoint)
        self.wait()


def _place(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
