"""Find texts that say the same: equal ones by a key, nearly equal ones by their runs of words."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

from chainforge.data.rows import same_question

Run = tuple[str, ...]

WORDS = 5  # in a run, as for the near duplicates of most corpora
# A word, a number, an operator, or one character of a script that is written without spaces.
# Left out are marks that may change while a text stays the same; operators may not.
_MARKS = re.escape(".,;:!?'\"`()[]{}$\\…“”‘’„«»*_#|~–—、。，：；？！")
_TOKENS = re.compile(rf"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|[^\W_]+|[^\w\s{_MARKS}]")


def text_key(text: str) -> int:
    """Return a number that equal texts share; case and white space do not count."""
    digest = hashlib.blake2b(same_question(text).encode("utf-8", "replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def tokens(text: str) -> list[str]:
    """Return words, numbers and operators; case, punctuation and spacing do not count."""
    return _TOKENS.findall(unicodedata.normalize("NFKC", text).lower())


def runs(words: Sequence[str], size: int) -> list[Run]:
    """Return each `size` words that follow one another."""
    return list(zip(*(words[start:] for start in range(size)), strict=False))


def shingles(text: str) -> frozenset[Run]:
    """Return the runs of five words of a text; a shorter one is one run."""
    words = tokens(text)
    return frozenset(runs(words, min(WORDS, len(words))))


def similarity(one: frozenset[Run], other: frozenset[Run]) -> float:
    """Return the share of runs that two texts have in common (Jaccard's)."""
    return len(one & other) / len(one | other) if one or other else 1.0


def near_duplicates(sets: Sequence[frozenset[Run]], threshold: float) -> dict[int, float]:
    """Map each text that is near an earlier one that stays to their similarity."""
    kept: list[frozenset[Run]] = []
    found: dict[int, float] = {}
    for number, one in enumerate(sets):
        nearest = max((similarity(one, other) for other in kept), default=0.0)
        if kept and nearest >= threshold:
            found[number] = nearest
        else:
            kept.append(one)
    return found


def most_different(sets: Sequence[frozenset[Run]], first: int, count: int) -> list[int]:
    """Return `count` texts by max-min: each next one differs most from its nearest chosen one."""
    chosen = [first]
    left = {number: 0.0 for number in range(len(sets)) if number != first}
    while left and len(chosen) < count:
        last = sets[chosen[-1]]
        left = {number: max(near, similarity(sets[number], last)) for number, near in left.items()}
        chosen.append(min(left, key=lambda number: (left[number], number)))
        del left[chosen[-1]]
    return chosen
