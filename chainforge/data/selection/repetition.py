"""Measure how much of a text repeats itself, as a policy that lost its way does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from chainforge.data.selection.shingles import tokens

RUN = 20  # A run of so many pieces comes twice by accident in hardly any text.
LINE = 20  # Characters from which on a line that comes again says something again.
PERIOD = 12  # Longest loop that is looked for in the pieces: longer ones repeat runs.
ROUNDS = 4  # Times that a loop must come round before it is one: `1 + 1 + 1` is arithmetic.


def repetition(text: str) -> float:
    """Return the share of a text that repeats itself, from 0 to 1: the largest of three.

    The share of runs of 20 pieces (words, numbers, operators) that occurred before; the share of
    the characters that stand in lines which occurred before; the share of the pieces that stand
    in the longest loop, a phrase of up to 12 pieces that comes again at once, four times or more.
    """
    pieces = tokens(text)
    return max(_runs(pieces), _lines(text), _loop(pieces))


def _runs(pieces: Sequence[str]) -> float:
    if len(pieces) <= RUN:
        return 0.0
    runs = list(zip(*(pieces[start:] for start in range(RUN)), strict=False))
    return 1 - len(set(runs)) / len(runs)


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


def _loop(pieces: Sequence[str]) -> float:
    """Return the share of the longest stretch in which each piece is the one `period` before."""
    if len(pieces) < RUN:
        return 0.0
    numbers: dict[str, int] = {}
    text = np.array([numbers.setdefault(piece, len(numbers)) for piece in pieces])
    longest = 0
    for period in range(1, min(PERIOD, len(text) - 1) + 1):
        same = text[period:] == text[:-period]
        # A chain of sums is a short loop of its own; a loop that counts is longer than a run.
        least = max(period * (ROUNDS - 1), RUN - period)
        if np.count_nonzero(same) < least:
            continue
        breaks = np.flatnonzero(~np.concatenate(([False], same, [False])))
        stretch = int(np.diff(breaks).max()) - 1
        if stretch >= least:
            longest = max(longest, stretch + period)
    return longest / len(pieces)
