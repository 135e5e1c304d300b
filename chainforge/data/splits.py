"""Decide by content which split a question belongs to, so that the splits never meet."""

from __future__ import annotations

import hashlib

TEST_SHARE = 20
VALIDATION_SHARE = 5


def same_question(text: str) -> str:
    """Return what equal questions share: case and white space do not count."""
    return " ".join(text.lower().split())


def split_of(question: str) -> str:
    """Return `train`, `validation` or `test` for a question.

    Membership depends on the text alone (lower case, whitespace normalised), not on a seed or a
    position: reasoning-gym's item `i` of seed `s` is item `0` of seed `s + i`, so rows drawn with
    neighbouring seeds are mostly the same rows.
    """
    bucket = int(hashlib.sha256(same_question(question).encode()).hexdigest()[:8], 16) % 100
    if bucket < TEST_SHARE:
        return "test"
    return "validation" if bucket < TEST_SHARE + VALIDATION_SHARE else "train"
