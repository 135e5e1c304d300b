r"""Decide without a parser of mathematics what exact arithmetic can decide.

math-verify needs some 5 to 50 milliseconds for an answer such as `\frac{2\sqrt{3}}{5}`, `(1,-2)` or
`x^2+3x-1`. These are sums of products, or brackets around a few, whose forms can be compared.
Everything else, decimals among it, is left to math-verify, as is what could be read in two ways.
"""

from __future__ import annotations

import re
from functools import lru_cache

from chainforge.rewards.answers import MAX_ANSWER, MAX_DEPTH, depth
from chainforge.rewards.sums import Unclear, read_sum

_ENDLESS = {"\\infty": "+", "+\\infty": "+", "-\\infty": "-"}
_SPACES = re.compile(r"\s+")
_BASED = re.compile(r"\s*(\d+)\s*_\s*\{?(\d+)\}?\s*")
_THOUSANDS = re.compile(r"\d{3}(?!\d)")
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{3,}")  # `log`, `abc`: a name or a product


def decide(text: str, gold: str) -> bool | None:
    """Return whether an answer equals a gold answer, both spelled by `clean`; None: who knows."""
    if "\\cup" in gold:
        parts, golds = text.split("\\cup"), gold.split("\\cup")
        same = len(parts) == len(golds) and all(map(decide, parts, golds))
        return same or None
    if (based := _BASED.fullmatch(text)) and (gold_based := _BASED.fullmatch(gold)):
        return based.groups() == gold_based.groups()  # math-verify overlooks the base
    mine, theirs = _read(text), _read(gold)
    if mine is None or theirs is None or mine[0] != theirs[0]:
        return None
    kind, values, golds_values = mine[0], mine[1], theirs[1]
    if kind == "{}":
        return set(values) == set(golds_values)
    if values == golds_values:
        return True
    if kind == "" and set(values) == set(golds_values):
        return None  # A list without brackets in another order, or with one value twice.
    return False


@lru_cache(maxsize=65_536)
def _read(text: str) -> tuple[str, tuple[str, ...]] | None:
    """Return a text's brackets, and the form of each value between them."""
    text = text.strip()
    if len(text) > MAX_ANSWER or depth(text) > MAX_DEPTH or _WORD.search(text):
        return None
    kind, inside = "", text
    if text.startswith("\\{") and text.endswith("\\}"):
        kind, inside = "{}", text[2:-2]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]") and len(_split(text[1:-1])) > 1:
        kind, inside = text[0] + text[-1], text[1:-1]
    values = _split(inside)
    if kind == "[]" or (kind == "" and any(_THOUSANDS.match(value) for value in values[1:])):
        return None  # `[1,2]` may be a list or an interval, `1,234` one number or two.
    try:
        return kind, tuple(_form(value) for value in values)
    except (Unclear, ZeroDivisionError):
        return None


def _split(text: str) -> list[str]:
    """Split at the commas that no bracket encloses; a bracket that closes too early is no split."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if depth < 0:
            return [text]
        if character == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def _form(text: str) -> str:
    """Return one text for all ways of writing a value."""
    bare = _SPACES.sub("", text)
    if bare in _ENDLESS:
        return _ENDLESS[bare] + "infinite"
    total = read_sum(text)
    return " + ".join(sorted(f"{factor}*{term}" for term, factor in total.items()))
