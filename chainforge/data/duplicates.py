"""Find what says the same thing twice: completions of one prompt, and prompts.

Completions of different prompts are not compared: equal reasoning about different questions is
no duplicate. Prompts with other numbers are other problems, however alike their words are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from chainforge.data.shingles import (
    PERMUTATIONS,
    Sketches,
    formulas,
    hashed,
    numbers,
    shingles,
    similarity,
    sketches,
    tokens,
)
from chainforge.data.splits import same_question

Twins = dict[int, tuple[int, float]]  # position -> (the one that stays, how alike they are)

# Shingles in more than this share of the prompts are a template's; ...
COMMON = 0.05
ALWAYS_RARE = 10  # ... but never one that so few prompts have.
COMPARED = 50  # Most prompts of one bucket that a new one is compared with.


def text_key(text: str) -> int:
    """Return a number that equal texts share; case and white space do not count."""
    digest = hashlib.blake2b(same_question(text).encode("utf-8", "replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def equal_completions(keys: Mapping[int, int]) -> dict[int, int]:
    """Map each later one of equal completions, by position, to the first."""
    first: dict[int, int] = {}
    return {
        position: first[key]
        for position, key in keys.items()
        if first.setdefault(key, position) != position
    }


def alike_completions(positions: Sequence[int], sketch: Sketches, threshold: float) -> Twins:
    """Map each position whose sketch is near that of an earlier one that stays.

    `sketch` holds one row a position.
    """
    kept: list[int] = []
    twins: Twins = {}
    for row, position in enumerate(positions):
        alike = (sketch[kept] == sketch[row]).mean(axis=1) if kept else sketch[:0, 0]
        near = int(alike.argmax()) if len(alike) else -1
        if near >= 0 and alike[near] >= threshold:
            twins[position] = positions[kept[near]], float(alike[near])
        else:
            kept.append(row)
    return twins


def equal_prompts(texts: Iterable[tuple[int, str]]) -> dict[int, int]:
    """Map each later one of equal questions, by number, to the first."""
    return equal_completions({number: text_key(text) for number, text in texts})


def alike_prompts(texts: Sequence[tuple[int, str]], threshold: float) -> Twins:
    """Map each question that is nearly an earlier one that stays; numbers must agree.

    Candidates come from bands of MinHash; they count when the shingles that few questions have
    are as alike as `threshold`, so that a template makes no twins.
    """
    written = dict(texts)
    words = {number: tokens(text) for number, text in texts}
    sets = {number: set(shingles(hashed(part)).tolist()) for number, part in words.items()}
    counts = Counter(gram for grams in sets.values() for gram in grams)
    most = max(ALWAYS_RARE, COMMON * len(sets))
    own = {number: [g for g in grams if counts[g] <= most] for number, grams in sets.items()}
    compared = [number for number, grams in own.items() if grams]
    rows = _bands(threshold)
    buckets: dict[tuple[int, bytes, tuple[str, ...]], list[int]] = {}
    twins: Twins = {}
    for start in range(0, len(compared), 10_000):
        part = compared[start : start + 10_000]
        grams = [np.array(own[number], dtype=np.uint64) for number in part]
        for number, sketch in zip(part, sketches(grams), strict=True):
            figures = numbers(words[number]) + formulas(written[number])
            keys = [
                (band, sketch[band : band + rows].tobytes(), figures)
                for band in range(0, PERMUTATIONS, rows)
            ]
            others = dict.fromkeys(
                other for key in keys for other in buckets.get(key, ())[:COMPARED]
            )
            alike = {other: similarity(own[number], own[other]) for other in others}
            nearest = max(alike, key=lambda other: alike[other], default=None)
            if nearest is not None and alike[nearest] >= threshold:
                twins[number] = nearest, alike[nearest]
                continue
            for key in keys:
                buckets.setdefault(key, []).append(number)
    return twins


def _bands(threshold: float) -> int:
    """Return the rows of a band with which twins at the threshold are compared 19 times in 20."""
    for rows in (32, 16, 8, 4, 2):
        if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.95:
            return rows
    return 1
