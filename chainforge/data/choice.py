"""Choose among samples that are all good: which of one prompt, and how many of each kind."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chainforge.data.shingles import Sketches

# Difficulty by the share of a prompt's samples that are right, from the hardest on.
BANDS = (("never", 0.0), ("hard", 0.25), ("medium", 0.75), ("easy", 1.0))


def choose(
    positions: Sequence[int],
    how: str,
    keep: int,
    seed: str,
    *,
    reward: Callable[[int], float],
    length: Callable[[int], int],
    sketch: Callable[[], Sketches],
) -> set[int]:
    """Return the positions to keep of one prompt's eligible samples, at most `keep` of them.

    `how` is `best` (highest reward), `random`, `shortest`, `median` (nearest to the median
    length), `diverse` (each as unlike those before it as can be), or `all`, whatever
    `max_per_prompt` says.
    `sketch` gives a row of MinHash for each position.
    """
    if how == "all" or len(positions) <= keep:
        return set(positions)
    # Equals are taken at random: by length, the best would be those that reason least.
    order = list(positions)
    random.Random(seed).shuffle(order)
    if how == "best":
        order.sort(key=reward, reverse=True)
    elif how == "shortest":
        order.sort(key=length)
    elif how == "median":
        lengths = sorted(map(length, positions))
        middle = (lengths[(len(lengths) - 1) // 2] + lengths[len(lengths) // 2]) / 2
        order.sort(key=lambda position: abs(length(position) - middle))
    elif how == "diverse":
        order.sort(key=reward, reverse=True)
        return _unlike(list(positions), positions.index(order[0]), keep, sketch())
    return set(order[:keep])


def _unlike(positions: list[int], first: int, keep: int, sketch: Sketches) -> set[int]:
    """Return `keep` positions by max-min: next comes whose nearest chosen one is furthest."""
    chosen = [first]
    nearest = (sketch == sketch[first]).mean(axis=1)
    while len(chosen) < keep:
        nearest[chosen[-1]] = 2.0  # chosen already
        following = int(nearest.argmin())
        chosen.append(following)
        alike = (sketch == sketch[following]).mean(axis=1)
        nearest = alike.clip(min=nearest)
    return {positions[row] for row in chosen}


def difficulty(pass_rate: float | None) -> str:
    """Name the band of a pass rate: never, hard, medium, easy, always, or unknown."""
    if pass_rate is None:
        return "unknown"
    if pass_rate == 0:
        return "never"
    return next((name for name, below in BANDS[1:] if pass_rate < below), "always")


def beyond_quota(
    groups: dict[str, list[int]], most: int, seed: int, identity: Callable[[int], str]
) -> set[int]:
    """Return what to leave out so that `most` positions stay, spread evenly over the groups.

    What a small group leaves of its share goes to the others. Within a group those stay whose
    `identity` comes first in a random order that does not depend on what else there is.
    """
    left_out: set[int] = set()
    shares = _shares({name: len(members) for name, members in groups.items()}, most)
    for name, members in groups.items():
        order = sorted(members, key=lambda position: (_lot(seed, identity(position)), position))
        left_out.update(order[shares[name] :])
    return left_out


def _shares(sizes: dict[str, int], most: int) -> dict[str, int]:
    """Divide `most` evenly, no group getting more than it has; the first ones get what is odd."""
    shares = dict.fromkeys(sizes, 0)
    left = min(most, sum(sizes.values()))
    while left:
        open_groups = [name for name in sizes if shares[name] < sizes[name]]
        each, odd = divmod(left, len(open_groups))
        for number, name in enumerate(open_groups):
            more = min(each + (number < odd), sizes[name] - shares[name])
            shares[name] += more
            left -= more
    return shares


def _lot(seed: int, identity: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{identity}".encode(), digest_size=8).digest()
