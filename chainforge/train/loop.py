"""Train to the end, from the last whole checkpoint if there is one, and save the policy."""

from __future__ import annotations

import logging
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerState

from chainforge.core.errors import Failed, first_line
from chainforge.core.jsonl import DiskFull, no_room, writing
from chainforge.core.process import noting_stops
from chainforge.train import checkpoints, trl_internals
from chainforge.train.callbacks import (
    DIVERGED,
    CheckpointCallback,
    NotFinite,
    NothingTrained,
    RunIsOver,
    StageCallback,
)
from chainforge.train.distributed import LESS_MEMORY
from chainforge.train.policy import check_reference, upcast_adapter
from chainforge.train.stage import Stage, is_main_process

logger = logging.getLogger(__name__)


def train(trainer: Any, stage: Stage, *callbacks: TrainerCallback) -> None:
    """Train, from the last whole checkpoint if there is one, and save the policy.

    Raises `NothingTrained` when no weight changed, `NotFinite` when training diverged, `Stopped`
    when a signal asked for the end, `DiskFull` when there is no room. The last checkpoint stays.
    """
    upcast_adapter(trainer, stage)
    check_reference(trainer)
    before = _weight_sums(trainer.model)
    if not before:
        raise NothingTrained("no parameter of the model requires a gradient")
    # Else transformers would log the mean of other losses instead of one that is NaN.
    trainer.args.logging_nan_inf_filter = False
    checkpoint = _checkpoint_for_all(trainer)
    last = CheckpointCallback(trainer)
    for callback in (StageCallback(stage), *callbacks, last):
        trainer.add_callback(callback)
    with noting_stops(last.note_signal):
        _run(trainer, checkpoint)
        if early := stage.notes.get("stopped_early"):
            logger.info("stopped early, %s", early)
        else:
            last.check_signal(trainer.state)
        _check_trained(trainer, before)
        from chainforge.train.saving import save

        stage.metrics |= _metrics(trainer.state)
        with writing(stage.path("model")):
            save(trainer, stage)


def _checkpoint_for_all(trainer: Any) -> Path | None:
    """Return the checkpoint to resume from: the first process chooses, and all take the same."""
    directory = Path(trainer.args.output_dir)
    choice: list[Path | None] = [None]
    if is_main_process():
        there = directory.is_dir() and any(directory.iterdir())
        choice = [checkpoints.last_good(directory, trainer.accelerator.num_processes)]
        if choice[0]:
            logger.info("resuming from %s", choice[0])
        elif there:  # it ends where it would have ended: only time is lost
            logger.warning("%s has no whole checkpoint: starting from the beginning", directory)
    broadcast_object_list(choice)
    return choice[0]


def _run(trainer: Any, checkpoint: Path | None) -> None:
    """Run TRL's loop; give known failures a message that says what to do."""
    directory = Path(trainer.args.output_dir)
    try:
        with writing(directory):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RunIsOver:
        logger.info("%s is the end of the run: nothing is left to train", checkpoint)
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trl_internals.load_best_model(trainer)
    except DiskFull as error:
        # An unfinished checkpoint is useless, and its room is needed.
        if not is_main_process() or (cut := checkpoints.remove_unsealed(directory)) is None:
            raise
        words = f"{no_room(cut)}. `save_total_limit: 1` keeps the newest checkpoint only"
        raise DiskFull(words) from error
    except torch.OutOfMemoryError as error:
        step = trainer.state.global_step
        words = f"out of memory after step {step} ({first_line(error)}): {LESS_MEMORY}; "
        words += "`chainforge doctor` estimates the memory of a stage"
        raise Failed(words) from error
    except (RuntimeError, FloatingPointError) as error:
        words = "probability tensor contains"  # torch.multinomial's
        if isinstance(error, RuntimeError) and words not in str(error):
            raise
        step = trainer.state.global_step  # sampling from NaN fails before the loss is logged
        words = f"the policy's probabilities are not finite after step {step}. {DIVERGED}"
        raise NotFinite(words) from error


def _check_trained(trainer: Any, before: dict[str, int]) -> None:
    """Raise `NothingTrained` when no step was taken, or none changed a weight."""
    steps = trainer.state.global_step
    if steps == 0:
        raise NothingTrained("no step was taken: the data contain less than one batch")
    accelerator = trainer.accelerator  # each process may hold a part of the weights
    changed = torch.tensor([_weight_sums(trainer.model) != before], device=accelerator.device)
    if not accelerator.gather(changed).any():
        raise NothingTrained(
            f"no weight changed in {steps} steps: every gradient was zero, as in RL when all "
            "completions of every group have the same reward (frac_zero_advantage in metrics.jsonl)"
        )


def _weight_sums(model: Any) -> dict[str, int]:
    """Return one number for each trainable weight, to see whether training moved it.

    The sum of the weight's bits, taken as integers, is the same on every device and in any order.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            part = getattr(weight, "ds_tensor", weight).detach()  # ZeRO-3's part of it, or FSDP2's
            part = part.to_local() if hasattr(part, "to_local") else part
            bits = part.contiguous().view(integers[part.element_size()])
            sums[name] = int(bits.sum(dtype=torch.int64))
    return sums


def _metrics(state: TrainerState, window: int = 10) -> dict[str, Any]:
    """Return the metrics of a run for its manifest: steps, mean loss, and reward at the end.

    Computed from the logs, which a checkpoint has as well: a resumed run returns the same.
    """
    metrics: dict[str, Any] = {"steps": state.global_step}
    if losses := [log["loss"] for log in state.log_history if "loss" in log]:
        metrics["train_loss"] = fmean(losses)
    if rewards := [log["reward"] for log in state.log_history if "reward" in log]:
        metrics["reward"] = round(fmean(rewards[-window:]), 4)
    return metrics
