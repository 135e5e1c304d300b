"""Cut texts into shingles, and sketch them, to tell how much two texts have in common."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

Hashes = NDArray[np.uint64]
Sketches = NDArray[np.uint32]

# Words in a shingle, as for the near duplicates of most corpora; and permutations of a sketch:
# the standard error of a similarity of 0.8 is then 0.035.
WORDS = 5
PERMUTATIONS = 128
# A word, a number, an operator, or one character of a script that is written without spaces.
# Left out are marks that may change while a text stays the same; operators may not.
_MARKS = ".,;:!?'\"`()[]{}$\\…“”‘’„«»*_#|~–—、。，：；？！"
_TOKENS = re.compile(rf"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|\w+|[^\w\s{re.escape(_MARKS)}]")
# The same for ASCII, in a third of the time: marks become spaces, and operators get some.
_SPACES = str.maketrans({mark: " " for mark in _MARKS if mark.isascii() and mark != "_"})
_SPACED = [(c, f" {c} ") for c in map(chr, range(128)) if _TOKENS.fullmatch(c) and c.strip("_")
           and not c.isalnum()]  # fmt: skip
_PIECES = re.compile(r"\d+(?:[.,]\d+)*|\w+|[^\w\s]")
_OPERATORS = frozenset("+-*/^×÷·=<>%()[]−")

# Odd weights at random: two runs of tokens whose weighted sums agree, modulo 2**64, are equal.
LONGEST = 20
_WEIGHTS = np.random.default_rng(0).integers(2**64, size=LONGEST, dtype=np.uint64) | np.uint64(1)


def tokens(text: str) -> list[str]:
    """Return words, numbers and operators; case, punctuation and spacing do not count."""
    if text.isascii():
        text = text.lower().translate(_SPACES)
        for operator, spaced in _SPACED:
            if operator in text:
                text = text.replace(operator, spaced)
        found = text.split()
    else:
        text = text.encode("utf-8", "replace").decode()  # half a character is a mark
        found = _TOKENS.findall(unicodedata.normalize("NFKC", text).lower())
    return [token for token in found if token != "_"] if "_" in found else found


def numbers(words: Sequence[str]) -> tuple[str, ...]:
    """Return the numbers among tokens, in order: problems with other numbers are other problems."""
    return tuple(word for word in words if word[0].isdigit())


def formulas(text: str) -> tuple[str, ...]:
    """Return the formulas of a text, such as `3*(4+5)`: part of a formula is another problem."""
    found: list[str] = []
    run: list[str] = []
    for piece in [*_PIECES.findall(unicodedata.normalize("NFKC", text)), ""]:
        if piece and (piece in _OPERATORS or piece[0].isdigit()):
            run.append(piece)
        else:
            if sum(part[0].isdigit() for part in run) > 1 and len(run) > 2:
                found.append("".join(run).lstrip(")]=").rstrip("([="))
            run = []
    return tuple(found)


@functools.lru_cache(maxsize=1)
def cut(text: str) -> list[str]:
    """Return the tokens of a text; the last text's are remembered."""
    return tokens(text)


def hashed(words: Sequence[str]) -> Hashes:
    """Return the hash of each token, the same in every process."""
    return np.array(RMinHash.hash_token_sets([words])[0], dtype=np.uint64)


@functools.lru_cache(maxsize=1)  # the same reasoning is looked at for repetition, and sketched
def hashed_tokens(text: str) -> Hashes:
    """Return the hash of each token of a text; the last text's are remembered."""
    return hashed(cut(text))


def runs(hashes: Hashes, size: int) -> Hashes:
    """Return the hash of each run of `size` tokens, `LONGEST` at most; none in a shorter text."""
    if len(hashes) < size:
        return hashes[:0]
    return np.convolve(hashes, _WEIGHTS[:size], "valid")


def shingles(hashes: Hashes, size: int = WORDS) -> Hashes:
    """Return the hash of each run of `size` tokens; a shorter text is one shingle."""
    return runs(hashes, max(1, min(size, len(hashes))))


def similarity(one: Collection[int], other: Collection[int]) -> float:
    """Return the Jaccard similarity of two sets of shingles."""
    first, second = set(one), set(other)
    return len(first & second) / len(first | second) if first or second else 1.0


def sketches(sets: Sequence[Hashes]) -> Sketches:
    """Return the MinHash of each set of shingles, a row of `PERMUTATIONS` numbers each."""
    if not sets:
        return np.zeros((0, PERMUTATIONS), dtype=np.uint32)
    ends = np.cumsum([0, *map(len, sets)], dtype=np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(sets), ends, PERMUTATIONS, 0
    )
    return np.array(matrix.to_rows(), dtype=np.uint32)
