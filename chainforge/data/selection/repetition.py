"""Measure how much of a text repeats itself, as a policy that lost its way does."""

from __future__ import annotations

import numpy as np

from chainforge.data.selection.shingles import Hashes, hashed_tokens, runs

RUN = 20  # A run of so many pieces comes twice by accident in hardly any text.
LINE = 20  # Characters from which on a line that comes again says something again.
PERIOD = 12  # Longest loop that is looked for in the pieces: longer ones repeat runs.
ROUNDS = 4  # Times that a loop must come round before it is one: `1 + 1 + 1` is arithmetic.
PERIODS = range(1, PERIOD + 1)


def _least(period: int) -> int:
    """Return how often in a row a piece is the one `period` before, at least, in a loop."""
    # A chain of sums is a short loop of its own; a loop that counts is longer than a run.
    return max(period * (ROUNDS - 1), RUN - period)


SHORTEST = min(map(_least, PERIODS))  # a loop has a run of so many pieces that comes again


def repetition(text: str) -> float:
    """Return the share of a text that repeats itself, from 0 to 1: the largest of three.

    The share of runs of 20 pieces (words, numbers, operators) that occurred before; the share of
    the characters that stand in lines which occurred before; the share of the pieces that stand
    in the longest loop, a phrase of up to 12 pieces that comes again at once, four times or more.
    """
    # Pieces are compared by their hashes, 64 bits wide: numpy does in one go what would be a loop.
    pieces = hashed_tokens(text)
    if not _again(pieces, SHORTEST):  # nearly every text: it has neither a run nor a loop
        return _lines(text)
    return max(_again(pieces, RUN), _lines(text), _loop(pieces))


def _again(pieces: Hashes, size: int) -> float:
    """Return the share of the runs of `size` pieces that occurred before."""
    found = np.sort(runs(pieces, size))
    return int(np.count_nonzero(found[1:] == found[:-1])) / len(found) if len(found) else 0.0


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


def _loop(pieces: Hashes) -> float:
    """Return the share of the longest stretch in which each piece is the one `period` before."""
    longest = 0
    for period in PERIODS:
        same = pieces[period:] == pieces[:-period]
        if np.count_nonzero(same) < _least(period):
            continue
        breaks = np.flatnonzero(~np.concatenate(([False], same, [False])))
        stretch = int(np.diff(breaks).max()) - 1
        if stretch >= _least(period):
            longest = max(longest, stretch + period)
    return longest / len(pieces)
