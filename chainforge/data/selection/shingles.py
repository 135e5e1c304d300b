"""Cut texts into shingles, and sketch them, to tell how much two texts have in common."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Sketches = NDArray[np.uint32]

# Words in a shingle, as for the near duplicates of most corpora; and permutations of a sketch:
# the standard error of a similarity of 0.8 is then 0.035.
WORDS = 5
PERMUTATIONS = 128
# A word, a number, an operator, or one character of a script that is written without spaces.
# Left out are marks that may change while a text stays the same; operators may not.
_MARKS = ".,;:!?'\"`()[]{}$\\…“”‘’„«»*_#|~–—、。，：；？！"
_TOKENS = re.compile(rf"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|\w+|[^\w\s{re.escape(_MARKS)}]")
_PIECES = re.compile(r"\d+(?:[.,]\d+)*|\w+|[^\w\s]")
_OPERATORS = frozenset("+-*/^×÷·=<>%()[]−")


def tokens(text: str) -> list[str]:
    """Return words, numbers and operators; case, punctuation and spacing do not count."""
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


def shingles(words: Sequence[str], size: int = WORDS) -> list[str]:
    """Return each run of `size` tokens; a shorter text is one shingle."""
    if len(words) <= size:
        return [" ".join(words)]
    return [" ".join(run) for run in zip(*(words[start:] for start in range(size)), strict=False)]


def similarity(one: Collection[str], other: Collection[str]) -> float:
    """Return the Jaccard similarity of two sets of shingles."""
    first, second = set(one), set(other)
    return len(first & second) / len(first | second) if first or second else 1.0


def sketches(sets: list[list[str]]) -> Sketches:
    """Return the MinHash of each set of shingles, a row of `PERMUTATIONS` numbers each."""
    import numpy as np
    from rensa import RMinHash

    if not sets:
        return np.zeros((0, PERMUTATIONS), dtype=np.uint32)
    return np.array(RMinHash.digests_from_token_sets(sets, PERMUTATIONS, 0), dtype=np.uint32)
