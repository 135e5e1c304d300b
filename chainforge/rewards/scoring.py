"""Score completions by the rewards a configuration names: in training, selection, evaluation.

One `Reward` object serves all of them: it is a reward function in TRL's batch form.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.records import Row
from chainforge.core.transcript import DEFAULT, tags_of
from chainforge.rewards.binding import BATCH_NAMES, bind
from chainforge.rewards.functions import BUILTINS
from chainforge.rewards.reward import Reward, RewardFailed

__all__ = ["Reward", "RewardArgs", "RewardFailed", "Score", "check_applicable", "check_overlong",
           "load_rewards", "score"]  # fmt: skip


def _default_rewards() -> list[dict[str, Any]]:
    return [{"fn": "accuracy_reward", "weight": 1.0}, {"fn": "format_reward", "weight": 0.2}]


@dataclass
class RewardArgs:
    """How a completion is judged."""

    rewards: list[dict[str, Any]] = field(
        default_factory=_default_rewards,
        metadata={
            "help": "The rewards, each like {fn: accuracy_reward, weight: 1.0, params: {...}, "
            "task: math, name: accuracy}; fn is a built-in name, pkg.mod:fn or path/file.py:fn."
        },
    )
    transcript: str = field(
        default=DEFAULT,
        metadata={"help": "The form of a completion: r1-cold-start or think."},
    )
    random_rewards: bool = field(
        default=False,
        metadata={
            "help": "The control: every reward becomes a coin flip, so that whatever is still "
            "learnt was not learnt from the rewards."
        },
    )
    random_rewards_seed: int = field(
        default=0, metadata={"help": "The seed of the coin flips of random_rewards."}
    )
    max_reward_failures: float = field(
        default=0.1,
        metadata={
            "help": "Stop when a reward fails (raises, or gives no finite number) on more than "
            "this share of its last 64 to 256 rows; below it such a row is neutral and counted."
        },
    )


@dataclass(frozen=True)
class Score:
    """The rewards of one completion by name, None where one does not apply, and their sum."""

    rewards: dict[str, float | None]
    total: float | None


def load_rewards(args: RewardArgs, columns: Collection[str]) -> list[Reward]:
    """Return the rewards of a configuration, each bound to columns that rows have.

    Raises `InputError` for an unknown function or key, a name that comes from nowhere, a file that
    does not import, a weight that is no number, or two rewards of one name.
    """
    tags_of(args.transcript)
    share = args.max_reward_failures
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise InputError(f"max_reward_failures: {share!r} is not a share from 0 to 1")
    if not isinstance(args.rewards, list) or not args.rewards:
        raise InputError("rewards: name at least one, like [{fn: accuracy_reward, weight: 1.0}]")
    seed = args.random_rewards_seed if args.random_rewards else None
    bound = [bind(spec, columns, args.transcript, BUILTINS) for spec in args.rewards]
    names = [item.name for item in bound]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"rewards: {name!r} stands {names.count(name)} times; give each its own `name:`"
            )
    return [Reward(item, share, seed) for item in bound]


def check_applicable(rewards: Sequence[Reward], rows: Sequence[Row]) -> None:
    """Raise `InputError` for rows to which no reward applies: nothing can be learnt from them."""
    without = [row for row in rows if not any(reward.applies(row) for reward in rewards)]
    if without:
        names = ", ".join(reward.__name__ for reward in rewards)
        row = without[0]
        why = "" if row.get("answer", "") is not None else ", which has no `answer`"
        raise InputError(
            f"rewards: none of {names} applies to {len(without)} of {len(rows)} rows, such as "
            f"{row.get('id')} of task {row.get('task')!r}{why}; add a reward that does, such as "
            "format_reward or your own"
        )


def check_overlong(rewards: Sequence[Reward], longest: int) -> None:
    """Raise `InputError` for a penalty of length that has another end than the completions.

    It would never fall due, or make every completion pay.
    """
    for reward in rewards:
        end = reward.longest
        if end is not None and end != longest:
            raise InputError(
                f"reward {reward.__name__}: max_completion_len is {end}, but max_completion_length "
                f"of this stage is {longest}; make them the same"
            )


def score(
    rewards: Sequence[Reward],
    rows: Sequence[Row],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
) -> list[Score]:
    """Score one completion per row, in order; the total is the weighted sum of what applies."""
    if len(rows) != len(completions):
        raise ValueError(f"{len(rows)} rows, but {len(completions)} completions")
    names = sorted({key for row in rows for key in row} - set(BATCH_NAMES))
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
    prompts = [row.get("prompt") for row in rows]
    if completion_ids is None and rows and all(row.get("completion_ids") for row in rows):
        completion_ids = [row["completion_ids"] for row in rows]
    by_name = {
        reward.__name__: reward(prompts, completions, completion_ids, **columns)
        for reward in rewards
    }
    scores = []
    for index in range(len(rows)):
        given = {name: values[index] for name, values in by_name.items()}
        parts = [r.weight * v for r in rewards if (v := given[r.__name__]) is not None]
        scores.append(Score(given, sum(parts) if parts else None))
    return scores
