"""Find texts that say the same: equal ones by a key, nearly equal ones by MinHash of word runs."""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from chainforge.data.rows import same_question

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
_OPERATORS = [
    char for char in map(chr, range(128)) if _TOKENS.fullmatch(char) and not char.isalnum()
]
# Odd random weights: two runs of tokens whose weighted sums agree, modulo 2**64, are equal.
_WEIGHTS = np.random.default_rng(0).integers(2**64, size=20, dtype=np.uint64) | np.uint64(1)


def text_key(text: str) -> int:
    """Return a number that equal texts share; case and white space do not count."""
    digest = hashlib.blake2b(same_question(text).encode("utf-8", "replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def tokens(text: str) -> list[str]:
    """Return words, numbers and operators; case, punctuation and spacing do not count."""
    if text.isascii():
        text = text.lower().translate(_SPACES)
        for operator in _OPERATORS:
            if operator != "_" and operator in text:
                text = text.replace(operator, f" {operator} ")
        found = text.split()
    else:
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate becomes a mark
        found = _TOKENS.findall(unicodedata.normalize("NFKC", text).lower())
    return [token for token in found if token != "_"] if "_" in found else found


@functools.lru_cache(maxsize=1)  # one reasoning is searched for repetition, then sketched
def token_hashes(text: str) -> Hashes:
    """Return the hashes of a text's tokens; remember those of the last text."""
    return hashed(tokens(text))


def hashed(words: Sequence[str]) -> Hashes:
    """Return the hash of each token, the same in every process."""
    return np.array(RMinHash.hash_token_sets([words])[0], dtype=np.uint64)


def runs(hashes: Hashes, size: int) -> Hashes:
    """Return the hash of each run of `size` tokens, 20 at most; none for a shorter text."""
    if len(hashes) < size:
        return hashes[:0]
    return np.convolve(hashes, _WEIGHTS[:size], "valid")


def shingles(hashes: Hashes, size: int = WORDS) -> Hashes:
    """Return the hash of each run of `size` tokens; a shorter text is one shingle."""
    return runs(hashes, max(1, min(size, len(hashes))))


def sketches(sets: Sequence[Hashes]) -> Sketches:
    """Return the MinHash of each set of shingles, a row of `PERMUTATIONS` numbers each."""
    if not sets:
        return np.zeros((0, PERMUTATIONS), dtype=np.uint32)
    ends = np.cumsum([0, *map(len, sets)], dtype=np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(sets), ends, PERMUTATIONS, 0
    )
    return np.array(matrix.to_rows(), dtype=np.uint32)


def near_duplicates(sketch: Sketches, threshold: float) -> dict[int, float]:
    """Map each row of `sketch` that is near an earlier row that stays to their similarity."""
    kept: list[int] = []
    found: dict[int, float] = {}
    for row in range(len(sketch)):
        alike = (sketch[kept] == sketch[row]).mean(axis=1).max() if kept else 0.0
        if kept and alike >= threshold:
            found[row] = float(alike)
        else:
            kept.append(row)
    return found


def most_different(sketch: Sketches, first: int, count: int) -> list[int]:
    """Return `count` rows by max-min: each next one differs most from its nearest chosen one."""
    chosen = [first]
    nearest = (sketch == sketch[first]).mean(axis=1)
    while len(chosen) < min(count, len(sketch)):
        nearest[chosen[-1]] = 2.0  # chosen already
        chosen.append(int(nearest.argmin()))
        nearest = (sketch == sketch[chosen[-1]]).mean(axis=1).clip(min=nearest)
    return chosen
