"""Train: from the last whole checkpoint if there is one, to the same end, and never in vain."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chainforge.core import disk
from chainforge.core.errors import Failed, InputError
from chainforge.train import checkpoints
from chainforge.train.callbacks import CheckpointCallback, ResumeCallback, StageCallback
from chainforge.train.guards import DIVERGED, FiniteGuard, LearningGuard, NotFinite, NothingTrained
from chainforge.train.policy import check_reference, unround
from chainforge.train.saving import save
from chainforge.train.stage import Stage, is_main_process
from chainforge.train.stopping import StopCallback

logger = logging.getLogger(__name__)


class _Over(Exception):
    """The checkpoint that was loaded is the end of the run."""


def train(trainer: Any, stage: Stage, guard: LearningGuard | None = None) -> None:
    """Train, from the last whole checkpoint if there is one, and save the policy.

    Raises `NothingTrained` or `NotFinite` when training is in vain, `Stopped` when a signal asked
    for the end, `DiskFull` when there is no room: what was reached is kept, but for the first two.
    """
    unround(trainer, stage)
    check_reference(trainer)
    before = _weight_sums(trainer.model)
    if not before:
        raise NothingTrained("no parameter of the model requires a gradient")
    # Else transformers would log the mean of other losses instead of one that is NaN.
    trainer.args.logging_nan_inf_filter = False
    checkpoint = _checkpoint_for_all(trainer)
    stop = StopCallback(trainer, stage)
    callbacks = [ResumeCallback(trainer), StageCallback(stage), FiniteGuard(), guard, stop]
    for callback in (*callbacks, CheckpointCallback(trainer), _EndCallback(guard)):
        if callback:
            trainer.add_callback(callback)
    with stop.heeding():
        _run(trainer, checkpoint)
        if not (guard and guard.learnt):
            stop.check(trainer.state)
        _check_trained(trainer, before)
        stage.metrics |= _metrics(trainer.state)
        if guard and guard.learnt:
            logger.info("stopped early, %s", guard.learnt)
            stage.notes["stopped_early"] = guard.learnt
            note = f"stopped early: nothing left to learn after step {trainer.state.global_step}"
            stage.progress(trainer.state.global_step, trainer.state.max_steps, "steps", note)
        with disk.writing(stage.path("model")):
            save(trainer, stage)
    if is_main_process():
        checkpoints.forget_asides(Path(trainer.args.output_dir))


def _checkpoint_for_all(trainer: Any) -> Path | None:
    """Return the checkpoint to go on from: the first process chooses, and all take the same."""
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
            logger.warning("%s has no whole checkpoint: beginning anew", directory)
    broadcast_object_list(choice)
    if isinstance(choice[0], InputError):
        raise choice[0]
    if choice[0] is None:
        return None
    path: Path = directory / choice[0]
    if not path.is_dir():
        raise InputError(
            f"{path} is there for the first process only: output_dir must be on a disk that all "
            "machines of a launch share"
        )
    logger.info("resuming from %s", path)
    return path


def _run(trainer: Any, checkpoint: Path | None) -> None:
    """Run TRL's loop, and say in words why it could not go on."""
    directory = Path(trainer.args.output_dir)
    try:
        with disk.writing(directory):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except _Over:
        logger.info("%s is the end of the run: nothing is left to train", checkpoint)
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()  # as transformers does after the last step
    except disk.DiskFull as error:
        if not is_main_process() or (cut := checkpoints.cut_short(directory)) is None:
            raise
        words = (
            f"{disk.message(cut.parent)}. The last file begun there is {cut.name}; "
            "`save_total_limit: 1` keeps the newest checkpoint only"
        )
        checkpoints.forget_unsealed(directory)  # it is of no use, and its room may be
        raise disk.DiskFull(words) from error
    except RuntimeError as error:
        # Sampling from NaN fails in its own words, a step before the loss is logged.
        if isinstance(error, Failed | torch.OutOfMemoryError):
            raise
        step = trainer.state.global_step
        if not _weights_are_finite(trainer.model):
            raise NotFinite(f"weights are not finite after step {step}. {DIVERGED}") from error
        if "probability tensor contains" in str(error):  # torch.multinomial's words
            words = f"the policy's probabilities are not finite after step {step}. {DIVERGED}"
            raise NotFinite(words) from error
        raise


class _EndCallback(TrainerCallback):
    """End a run that goes on from its last step, where transformers would take one more."""

    def __init__(self, guard: LearningGuard | None) -> None:
        self.guard = guard

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave training when the state that was loaded is its end."""
        if 0 < state.max_steps <= state.global_step or (self.guard and self.guard.learnt):
            raise _Over


def _check_trained(trainer: Any, before: dict[str, int]) -> None:
    steps = trainer.state.global_step
    if steps == 0:
        raise NothingTrained("no step was taken: the data hold less than one batch")
    accelerator = trainer.accelerator  # each process may hold a part of the weights
    changed = torch.tensor([_weight_sums(trainer.model) != before], device=accelerator.device)
    if not accelerator.gather(changed).any():
        raise NothingTrained(
            f"no weight changed in {steps} steps: every gradient was zero. In RL this means that "
            "all completions of every group had the same reward (see groups/alike in metrics.jsonl)"
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
    """Return what this process holds of a weight that FSDP2 or ZeRO-3 spread over several."""
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
    """Return what the manifest says of a run: its steps, mean loss, and reward at the end.

    From the logs, which a checkpoint holds, so that a resumed run says the same.
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
