"""Compare one answer with one gold answer, by each of the six verifiers.

Plain text, numbers and letters are compared here, in microseconds. What needs a parser of
mathematics, or a data set's own scorer, comes back as a job for a judging process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from chainforge.core.errors import InputError
from chainforge.rewards import exact
from chainforge.rewards.answers import (
    MAX_TEXT,
    balanced,
    boxes,
    candidate,
    clean,
    decimal,
    depth,
    hostile,
    number,
    ratio,
    squeeze,
)
from chainforge.rewards.scorers import plain_scorer

Job = tuple[str, str, str]
"""Kind, the answer, the gold answer (or the entry's JSON): what a judging process is sent."""


@dataclass(frozen=True)
class Claim:
    """One answer text against one gold answer, by one verifier."""

    verifier: str
    text: str
    gold: str | None
    entry: str | dict[str, Any] | None = None
    tolerance: float = 1e-6


@dataclass(frozen=True)
class _Gold:
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
def _gold(text: str | None) -> _Gold | None:
    """Read a gold answer; None when it is empty or its braces do not close."""
    spelled = clean(str(text)) if text is not None else ""
    if not spelled or not balanced(spelled):
        return None
    bare = spelled.removesuffix("%").strip()
    words = _words(spelled)
    # `hello world` is prose: math-verify would read the product of its letters.
    prose = bool(words) and not re.search(r"[\d=<>^+*/]|\\(?!text|mathrm|textbf)", spelled)
    return _Gold(spelled, squeeze(spelled), number(bare), spelled.endswith("%"), prose)


def _words(text: str) -> set[str]:
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


def _value_text(claim: Claim, gold: _Gold) -> str | None:
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


def _math(claim: Claim) -> bool | Job | None:
    """Exact text, then exact arithmetic, then math-verify with both answers boxed."""
    gold = _gold(claim.gold)
    if gold is None:
        return None
    text = _value_text(claim, gold)
    if text is None:
        return False
    if squeeze(text) == gold.key:
        return True
    if gold.prose:
        return squeeze(text).casefold() == gold.key.casefold()
    value = number(text.removesuffix("%"))
    if value is not None and gold.value is not None:
        return _same(value, gold, text)
    if _words(text) - _words(gold.text):
        return False
    decided = exact.decide(text, gold.text)
    return ("math", text, gold.text) if decided is None else decided


def _same(value: Fraction, gold: _Gold, text: str) -> bool:
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


def _arithmetic(claim: Claim) -> bool | None:
    """As `math`, but the answer must be a number, worked out: `2+2` restates the question.

    A fraction counts only where the gold answer is one, with the same two numbers.
    """
    gold = _gold(claim.gold)
    if gold is None or gold.value is None:
        return None
    text = _value_text(claim, gold)
    value = number(text.removesuffix("%")) if text else None
    if text is None or value is None:
        return False
    written = ratio(text.removesuffix("%"))
    if written is not None and written != ratio(gold.text.removesuffix("%")):
        return False
    return _same(value, gold, text)


def _numeric(claim: Claim) -> bool | None:
    """Within `tolerance`, relative to the gold answer and absolute below 1."""
    gold = _gold(claim.gold)
    target = decimal(gold.text.removesuffix("%").strip()) if gold else None
    if gold is None or target is None:
        return None
    known = _Gold(gold.text, gold.key, target, gold.percent, prose=False)
    text = _value_text(claim, known)
    value = decimal(text.removesuffix("%").strip()) if text else None
    if text is None or value is None:
        return False
    return abs(value - target) <= Fraction(claim.tolerance) * max(Fraction(1), abs(target))


_LETTER = re.compile(r"\(?([A-Za-z0-9])\)?[.:)]?")
_LETTER_AND_TEXT = re.compile(r"\(?([A-Z0-9])[.:)]\)?\s+(.+)", re.DOTALL)
_OTHER_LETTER = re.compile(r"(?<![A-Za-z])[A-Z][.:)]|\b(?:or|and|not)\s+\(?[A-Z]\b")


def _choice(claim: Claim) -> bool | None:
    """One letter (`B`, `(b)`, `B) Paris`); two letters are no choice. Other golds: exact text."""
    gold = _gold(claim.gold)
    if gold is None:
        return None
    text = candidate(claim.text)
    wanted = _LETTER.fullmatch(gold.text)
    if text is None:
        return False
    if wanted is None:
        return squeeze(text).casefold() == gold.key.casefold()
    if chosen := _LETTER.fullmatch(text):
        return chosen[1].casefold() == wanted[1].casefold()
    explained = _LETTER_AND_TEXT.fullmatch(text)
    if explained is None or _OTHER_LETTER.search(explained[2]):
        return False
    return explained[1].casefold() == wanted[1].casefold()


def _exact(claim: Claim) -> bool | None:
    """The same text, but for white space and wrapping (`$..$`, box, bold, full stop)."""
    gold = _gold(claim.gold)
    if gold is None:
        return None
    text = candidate(claim.text)
    return text is not None and text == gold.text


def _scored(claim: Claim) -> bool | Job | None:
    """The data set's own scorer; correct is the full score.

    Some scorers pick the right part out of an answer, so that `20, 21` and `20%` earn as much as
    20. Where the gold answer is a number the answer must be one; and the gold answer with anything
    added is not it.
    """
    entry = _entry(claim.entry)
    raw = str((claim.gold if claim.gold is not None else entry["answer"]) or "").strip()
    text = claim.text.strip()
    if not text or text == raw:
        return bool(text)
    if len(text) > max(MAX_TEXT // 4, 4 * len(raw)) or depth(text) > _SCORED_DEPTH:
        return False
    contents = boxes(text) if "\\boxed" in text else []
    if contents is None or len(contents) > 1 or _PROGRAM.search(text):
        return False
    text = contents[0].strip() if contents else text
    gold = _gold(raw)
    if gold and gold.value is not None:
        value = _value_text(claim, gold)
        if value is None or number(value.removesuffix("%")) is None:
            return False
        text = value.replace(",", "") if gold.text == raw else text
    elif raw and _bare(raw) in _bare(text) and _bare(raw) != _bare(text):
        return False
    if text == raw:
        return True
    if scorer := plain_scorer(str(entry["metadata"]["source_dataset"])):
        return scorer(text, entry) >= 1.0
    return ("reasoning_gym", text, json.dumps(entry, sort_keys=True))


_SCORED_DEPTH = 50
# Some scorers evaluate the answer; nothing that is more than arithmetic reaches them.
_PROGRAM = re.compile(r"__|\blambda\b|\bimport\b|\b(?:exec|eval|open|getattr)\s*\(")


def _bare(text: str) -> str:
    """Drop case and all white space."""
    return "".join(text.split()).casefold()


def _entry(entry: str | dict[str, Any] | None) -> dict[str, Any]:
    """Read the entry a reasoning-gym row carries; raise `InputError` for anything else."""
    try:
        read = json.loads(entry) if isinstance(entry, str) else entry
        if isinstance(read, dict) and read["metadata"]["source_dataset"] and "answer" in read:
            return read
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(
        "verifier reasoning_gym: the row needs a column `entry`, a JSON string with `question`, "
        f"`answer` and `metadata` (with `source_dataset`); it has {str(entry)[:80]!r}"
    )


COMPARISONS: dict[str, Callable[[Claim], bool | Job | None]] = {
    "math": _math,
    "arithmetic": _arithmetic,
    "numeric": _numeric,
    "choice": _choice,
    "exact": _exact,
    "reasoning_gym": _scored,
}
