"""One answer and one gold answer: what is read of each before a verifier compares them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from chainforge.rewards.answers import balanced, candidate, clean, hostile, number, squeeze


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
    value: Fraction | None
    percent: bool
    prose: bool


# Two or more letters in a row that are no product of variables: words, not mathematics.
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|\b(?:or|is|no|to|if|so|we|it)\b", re.IGNORECASE)
_FUNCTIONS = frozenset({"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "mod", "inf"}) | {
    written for name in ("sin", "cos", "tan") for written in (f"{name}h", f"arc{name}")
}
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|operatorname)\s*\{([^{}]*)\}")
_MARKUP = re.compile(r"\\[A-Za-z]+")


@lru_cache(maxsize=8192)
def read_gold(text: str | None) -> Gold | None:
    """Read a gold answer; None when it is empty or its braces do not close."""
    spelled = clean(str(text)) if text is not None else ""
    if not spelled or not balanced(spelled):
        return None
    bare = spelled.removesuffix("%").strip()
    words = words_of(spelled)
    # `hello world` is prose: math-verify would read the product of its letters.
    prose = bool(words) and not re.search(r"[\d=<>^+*/]|\\(?!text|mathrm|textbf)", spelled)
    return Gold(spelled, squeeze(spelled), number(bare), spelled.endswith("%"), prose)


def words_of(text: str) -> set[str]:
    """Return the words of ordinary language in an answer, also those marked as text."""
    plain = _MARKUP.sub(" ", _LATEX_TEXT.sub(r" \1 ", text))
    return {word.casefold() for word in _WORD.findall(plain)} - _FUNCTIONS


_EQUALS = re.compile(r"(?<![\\<>!=])=+(?!>)|\\approx(?![a-z])|\\equiv(?![a-z])")
# Signs that state a problem, a relation or an alternative instead of a value.
_REFUSED = re.compile(
    r"\\(?:neq?|leq?|geq?|lt|gt|l?or|l?and|lnot|neg|vee|wedge|pm|mp|not|i*int|oint|sum|prod|lim"
    r"|max|min|sup|inf|gcd|lcm|det|mod|bmod|pmod|equiv)(?![a-z])|[<>;|?&]{1,2}|±|∨|∧|!="
)
_UNIT = re.compile(r"(.*?\d[\s)}.]*)(?:\\(?:text|mathrm)\s*\{\s*([A-Za-z ]+?)\s*\}|([A-Za-z]{2,}))")
_NO_UNIT = re.compile(
    r"\b(?:or|and|not|nor|to|no|percent|percentage|pct|hundred|thousand|million|billion|trillion"
    r"|dozen|half|halves|thirds?|quarters?|tenths?|squared|cubed|factorial|pi|times|plus|minus|mod"
    r"|choose|over|by|sin|cos|tan|log|ln|exp)\b",
    re.IGNORECASE,
)


def value_text(claim: Claim, gold: Gold) -> str | None:
    """Return the answer's value as text: `x = 5` is 5, `5 apples` is 5; None is refused.

    Refused are chains (`x=3=5=4`), an equation of numbers (`3=4`), a percent sign the gold answer
    does not have (4 % is not 4, and paying for both pays a guess), signs and words for several
    candidates.
    """
    text = candidate(claim.text)
    if text is None or text == gold.text:
        return text
    if not balanced(text) or hostile(text, gold.text):
        return None
    if not _EQUALS.search(gold.text):
        sides = _EQUALS.split(text)
        if len(sides) > 2 or (len(sides) == 2 and not re.search("[A-Za-z]", sides[0])):
            return None
        text = sides[-1].strip()
    unit = _UNIT.fullmatch(text) if gold.value is not None else None
    if unit and not _NO_UNIT.search(unit[2] or unit[3]):
        text = unit[1].strip()
    if "%" in text and not (gold.percent and text.count("%") == 1 and text.endswith("%")):
        return None
    if set(_REFUSED.findall(text)) - set(_REFUSED.findall(gold.text)):
        return None
    return text or None


def same_number(value: Fraction, gold: Gold, text: str) -> bool:
    """Compare numbers: whole ones exactly, others to six digits, as 0.333333 for 1/3."""
    assert gold.value is not None
    golds = [gold.value]
    if gold.percent and not text.endswith("%"):
        golds.append(gold.value / 100)
    slack = Fraction(1, 10**6)
    return any(
        value == target or (target.denominator > 1 and abs(value - target) <= slack * abs(target))
        for target in golds
    )
