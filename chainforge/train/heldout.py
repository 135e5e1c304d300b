"""Accuracy on held-out rows while RL runs, by TRL's own evaluation.

TRL evaluates with the engine that it trains with: transformers, vLLM, sharded weights. Added here:
rows of the validation split, strict accuracy whatever the rewards are, and random states that are
restored afterwards, so that a run with evaluations trains, resumes and ends exactly as one without
(except with vLLM, which has its own random numbers).
"""

from __future__ import annotations

import logging
import os
import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerState

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, has_answer
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate.rollouts import Recorder
from chainforge.generate.shards import own_file
from chainforge.train.rl_args import RLArgs

logger = logging.getLogger(__name__)

ACCURACY = "eval_accuracy"


def hold_out(args: RLArgs, tasks: TaskArgs, transcript: str, training: Any) -> list[Row]:
    """Return the held-out Examples, evenly of all tasks, and set the GRPOConfig to evaluate them.

    Raises `InputError` when the tasks train on their validation split, when it is too small, and
    for settings that do not fit together.
    """
    if args.heldout_size < 1:
        if args.heldout_steps is not None or args.keep_best:
            raise InputError("heldout_steps, keep_best: need heldout_size, which is not set")
        return []
    _schedule(args, training)
    count, rest = divmod(args.heldout_size, len(tasks.tasks) or 1)
    others = []
    for number, task in enumerate(tasks.tasks):
        split = task.get("split", "train")
        if split in ("validation", "all"):
            raise InputError(
                f"heldout_size: tasks[{number}] trains on split {split}, which contains the "
                "held-out rows; train on `split: train`"
            )
        others.append(task | {"split": "validation", "size": count + (number < rest)})
    try:
        rows = load_examples(replace(tasks, tasks=others), transcript, training.seed)
    except InputError as error:
        raise InputError(f"heldout_size: the validation split: {error}") from None
    if not any(map(has_answer, rows)):
        raise InputError("heldout_size: no row has an `answer`, so there is nothing to measure")
    return rows


def _schedule(args: RLArgs, training: Any) -> None:
    """Set TRL's own keys for evaluation, and for the choice of the best checkpoint."""
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    saving = training.save_strategy == SaveStrategy.STEPS
    steps = args.heldout_steps or (int(training.save_steps) if saving else 0)
    if steps < 1:
        raise InputError("heldout_steps: expected a number of steps, 1 or more")
    training.eval_strategy, training.eval_steps = IntervalStrategy.STEPS, steps
    training.do_eval = training.eval_on_start = True
    training.num_generations_eval = training.num_generations_eval or 1
    training.per_device_eval_batch_size = _batch(args.heldout_size, training)
    if not args.keep_best:
        return
    if not saving or steps % int(training.save_steps):
        raise InputError(
            "keep_best: every step that is measured must be saved, so heldout_steps "
            f"({steps}) must be a multiple of save_steps ({training.save_steps})"
        )
    training.load_best_model_at_end = training.greater_is_better = True
    training.metric_for_best_model = ACCURACY


def _batch(size: int, training: Any) -> int:
    """Return the largest batch that divides the completions evenly among the processes.

    accelerate would fill an uneven last batch with rows that are counted already.
    """
    group, world = training.num_generations_eval, training.world_size
    most = max(training.per_device_train_batch_size, training.per_device_eval_batch_size)
    completions = size * group
    for batch in range(min(most, completions // world), 0, -1):
        if completions % (batch * world) == 0 and batch * world % group == 0:
            return batch
    raise InputError(
        f"heldout_size: {size} rows with {group} completions each do not divide evenly among "
        f"{world} processes; make it a multiple of {world}"
    )


def chosen_step(trainer: Any) -> dict[str, Any]:
    """Return which step the model at the end of training is from, for the manifest."""
    state = trainer.state
    if not trainer.args.load_best_model_at_end or not state.best_model_checkpoint:
        return {"model_step": state.global_step}
    logs = (row[ACCURACY] for row in state.log_history if row["step"] == 0 and ACCURACY in row)
    start = next(logs, None)
    if start is not None and state.best_metric <= start:
        logger.warning(
            "keep_best: no checkpoint (best: step %d, %.3f) is better on the held-out rows than "
            "the model that the stage started from (%.3f)",
            state.best_global_step,
            state.best_metric,
            start,
        )
    return {
        "model_step": state.best_global_step,
        "best_accuracy": state.best_metric,
        "start_accuracy": start,
    }


class RolloutCallback(TrainerCallback):
    """Keep the rollout log in step with checkpoints, and evaluations out of it.

    An evaluation has random numbers of its own, the same each time, so that two evaluations differ
    by their policies alone and training continues as if there had been none.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._before: dict[str, Any] | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Remove rollouts of steps that a resumed run trains again; prepare a first evaluation."""
        self.recorder.resume(state.global_step)
        args.eval_on_start = args.eval_on_start and state.global_step == 0
        if args.eval_on_start:
            self._begin(args)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Force the rollouts to disk: a checkpoint must not outlive those it was trained on."""
        path = own_file(self.recorder.path)
        if path.exists():
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Prepare an evaluation that follows this step."""
        if control.should_evaluate:
            self._begin(args)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Restore the random states."""
        if self._before is None:
            return
        random.setstate(self._before["python"])
        np.random.set_state(self._before["numpy"])
        torch.random.set_rng_state(self._before["cpu"])
        if torch.cuda.is_available():
            torch.cuda.random.set_rng_state_all(self._before["cuda"])
        self._before, self.recorder.held_out = None, False

    def _begin(self, args: Any) -> None:
        self._before = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.random.get_rng_state(),
            "cuda": torch.cuda.random.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        self.recorder.held_out = True
        # Processes differ, as in transformers; the seed of training would repeat its start.
        seed = args.seed + 10_000 + args.process_index
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
