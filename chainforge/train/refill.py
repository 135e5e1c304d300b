"""Fill a batch of GRPO with groups of mixed correctness: the work of dynamic sampling."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.generate.shards import gathered

# What `_generate` returns: lists with an entry a completion, and what only tools and images have.
PARTS = ("prompt_ids", "completion_ids", "tool_mask", "completions", "logprobs", "extra_fields",
         "images", "tool_images")  # fmt: skip
KEPT = ("prompt_ids", "completion_ids", "completions", "logprobs")


@dataclass
class Rollout:
    """One completion: its row, what `_generate` gave for it, and its rewards, NaN for none."""

    row: Row
    parts: tuple[Any, ...]  # in the order of KEPT
    rewards: Any


Group = list[Rollout]


def is_mixed(verdicts: Sequence[float]) -> bool:
    """Return whether a group has right and wrong answers; NaN is no verdict."""
    return len({verdict for verdict in verdicts if not math.isnan(verdict)}) > 1


def prompts_to_ask(lacking: int, found: int, sampled: int, most: int, unit: int) -> int:
    """Return how many prompts to sample next: about as many as give the groups that are lacking.

    `found` of the `sampled` groups so far were mixed. `most` is a batch's number of prompts; the
    result is a multiple of `unit`, so that every process generates equally many completions.
    """
    likely = (found + 1) / (sampled + 2)
    return min(math.ceil(math.ceil(lacking / likely) / unit) * unit, most)


class MixedGroups:
    """Takes the place of a trainer's `_generate_and_score_completions`."""

    def __init__(self, trainer: Any, verdicts: list[int], most_rounds: int) -> None:
        self.trainer, self.verdicts, self.most_rounds = trainer, verdicts, most_rounds
        self.score = trainer._generate_and_score_completions
        self.group = trainer.num_generations
        self.world = trainer.accelerator.num_processes
        self.rank = trainer.accelerator.process_index

    def __call__(self, inputs: list[Row]) -> dict[str, Any]:
        """Return what TRL makes of a batch of mixed groups, this process's part of it."""
        if not self.trainer.model.training:
            return self.score(inputs)  # type: ignore[no-any-return]
        rounds = [self._roll(inputs)]
        wanted = len(rounds[0])
        others = self._others({group[0].row["id"] for group in rounds[0]})
        mixed, idle = self._sort(rounds[0])
        while len(mixed) < wanted and len(rounds) < self.most_rounds:
            rows = self._more(others, wanted, len(mixed), len(mixed) + len(idle))
            if not rows:
                break  # the data set has no other prompt
            rounds.append(self._roll(self._mine(rows)))
            for groups, more in zip((mixed, idle), self._sort(rounds[-1]), strict=True):
                groups.extend(more)
        kept = min(len(mixed), wanted)
        output = self._score([*mixed, *idle][:wanted], kept)
        self._tell(rounds, kept, wanted)
        return output

    def _sort(self, groups: list[Group]) -> tuple[list[Group], list[Group]]:
        """Return the groups that are mixed, and the others."""
        mixed = [is_mixed([self._verdict(one) for one in group]) for group in groups]
        return (
            [group for group, teaches in zip(groups, mixed, strict=True) if teaches],
            [group for group, teaches in zip(groups, mixed, strict=True) if not teaches],
        )

    def _verdict(self, rollout: Rollout) -> float:
        values = [float(rollout.rewards[number]) for number in self.verdicts]
        return next((value for value in values if not math.isnan(value)), math.nan)

    def _more(self, others: Iterator[Row], wanted: int, found: int, sampled: int) -> list[Row]:
        """Return the rows of the next round, of all processes, each as often as a group needs."""
        unit = self.world // math.gcd(self.group, self.world)
        count = prompts_to_ask(wanted - found, found, sampled, wanted, unit)
        rows = list(itertools.islice(others, count))
        rows = rows[: len(rows) // unit * unit]
        return [dict(row) for row in rows for _ in range(self.group)]

    def _roll(self, rows: list[Row]) -> list[Group]:
        """Generate and judge completions of this process's rows; return all processes' groups."""
        made = self.trainer._generate([row["prompt"] for row in rows])
        if len(made) != len(PARTS):
            raise InputError(
                f"dynamic_sampling: TRL's _generate returns {len(made)} values, not {len(PARTS)} "
                "as in the version that was tested"
            )
        parts = dict(zip(PARTS, made))
        if parts["tool_mask"] is not None or parts["images"] is not None:
            raise InputError("dynamic_sampling: goes with text alone, without tools and images")
        rewards = self.trainer._calculate_rewards(
            rows, [row["prompt"] for row in rows], parts["completions"], parts["completion_ids"]
        )
        columns = [parts[name] or [None] * len(rows) for name in KEPT]
        everyone = gathered(list(zip(rows, zip(*columns, strict=True), strict=True)))
        rolled = [
            Rollout(row, kept, scores)
            for (row, kept), scores in zip(everyone, rewards.cpu(), strict=True)
        ]
        return [rolled[at : at + self.group] for at in range(0, len(rolled), self.group)]

    def _others(self, used: set[str]) -> Iterator[Row]:
        """Yield rows of the data set that this batch has not, in an order that the step decides.

        A resumed run, and every process, comes to the same order.
        """
        data, state = self.trainer.train_dataset, self.trainer.state
        order = list(range(len(data)))
        random.Random(f"{self.trainer.args.seed}/{state.global_step}").shuffle(order)
        for number in order:
            row = data[number]
            if row["id"] not in used:
                yield row

    def _mine(self, everyones: list[Any]) -> list[Any]:
        """Return this process's part of what all processes share evenly."""
        part = len(everyones) // self.world
        return everyones[self.rank * part : (self.rank + 1) * part]

    def _score(self, batch: list[Group], kept: int) -> dict[str, Any]:
        """Let TRL make its batch of these groups; those after the first `kept` train nothing.

        TRL gives no advantage to completions without a reward.
        """
        import torch

        rollouts = [one for group in batch for one in group]
        rewards = torch.stack([one.rewards for one in rollouts])
        rewards[kept * self.group :] = math.nan
        rewards = rewards.to(self.trainer.accelerator.device)
        mine = self._mine(rollouts)
        columns = dict(zip(KEPT, map(list, zip(*(one.parts for one in mine), strict=True))))
        if columns["logprobs"][0] is None:
            columns["logprobs"] = None  # type: ignore[assignment]
        given: dict[str, Any] = {"extra_fields": {}, "tool_images": []} | columns
        with _instead(self.trainer, _generate=tuple(given.get(name) for name in PARTS),
                      _calculate_rewards=rewards):  # fmt: skip
            return self.score([one.row for one in mine])  # type: ignore[no-any-return]

    def _tell(self, rounds: list[list[Group]], kept: int, wanted: int) -> None:
        """Log what it took, and the rewards and lengths of everything that was generated.

        TRL has logged the rewards of the batch, in which half of the answers are right by choice.
        """
        import torch
        from trl.trainer.utils import nanstd

        metrics = self.trainer._metrics["train"]
        sizes = [len(groups) for groups in rounds]
        for name, value in {
            "rounds": len(rounds),
            "kept": kept,
            "generated": sum(sizes),
            "filled": kept / wanted,
        }.items():
            metrics[f"dynamic/{name}"].append(float(value))
        for name, values in metrics.items():
            if name.startswith("completions/"):
                parts = values[-len(sizes) :]
                values[-len(sizes) :] = [_merged(name, parts, sizes)]
        scores = torch.stack([one.rewards for groups in rounds for group in groups
                              for one in group])  # fmt: skip
        total = (scores * self.trainer.reward_weights.cpu()).nansum(1)
        total[scores.isnan().all(1)] = math.nan
        columns = {f"rewards/{name}/": scores[:, number]
                   for number, name in enumerate(self.trainer.reward_func_names)}  # fmt: skip
        for name, column in columns.items():
            metrics[f"{name}mean"][-1] = torch.nanmean(column).item()
            metrics[f"{name}std"][-1] = nanstd(column).item()
        metrics["reward"][-1] = torch.nanmean(total).item()
        metrics["reward_std"][-1] = nanstd(total).item()


def _merged(name: str, values: list[float], sizes: list[int]) -> float:
    """Make one value of those of several rounds."""
    if "/min_" in name:
        return min(values)
    if "/max_" in name:
        return max(values)
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


@contextlib.contextmanager
def _instead(trainer: Any, **results: Any) -> Iterator[None]:
    """Let methods of a trainer return what is known already."""
    for name, result in results.items():
        setattr(trainer, name, lambda *given, result=result: result)
    try:
        yield
    finally:
        for name in results:
            delattr(trainer, name)
