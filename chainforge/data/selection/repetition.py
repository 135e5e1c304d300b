"""Measure how much of a text repeats itself, as a policy that lost its way does."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from chainforge.data.selection.shingles import tokens

RUN = 20  # A run of so many pieces comes twice by accident in hardly any text.
LINE = 20  # Characters from which on a line that comes again says something again.
PERIOD = 12  # Longest loop that is looked for in the pieces: longer ones repeat runs.
ROUNDS = 4  # Times that a loop must come round before it is one: `1 + 1 + 1` is arithmetic.

Marks = NDArray[np.uint64]

# Odd weights at random: runs whose weighted sums agree, modulo 2**64, are the same run.
_WEIGHTS = np.random.default_rng(0).integers(2**64, size=RUN, dtype=np.uint64) | np.uint64(1)


def repetition(text: str) -> float:
    """Return the share of a text that repeats itself, from 0 to 1: the largest of three.

    The share of runs of 20 pieces (words, numbers, operators) that occurred before; the share of
    the characters that stand in lines which occurred before; the share of the pieces that stand
    in the longest loop, a phrase of up to 12 pieces that comes again at once, four times or more.
    """
    pieces = tokens(text)
    # Pieces are compared by their hashes, 64 bits wide: numpy does in one go what would be a loop.
    marks = np.fromiter(map(hash, pieces), np.int64, len(pieces)).view(np.uint64)
    return max(_runs(marks), _lines(text), _loop(marks))


def _runs(marks: Marks) -> float:
    if len(marks) <= RUN:
        return 0.0
    runs = np.sort(sliding_window_view(marks, RUN) @ _WEIGHTS)
    again = int(np.count_nonzero(runs[1:] == runs[:-1]))
    return again / len(runs)


def _lines(text: str) -> float:
    if "\n" not in text:
        return 0.0
    seen: set[str] = set()
    again = 0
    for line in text.splitlines():
        line = line.strip()
        if len(line) >= LINE:
            again += len(line) if line in seen else 0
            seen.add(line)
    return again / len(text)


def _loop(marks: Marks) -> float:
    """Return the share of the longest stretch in which each piece is the one `period` before."""
    if len(marks) < RUN:
        return 0.0
    longest = 0
    for period in range(1, min(PERIOD, len(marks) - 1) + 1):
        same = marks[period:] == marks[:-period]
        # A chain of sums is a short loop of its own; a loop that counts is longer than a run.
        least = max(period * (ROUNDS - 1), RUN - period)
        if np.count_nonzero(same) < least:
            continue
        breaks = np.flatnonzero(~np.concatenate(([False], same, [False])))
        stretch = int(np.diff(breaks).max()) - 1
        if stretch >= least:
            longest = max(longest, stretch + period)
    return longest / len(marks)
