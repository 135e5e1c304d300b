"""Mix sources in a ratio: DeepSeek-R1's second SFT had 600k rows of reasoning to 200k of others."""

from __future__ import annotations

import random
from collections.abc import Sequence

from chainforge.core.errors import InputError


def mix(
    sizes: Sequence[int], weights: Sequence[float], *, repeat: bool = False, seed: int = 0
) -> list[list[int]]:
    """Return which rows of each source to take, in their order, so that they stand as `weights`.

    No row is taken twice and as many as possible are taken: the source that is smallest for its
    weight is taken whole, the others by lot. With `repeat` the largest is, and rows of the others
    are taken again, none of them more than once oftener than another.
    """
    check_weights(len(sizes), weights)
    rates = [size / weight for size, weight in zip(sizes, weights, strict=True)]
    unit = max(rates) if repeat else min(rates)
    chosen = []
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        rounds, rest = divmod(max(round(weight * unit), 1), size)
        drawn = random.Random(f"{seed}/{number}").sample(range(size), rest)
        chosen.append(sorted([*list(range(size)) * rounds, *drawn]))
    return chosen


def check_weights(sources: int, weights: Sequence[float]) -> None:
    """Raise `InputError` unless there is one weight above 0 for each source."""
    if len(weights) != sources:
        raise InputError(
            f"data_weights: {len(weights)} for {sources} sources in `data`; give one each, in "
            "their order"
        )
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise InputError(f"data_weights: expected more than 0, found {weight}")
