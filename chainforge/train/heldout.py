"""Accuracy on held-out rows while RL runs, by TRL's own evaluation.

TRL evaluates with the engine that it trains with, whatever that is: transformers, vLLM, sharded
weights. What it lacks is done here: rows of the validation split, strict accuracy whatever the
rewards are, and random numbers that are given back afterwards, so that a run with evaluations
trains, resumes and ends exactly as one without (but with vLLM, whose numbers are its own).
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, has_answer
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate.harvest import Recorder

logger = logging.getLogger(__name__)

ACCURACY = "eval_accuracy"


@dataclass
class HeldoutArgs:
    """Held-out rows during RL."""

    heldout_size: int = field(
        default=0,
        metadata={
            "help": "Number of rows of the tasks' validation split on which accuracy is measured "
            "while training; 0: none. 100 rows tell ten points apart, hardly less."
        },
    )
    heldout_steps: int | None = field(
        default=None,
        metadata={"help": "Measure every so many steps, and at the end; `save_steps` if left out."},
    )
    keep_best: bool = field(
        default=False,
        metadata={
            "help": "Leave the checkpoint with the best held-out accuracy as the stage's model, "
            "not the last; ties go to the earlier."
        },
    )


def hold_out(args: HeldoutArgs, tasks: TaskArgs, transcript: str, training: Any) -> list[Row]:
    """Return the held-out Examples, evenly of all tasks, and tell a GRPOConfig to evaluate them.

    Raises `InputError` when the tasks train on their validation split, or have too little of it,
    and for numbers that do not go together.
    """
    if args.heldout_size < 0:
        raise InputError(f"heldout_size: expected 0 or more, found {args.heldout_size}")
    if not args.heldout_size:
        if args.heldout_steps is not None or args.keep_best:
            raise InputError("heldout_steps, keep_best: go with heldout_size, which is not set")
        return []
    _schedule(args, training)
    count, rest = divmod(args.heldout_size, len(tasks.tasks) or 1)
    if not count:
        raise InputError(
            f"heldout_size: {args.heldout_size} rows are not one for each of the "
            f"{len(tasks.tasks)} tasks"
        )
    others = []
    for number, task in enumerate(tasks.tasks):
        split = task.get("split", "train")
        if split in ("validation", "all"):
            raise InputError(
                f"heldout_size: tasks[{number}] trains on split {split}, which has the held-out "
                "rows; train on `split: train`"
            )
        others.append(task | {"split": "validation", "size": count + (number < rest)})
    try:
        rows = load_examples(replace(tasks, tasks=others), transcript, training.seed)
    except InputError as error:
        raise InputError(f"heldout_size: the validation split: {error}") from None
    if not any(map(has_answer, rows)):
        raise InputError("heldout_size: no row has an `answer`, so there is nothing to measure")
    return rows


def _schedule(args: HeldoutArgs, training: Any) -> None:
    """Set TRL's own keys."""
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    saving = training.save_strategy == SaveStrategy.STEPS
    steps = args.heldout_steps or (int(training.save_steps) if saving else 0)
    if steps < 1:
        raise InputError("heldout_steps: say every how many steps, 1 or more")
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
    """Return the largest even share of the completions that a process can take at once.

    accelerate would fill an uneven last batch with rows that it has counted already.
    """
    group, world = training.num_generations_eval, training.world_size
    most = max(training.per_device_train_batch_size, training.per_device_eval_batch_size)
    completions = size * group
    for batch in range(min(most, completions // world), 0, -1):
        if completions % (batch * world) == 0 and batch * world % group == 0:
            return batch
    raise InputError(
        f"heldout_size: {size} rows with {group} completions each cannot be shared evenly by "
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


class HeldoutCallback(TrainerCallback):
    """Give evaluations random numbers of their own, and keep them out of the rollouts.

    Every evaluation draws the same numbers, so that two differ by their policies alone.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._before: dict[str, Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make way for the evaluation before the first step; a resumed run has made it."""
        args.eval_on_start = args.eval_on_start and state.global_step == 0
        if args.eval_on_start:
            self._begin(args)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make way for an evaluation that comes after this step."""
        if control.should_evaluate:
            self._begin(args)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on as if there had been none."""
        if self._before is None:
            return
        random.setstate(self._before["python"])
        np.random.set_state(self._before["numpy"])
        torch.random.set_rng_state(self._before["cpu"])
        if torch.cuda.is_available():
            torch.cuda.random.set_rng_state_all(self._before["cuda"])
        self._before, self.recorder.held_out = None, False

    def _begin(self, args: TrainingArguments) -> None:
        self._before = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.random.get_rng_state(),
            "cuda": torch.cuda.random.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        self.recorder.held_out = True
        # As transformers seeds processes apart; the seed of training itself would repeat its start.
        seed = args.seed + 10_000 + args.process_index
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
