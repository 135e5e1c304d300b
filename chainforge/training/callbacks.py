"""What is written down while a trainer trains."""

from __future__ import annotations

import json
import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chainforge.core.records import JsonLines, read_rows
from chainforge.data.sampling.harvest import Recorder
from chainforge.training.stage import Stage, is_main_process


class StageCallback(TrainerCallback):
    """Append each log to `metrics.jsonl` and leave word of the progress."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.note = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the logs of steps that a resumed run will take again."""
        path = self.stage.path("metrics.jsonl")
        if not is_main_process():
            return
        if path.exists():
            kept = [
                row for row in read_rows(path, torn_tail=True) if row["step"] <= state.global_step
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self.stage.progress(state.global_step, state.max_steps, "steps")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the numbers down; what is not finite is written as null."""
        if not is_main_process() or not logs:
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
        """Move the bar."""
        self.stage.progress(state.global_step, state.max_steps, "steps", self.note)


class RolloutCallback(TrainerCallback):
    """Forget the rollouts of steps that a resumed run will take again."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the recorder's files to the step that training goes on from."""
        self.recorder.resume(state.global_step)
