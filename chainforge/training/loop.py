"""Train: from the last good checkpoint if there is one, and never in vain."""

from __future__ import annotations

import logging
from typing import Any

from chainforge.training.policy import save
from chainforge.training.stage import Stage

logger = logging.getLogger(__name__)


class NothingTrained(RuntimeError):
    """A training stage that took no step or changed no weight."""


def weight_sums(model: Any) -> dict[str, float]:
    """Return one number for each trainable weight, to see whether training moved it."""
    trainable = (item for item in model.named_parameters() if item[1].requires_grad)
    return {name: float(weight.detach().double().sum()) for name, weight in trainable}


def train(trainer: Any, stage: Stage) -> None:
    """Train, from the last good checkpoint if there is one, and save the policy.

    Raises `NothingTrained` when no parameter can train, no step was taken or no weight moved.
    """
    from chainforge.training.callbacks import StageCallback
    from chainforge.training.checkpoints import last_good

    before = weight_sums(trainer.model)
    if not before:
        raise NothingTrained("no parameter of the model requires a gradient")
    trainer.add_callback(StageCallback(stage))
    checkpoint = last_good(stage.path("checkpoints"))
    if checkpoint:
        logger.info("resuming from %s", checkpoint)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    steps = trainer.state.global_step
    if steps == 0:
        raise NothingTrained("no step was taken: the data hold less than one batch")
    if weight_sums(trainer.model) == before:
        raise NothingTrained(
            f"no weight changed in {steps} steps: every gradient was zero. In RL this means that "
            "all completions of every group had the same reward (see reward_std in metrics.jsonl)"
        )
    stage.metrics |= {"steps": steps} | {
        key: value
        for key, value in result.metrics.items()
        if key in ("train_loss", "train_runtime")
    }
    stage.metrics |= _last_rewards(trainer.state.log_history)
    save(trainer, stage)


def _last_rewards(history: list[dict[str, Any]], window: int = 10) -> dict[str, float]:
    """Return the mean reward over the last logs, for the manifest."""
    rewards = [log["reward"] for log in history if isinstance(log.get("reward"), float)][-window:]
    return {"reward": round(sum(rewards) / len(rewards), 4)} if rewards else {}
