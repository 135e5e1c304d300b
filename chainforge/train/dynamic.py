"""Train on groups whose answers are partly right and partly wrong, and on no others.

DAPO (arXiv 2503.14476), section 3.2: a group that is all right or all wrong has no advantage, so
more prompts are sampled until the batch is full of groups that have one. TRL draws one batch and
trains on it whatever it holds. Here more rounds are drawn, each of about as many prompts as are
still lacking, and the batch is then handed to TRL as if it had been drawn so; advantages, losses
and metrics stay TRL's own. Groups that are left over are dropped, so nothing is trained on that an
older policy wrote, and a checkpoint has nothing more to hold.

No trainer is subclassed: three methods of the one at hand are wrapped, and are looked at first.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from chainforge.core.errors import InputError
from chainforge.rewards.reward import Reward
from chainforge.train.refill import MixedGroups

logger = logging.getLogger(__name__)

TESTED = "1.16"
# What is wrapped, with the arguments that it must take.
HOOKS = {
    "_generate_and_score_completions": ["inputs"],
    "_generate": ["prompts"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
}


@dataclass
class DynamicArgs:
    """Whether a batch is filled with groups that teach."""

    dynamic_sampling: bool = field(
        default=False,
        metadata={
            "help": "Train only on groups with right and wrong answers: sample further prompts "
            "until the batch is full of them (DAPO, section 3.2)."
        },
    )
    dynamic_max_rounds: int = field(
        default=10,
        metadata={
            "help": "Most rounds of sampling for one batch, each at most as large as the batch; "
            "places that are still empty then train nothing. 10 as in verl's DAPO."
        },
    )


def check_dynamic(args: DynamicArgs, rewards: Sequence[Reward]) -> None:
    """Raise `InputError` when nothing judges correctness, or TRL is not as it was when tested."""
    if not args.dynamic_sampling:
        return
    from trl.trainer.grpo_trainer import GRPOTrainer

    if not any(reward.measures_correctness for reward in rewards):
        raise InputError(
            "dynamic_sampling: no reward says whether an answer is right; it needs a strict "
            "`accuracy_reward`, and goes with no `random_rewards`"
        )
    if args.dynamic_max_rounds < 1:
        raise InputError(f"dynamic_max_rounds: expected 1 or more, found {args.dynamic_max_rounds}")
    check_hooks(GRPOTrainer)


def train_on_mixed_groups(trainer: Any, args: DynamicArgs, rewards: Sequence[Reward]) -> None:
    """Make a GRPOTrainer fill its batches with groups of mixed correctness, if `args` say so."""
    if not args.dynamic_sampling:
        return
    if trainer.tools or trainer.rollout_func is not None or trainer.environments is not None:
        raise InputError("dynamic_sampling: goes with no tools, environments or rollout function")
    verdicts = [number for number, reward in enumerate(rewards) if reward.measures_correctness]
    trainer._generate_and_score_completions = MixedGroups(
        trainer, verdicts, args.dynamic_max_rounds
    )


def check_hooks(kind: type) -> None:
    """Raise `InputError` unless a trainer has the methods that are wrapped."""
    import trl

    advice = (
        f"this is TRL {trl.__version__}; dynamic sampling was tested with {TESTED}: install "
        f'"trl~={TESTED}.0", or set `dynamic_sampling: false`'
    )
    for name, names in HOOKS.items():
        method = getattr(kind, name, None)
        found = list(inspect.signature(method).parameters)[1:] if method else None
        if found != names:
            has = f"takes {', '.join(found)}" if found is not None else "is missing"
            raise InputError(f"dynamic_sampling: {kind.__name__}.{name} {has}; {advice}")
    if trl.__version__.split(".")[:2] != TESTED.split("."):
        logger.warning("%s", advice)
