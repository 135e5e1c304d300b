"""Measure how much of a text repeats itself, as a policy that lost its way does."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from chainforge.data.shingles import Hashes, cut, hashed_tokens, runs

RUN = 20  # A run of so many pieces comes twice by accident in hardly any text.
LINE = 20  # Characters from which on a line that comes again says something again.
PERIOD = 12  # Longest loop that is looked for in the pieces: longer ones repeat runs.
ROUNDS = 4  # Times that a loop must come round before it is one: `1 + 1 + 1` is arithmetic.
SUM = 128  # Pieces of a stretch of mathematics that may repeat itself, as a sum of 32 fractions.
PERIODS = range(1, PERIOD + 1)


def _least(period: int) -> int:
    """Return how often in a row a piece is the one `period` before, at least, in a loop."""
    # A chain of sums is a short loop of its own; a loop that counts is longer than a run.
    return max(period * (ROUNDS - 1), RUN - period)


SHORTEST = min(map(_least, PERIODS))  # a loop has a run of so many pieces that comes again


_COMMAND = re.compile(r"\\([A-Za-z]+)")
_WORD = re.compile(r"[^\W\d_]{2}|[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]")

Mask = NDArray[np.bool_]


def repetition(text: str) -> float:
    """Return the share of a text that repeats itself, from 0 to 1: the largest of three.

    The share of runs of 20 pieces (words, numbers, operators) that occurred before; the share of
    the characters that are in lines which occurred before; the share of the pieces in the longest
    loop, a phrase of up to 12 pieces that comes again at once, four times or more. Mathematics
    without a word may repeat itself for 128 pieces.
    """
    # Pieces are compared by their hashes, 64 bits wide: numpy does in one go what would be a loop.
    pieces = hashed_tokens(text)
    if not _again(pieces, SHORTEST):  # nearly every text: it has neither a run nor a loop
        return _lines(text)
    counted = _not_sums(text)
    return max(_again(pieces, RUN, counted), _lines(text), _loop(pieces, counted))


def _not_sums(text: str) -> Mask:
    """Return which pieces of a text are not in a short stretch of mathematics without a word."""
    commands = {name.lower() for name in _COMMAND.findall(text)}
    pieces = cut(text)  # few of them differ in a text that repeats itself
    is_word = {one: one not in commands and bool(_WORD.search(one)) for one in set(pieces)}
    words = np.array([is_word[piece] for piece in pieces], dtype=np.bool_)
    lengths = np.diff(np.flatnonzero(np.concatenate(([True], words, [True]))))
    return np.repeat(lengths > SUM, lengths)[: len(words)] | words


def _again(pieces: Hashes, size: int, counted: Mask | None = None) -> float:
    """Return the share of the runs of `size` pieces that occurred before, any of them counted."""
    found = again = runs(pieces, size)
    if not len(found):
        return 0.0
    if counted is not None:
        ends = np.cumsum(np.concatenate(([0], counted)))
        again = found[ends[size:] > ends[:-size]]
    again = np.sort(again)
    return int(np.count_nonzero(again[1:] == again[:-1])) / len(found)


def _lines(text: str) -> float:
    """Return the share of the characters in lines that occurred before and hold a word."""
    if "\n" not in text:
        return 0.0
    seen: set[str] = set()
    again = 0
    for line in text.splitlines():
        line = line.strip()
        if len(line) >= LINE:
            if line in seen and _WORD.search(_COMMAND.sub(" ", line)):
                again += len(line)
            seen.add(line)
    return again / len(text)


def _loop(pieces: Hashes, counted: Mask) -> float:
    """Return the share of the longest stretch in which each piece is the one `period` before."""
    longest = 0
    ends = np.cumsum(np.concatenate(([0], counted)))
    for period in PERIODS:
        same = pieces[period:] == pieces[:-period]
        if np.count_nonzero(same) < _least(period):
            continue
        breaks = np.flatnonzero(~np.concatenate(([False], same, [False])))
        starts, lengths = breaks[:-1], np.diff(breaks) - 1
        long = lengths >= _least(period)
        stops = starts[long] + lengths[long] + period
        stretches = (lengths[long] + period)[ends[stops] > ends[starts[long]]]
        longest = max(longest, int(stretches.max(initial=0)))
    return longest / len(pieces)
