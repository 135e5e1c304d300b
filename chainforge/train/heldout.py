"""Accuracy on held-out rows while RL runs, by TRL's own evaluation.

Added here: rows of the validation split, strict accuracy whatever the rewards are, and random
states that are restored afterwards, so that a run with evaluations trains, resumes and ends exactly
as one without (except with vLLM, which has its own random numbers).
"""

from __future__ import annotations

import logging
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerState, set_seed

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.data.sources import has_answer
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate.rollouts import Recorder
from chainforge.train import trl_internals
from chainforge.train.distributed import layout_here
from chainforge.train.health import RLArgs

logger = logging.getLogger(__name__)

ACCURACY = "eval_accuracy"
# Settings of GRPO that only TRL's own generation knows, with what they are unless they are set.
TRL_ALONE = {
    "use_vllm": False,
    "use_transformers_continuous_batching": False,
    "min_p": None,
    "repetition_penalty": 1.0,
    "generation_kwargs": None,
    "cache_implementation": None,
}


def hold_out(args: RLArgs, tasks: TaskArgs, transcript: str, training: Any) -> list[Row]:
    """Return the held-out Examples, evenly of all tasks, and set the GRPOConfig to evaluate them.

    Raises `InputError` when the tasks train on their validation split, when it is too small, and
    for settings that do not fit together.
    """
    if args.heldout_size < 1:
        if args.keep_best:
            raise InputError("keep_best: needs heldout_size, which is not set")
        return []
    _schedule(args, training)
    own = [task for task in tasks.tasks if task.get("fn") != "prompts"]  # which have no answers
    count, rest = divmod(args.heldout_size, len(own) or 1)
    others = []
    for number, task in enumerate(own):
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
        raise InputError(f"heldout_size: {error}") from None
    if not any(map(has_answer, rows)):
        raise InputError("heldout_size: no row has an `answer`, so there is nothing to measure")
    return rows


def _schedule(args: RLArgs, training: Any) -> None:
    """Set TRL's own keys for evaluation, and for the choice of the best checkpoint."""
    from transformers.trainer_utils import IntervalStrategy

    saving = training.save_strategy == "steps"
    steps = int(training.eval_steps or (training.save_steps if saving else 0))
    if steps < 1:
        raise InputError("eval_steps: expected a number of steps, 1 or more, for heldout_size")
    if args.keep_best and (not saving or steps % training.save_steps):
        raise InputError(
            "keep_best: every step that is measured must be saved, so eval_steps "
            f"({steps}) must be a multiple of save_steps ({training.save_steps})"
        )
    share, rest = divmod(args.heldout_size, training.world_size)
    if rest:
        raise InputError(
            f"heldout_size: {args.heldout_size} is not a multiple of {training.world_size}, the "
            "number of processes"
        )
    # accelerate would fill an uneven last batch with rows that are counted already.
    group, most = training.num_generations_eval or 1, training.per_device_train_batch_size
    training.per_device_eval_batch_size = math.gcd(share * group, most)
    training.num_generations_eval = group
    training.eval_strategy, training.eval_steps = IntervalStrategy.STEPS, steps
    training.do_eval = training.eval_on_start = True
    if args.keep_best:
        training.load_best_model_at_end = training.greater_is_better = True
        training.metric_for_best_model = ACCURACY


def chosen_step(trainer: Any) -> dict[str, Any]:
    """Return which step the model at the end of training is from, for the manifest."""
    state = trainer.state
    if not trainer.args.load_best_model_at_end or not state.best_model_checkpoint:
        return {"model_step": state.global_step}
    best, logs = state.best_metric, state.log_history
    start = next((row[ACCURACY] for row in logs if row["step"] == 0 and ACCURACY in row), None)
    if start is not None and best <= start:
        words = "keep_best: no checkpoint (best: %.3f) is better than the stage's start (%.3f)"
        logger.warning(words, best, start)
    return {"model_step": state.best_global_step, "best_accuracy": best, "start_accuracy": start}


class RolloutCallback(TrainerCallback):
    """Keep the rollout log in step with checkpoints, and evaluations out of it.

    An evaluation has random numbers of its own, the same each time, so that two evaluations differ
    by their policies alone and training continues as if there had been none.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._before: tuple[Any, ...] | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Remove rollouts of steps that a resumed run trains again; prepare a first evaluation."""
        self.recorder.resume(state.global_step)
        args.eval_on_start = args.eval_on_start and state.global_step == 0
        if args.eval_on_start:
            self._begin(args)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Prepare an evaluation that follows this step."""
        if control.should_evaluate:
            self._begin(args)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Restore the random states."""
        if self._before is None:
            return
        python, numpy, cpu, cuda = self._before
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        self._before, self.recorder.held_out = None, False

    def _begin(self, args: Any) -> None:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._before = random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda
        self.recorder.held_out = True
        # Processes differ, as in transformers; the seed of training would repeat its start.
        set_seed((args.seed + 10_000 + args.process_index) % 2**32)


def rollout_engine(args: RLArgs, training: Any) -> dict[str, Any]:
    """Return what a GRPOTrainer is given to sample with; nothing where TRL samples by itself.

    TRL samples with vLLM, with settings that only its generation knows, and where processes hold
    only a part of the weights. Raises `InputError` where that is so and `chainforge` was asked for.
    """
    if args.rollout_engine == "trl":
        return {}
    known = [key for key, usual in TRL_ALONE.items() if getattr(training, key, usual) != usual]
    why = f"{known[0]} is set" if known else None
    if layout_here().shards_weights:
        why = "each process holds only a part of the weights"
    if why is None:
        from chainforge.train.scoring import OwnRollouts

        return trl_internals.rollouts_by(OwnRollouts())
    if args.rollout_engine == "chainforge":
        raise InputError(f"rollout_engine: chainforge cannot sample here, because {why}; use `trl`")
    logger.info("TRL samples the completions, because %s", why)
    return {}
