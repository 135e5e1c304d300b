"""One answer and one gold answer: what is read of each before a verifier compares them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from chainforge.rewards.answers import balanced, boxes, candidate, clean, hostile
from chainforge.rewards.exact import Value, read
from chainforge.rewards.quantities import squeeze


@dataclass(frozen=True)
class Claim:
    """One answer text against one gold answer, by one verifier."""

    verifier: str
    text: str
    gold: str | None
    entry: str | dict[str, Any] | None = None
    tolerance: float = 1e-6


@dataclass(frozen=True)
class Gold:
    """What is known of a gold answer before any answer is seen."""

    text: str
    key: str
    said: Value
    prose: bool

    @property
    def value(self) -> Fraction | None:
        """The gold answer as a number, also with a unit or a percent sign; None for others."""
        return self.said.number.value if self.said.number else None


# Two or more letters in a row that are no product of variables: words, not mathematics.
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|\b(?:or|is|no|to|if|so|we|it)\b", re.IGNORECASE)
_FUNCTIONS = frozenset({"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "mod", "inf"}) | {
    written for name in ("sin", "cos", "tan") for written in (f"{name}h", f"arc{name}")
}
_LATEX_TEXT = re.compile(r"\\(?:text|operatorname)\s*\{([^{}]*)\}")
_MARKUP = re.compile(r"\\(?:begin|end)\s*\{[a-zA-Z]*\}|\\[A-Za-z]+")


@lru_cache(maxsize=8192)
def read_gold(text: str | None) -> Gold | None:
    """Read a gold answer; None when it is empty or its braces do not close."""
    spelled = clean(str(text)) if text is not None else ""
    if "\\boxed" in spelled and boxes(spelled):
        spelled = candidate(spelled) or spelled
    if not spelled or not balanced(spelled):
        return None
    # `hello world` is prose: math-verify would read the product of its letters.
    plain = not re.search(r"[\d=<>^+*/]|\\(?!text|emptyset|infty|pi)", spelled)
    said = read(spelled, True)
    return Gold(spelled, squeeze(spelled), said, bool(words_of(spelled)) and plain)


def words_of(text: str) -> set[str]:
    """Return the words of ordinary language in an answer, also those marked as text."""
    plain = _MARKUP.sub(" ", _LATEX_TEXT.sub(r" \1 ", text))
    return {word.casefold() for word in _WORD.findall(plain)} - _FUNCTIONS


# Signs that state a problem, a relation or an alternative instead of a value.
_REFUSED = re.compile(
    r"\\(?:neq|le|ge|l?or|l?and|lnot|neg|vee|wedge|pm|mp|not|i*int|oint|sum|prod|lim"
    r"|Pi|max|min|sup|inf|gcd|lcm|det|mod|bmod|pmod|equiv)(?![a-z])|[<>;|?&]{1,2}|!"
)


def read_answer(claim: Claim, gold: Gold) -> Value | None:
    """Return what the answer says; None when it says nothing, too much, or what is hostile."""
    text = candidate(claim.text)
    if not text or text == gold.text:
        return gold.said if text else None
    if not balanced(text) or hostile(text, gold.text):
        return None
    return read(text)


def refused(value: Value, gold: Gold) -> bool:
    """Whether a part of an answer has words or signs that no parser should be asked about."""
    parts = [part for part in _scalars(value) if part.number is None]
    return any(
        words_of(part.text) - words_of(gold.text)
        or set(_REFUSED.findall(part.text)) - set(_REFUSED.findall(gold.text))
        for part in parts
    )


def _scalars(value: Value) -> list[Value]:
    if value.kind in ("scalar", "relation"):
        return [value]
    found: list[Value] = []
    stack = list(value.parts)
    while stack:
        part = stack.pop()
        if isinstance(part, tuple):
            stack.extend(part)
        elif isinstance(part, Value):
            found += _scalars(part)
    return found


def value_text(claim: Claim, gold: Gold) -> str | None:
    """Return the answer's one scalar as text: `x = 5` is 5, `5 apples` is 5; None for others."""
    value = read_answer(claim, gold)
    if value is None or value.kind != "scalar" or (value.percent and not gold.said.percent):
        return None
    if value.unit and gold.said.unit and value.unit != gold.said.unit:
        return None
    return value.text
