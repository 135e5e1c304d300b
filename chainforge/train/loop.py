"""Train to the end, from the last whole checkpoint if there is one, and save the policy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerState

from chainforge.core import disk
from chainforge.core.errors import Failed, InputError, first_line
from chainforge.train import checkpoints, trl_internals
from chainforge.train.callbacks import (
    DIVERGED,
    CheckpointCallback,
    NotFinite,
    NothingTrained,
    RunIsOver,
    StageCallback,
    StopCallback,
)
from chainforge.train.policy import check_reference, upcast_adapter
from chainforge.train.saving import save
from chainforge.train.stage import Stage, is_main_process

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    "Change, in this order: `gradient_checkpointing: true`; half of per_device_train_batch_size "
    "with twice gradient_accumulation_steps; a smaller max_length or max_completion_length; with "
    "vLLM `vllm_enable_sleep_mode: true`; `use_peft: true`; `load_in_4bit: true`; several GPUs "
    "with fsdp2 or zero3. `chainforge doctor` estimates the memory of every stage"
)


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
    stop = StopCallback(trainer, stage)
    for callback in (StageCallback(stage), *callbacks, stop, CheckpointCallback(trainer)):
        trainer.add_callback(callback)
    with stop.on_signals():
        _run(trainer, checkpoint)
        early = stage.notes.get("stopped_early")
        if early:
            logger.info("stopped early, %s", early)
            step, steps = trainer.state.global_step, trainer.state.max_steps
            note = f"stopped early: nothing left to learn after step {step}"
            stage.progress(step, steps, "steps", note)
        else:
            stop.check(trainer.state)
        _check_trained(trainer, before)
        stage.metrics |= _metrics(trainer.state)
        with disk.writing(stage.path("model")):
            save(trainer, stage)
    if is_main_process():
        checkpoints.remove_damaged(Path(trainer.args.output_dir))


def _checkpoint_for_all(trainer: Any) -> Path | None:
    """Return the checkpoint to resume from: the first process chooses, and all take the same."""
    directory, processes = Path(trainer.args.output_dir), trainer.accelerator.num_processes
    choice: list[Any] = [None]
    if is_main_process():
        there = directory.is_dir() and any(directory.iterdir())
        try:
            good = checkpoints.last_good(directory, processes)
            choice = [good.name if good else None]
        except InputError as error:
            choice = [error]
        if there and choice == [None]:
            # It ends where it would have ended: only time is lost.
            logger.warning("%s has no whole checkpoint: starting from the beginning", directory)
    broadcast_object_list(choice)
    if isinstance(choice[0], InputError):
        raise choice[0]
    if choice[0] is None:
        return None
    path: Path = directory / choice[0]
    if not path.is_dir():
        raise InputError(
            f"{path} exists for the first process only: all machines of a launch must share the "
            "disk of output_dir"
        )
    logger.info("resuming from %s", path)
    return path


def _run(trainer: Any, checkpoint: Path | None) -> None:
    """Run TRL's loop; give known failures a message that says what to do."""
    directory = Path(trainer.args.output_dir)
    try:
        with disk.writing(directory):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RunIsOver:
        logger.info("%s is the end of the run: nothing is left to train", checkpoint)
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trl_internals.load_best_model(trainer)
    except disk.DiskFull as error:
        # An unfinished checkpoint is useless, and its room is needed.
        if not is_main_process() or (cut := checkpoints.remove_unsealed(directory)) is None:
            raise
        words = f"{disk.message(cut)}. `save_total_limit: 1` keeps the newest checkpoint only"
        raise disk.DiskFull(words) from error
    except torch.OutOfMemoryError as error:
        step = trainer.state.global_step
        words = f"out of memory after step {step} ({first_line(error)}). {OUT_OF_MEMORY}"
        raise Failed(words) from error
    except RuntimeError as error:
        # Sampling from NaN fails in torch, a step before the loss is logged.
        if isinstance(error, Failed):
            raise
        step = trainer.state.global_step
        if not _weights_are_finite(trainer.model):
            raise NotFinite(f"weights are not finite after step {step}. {DIVERGED}") from error
        if "probability tensor contains" in str(error):  # torch.multinomial's words
            words = f"the policy's probabilities are not finite after step {step}. {DIVERGED}"
            raise NotFinite(words) from error
        raise


def _check_trained(trainer: Any, before: dict[str, int]) -> None:
    steps = trainer.state.global_step
    if steps == 0:
        raise NothingTrained("no step was taken: the data have less than one batch")
    accelerator = trainer.accelerator  # each process may hold a part of the weights
    changed = torch.tensor([_weight_sums(trainer.model) != before], device=accelerator.device)
    if not accelerator.gather(changed).any():
        raise NothingTrained(
            f"no weight changed in {steps} steps: every gradient was zero. In RL this means that "
            "all completions of every group had the same reward (frac_zero_advantage in "
            "metrics.jsonl)"
        )


def _weight_sums(model: Any) -> dict[str, int]:
    """Return one number for each trainable weight, to see whether training moved it.

    The sum of the weight's bits, taken as integers, is the same on every device and in any order.
    """
    return {
        name: int(_bits(weight).sum(dtype=torch.int64))
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def _local(weight: Any) -> torch.Tensor:
    """Return this process's part of a weight that FSDP2 or ZeRO-3 shards."""
    part = getattr(weight, "ds_tensor", weight).detach()
    return part.to_local() if hasattr(part, "to_local") else part  # type: ignore[no-any-return]


def _bits(weight: Any) -> torch.Tensor:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    part = _local(weight)
    return part.contiguous().view(integers[part.element_size()])


def _weights_are_finite(model: Any) -> bool:
    return all(
        bool(torch.isfinite(_local(weight)).all())
        for weight in model.parameters()
        if weight.requires_grad
    )


def _metrics(state: TrainerState, window: int = 10) -> dict[str, Any]:
    """Return the metrics of a run for its manifest: steps, mean loss, and reward at the end.

    Computed from the logs, which a checkpoint has as well: a resumed run returns the same.
    """
    losses = [log for log in state.log_history if "loss" in log]
    ends = [log["step"] for log in losses]
    spans = [end - start for start, end in zip([0, *ends], ends)]
    metrics: dict[str, Any] = {"steps": state.global_step}
    if sum(spans):
        total = sum(log["loss"] * span for log, span in zip(losses, spans))
        metrics["train_loss"] = total / sum(spans)
    rewards = [log["reward"] for log in state.log_history if isinstance(log.get("reward"), float)]
    if rewards:
        last = rewards[-window:]
        metrics["reward"] = round(sum(last) / len(last), 4)
    return metrics
