"""Decide whether answer texts give their gold answers: a batch in, verdicts out.

Six verifiers: `math`, `arithmetic`, `numeric`, `choice`, `exact`, `reasoning_gym`. A verdict is
True, False, or None where the gold answer itself cannot be read. Text, numbers and letters are
compared here, in microseconds; what needs a parser of mathematics, or a data set's own scorer,
becomes a job of the verifier pool.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

from chainforge.core.errors import InputError, hint
from chainforge.rewards.answers import (
    MAX_TEXT,
    balanced,
    boxes,
    candidate,
    clean,
    doubted,
    hostile,
)
from chainforge.rewards.scorers import is_right
from chainforge.rewards.values import (
    FLIPPED,
    JOINED,
    LOW,
    SIGNED,
    End,
    Number,
    Value,
    as_region,
    depth,
    evaluate,
    is_formula,
    number,
    ratio,
    read,
    same_value,
    squeeze,
)
from chainforge.rewards.verifier_pool import Job, Verdict, VerifierPool


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
    """What is known of a gold answer before any answer is seen; `prose` has words alone."""

    text: str
    value: Value
    prose: bool

    @property
    def number(self) -> Fraction | None:
        """Return the gold answer as a number, also with a unit or percent sign, or None."""
        return self.value.number.value if self.value.number else None


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
    return Gold(spelled, read(spelled, True), bool(words_of(spelled)) and plain)


def words_of(text: str) -> set[str]:
    """Return the words of ordinary language in an answer, also those marked as text."""
    plain = _MARKUP.sub(" ", _LATEX_TEXT.sub(r" \1 ", text))
    return {word.casefold() for word in _WORD.findall(plain)} - _FUNCTIONS


# Signs that state a problem, a relation or an alternative instead of a value.
_REFUSED = re.compile(
    r"\\(?:neq|le|ge|l?or|l?and|lnot|neg|vee|wedge|pm|mp|not|i*int|oint|sum|prod|lim"
    r"|Pi|max|min|sup|inf|gcd|lcm|det|mod|bmod|pmod|equiv)(?![a-z])|[<>;|?&]{1,2}|!"
)


def read_answer(text: str, gold: Gold) -> Value | None:
    """Return what an answer says; None when it says nothing, too much, or what is hostile."""
    if not text or text == gold.text:
        return gold.value if text else None
    return None if not balanced(text) or hostile(text, gold.text) else read(text)


def refused(value: Value, gold: Gold) -> bool:
    """Return whether a part of an answer has words or signs that no parser should read."""
    parts = [part for part in _scalars(value) if part.number is None]
    return any(
        words_of(part.text) - words_of(gold.text)
        or set(_REFUSED.findall(part.text)) - set(_REFUSED.findall(gold.text))
        for part in parts
    )


def _scalars(value: Value | bool | str | tuple[Any, ...]) -> list[Value]:
    if isinstance(value, Value) and value.kind in ("scalar", "relation"):
        return [value]
    parts = value.parts if isinstance(value, Value) else value
    return [one for part in parts for one in _scalars(part)] if isinstance(parts, tuple) else []


def scalar_text(text: str, gold: Gold) -> str | None:
    """Return the answer's one scalar as text: `x = 5` is 5, `5 apples` is 5; None for others."""
    value = read_answer(text, gold)
    if value is None or value.kind != "scalar" or (value.percent and not gold.value.percent):
        return None
    return None if value.unit and gold.value.unit not in (None, value.unit) else value.text


def _math(text: str, gold: Gold, claim: Claim) -> bool | list[Job]:
    """Compare exact text, then structure and exact arithmetic, then each scalar by math-verify."""
    if squeeze(text) == squeeze(gold.text):
        return True
    if (words_of(gold.text) or "\\text" in gold.text) and _word(text) == _word(gold.text):
        return True
    if gold.prose:
        return False
    if (letter := _ONE_LETTER.fullmatch(gold.text)) and _letter(text, math=True) == letter[1]:
        return True
    value = read_answer(text, gold)
    if value is None or refused(value, gold):
        return False
    same = compare(value, gold.value)
    return same if isinstance(same, bool) else [("math", *pair) for pair in same]


def _word(text: str) -> str:
    """Return a text in words as it is compared: without markup, quotes, case and blanks."""
    words = _TEXT.sub(r"\1", text).strip(" .\"'").casefold().split()
    return " ".join(words[1:] if words[1:] and words[0] in ("a", "an", "the") else words)


def _arithmetic(text: str, gold: Gold, claim: Claim) -> bool:
    """Compare as `math`, but the answer must be a number: `2+2` restates the question.

    A fraction counts only where the gold answer is one, with the same two numbers.
    """
    value = read_answer(text, gold)
    if value is None or value.kind != "scalar" or value.number is None:
        return False
    written = ratio(value.text)
    is_other = written is not None and written != ratio(gold.value.text)
    return not is_other and same_scalar(value, gold.value) is True


def _numeric(text: str, gold: Gold, claim: Claim) -> bool:
    """Compare within `tolerance`, relative to the gold answer."""
    value, wanted = number(scalar_text(text, gold) or ""), gold.number
    if value is None or wanted is None:
        return False
    return abs(value - wanted) <= Fraction(claim.tolerance) * abs(wanted)


_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_LETTER = re.compile(r"[(\[]?([A-Za-z0-9])[)\]]?[.:)]?")
_ONE_LETTER = re.compile(r"\(?([A-J])\)?[.:)]?")
_CHOSEN = re.compile(
    r"(?:(?:the\s+)?(?:correct |right |best )?(?:option|choice|answer|letter)\s*"
    r"|(?:因此|所以|故|应)?选[项择]?\s*)?"
    r"(?:\(([A-Za-z0-9])\)|([A-Z0-9])(?:[.:),]|(?=\s+-\s|\s*\([A-Za-z]{2}|\s+\([\d\\¤$])|\Z)|([a-z])\Z)(.*)",
    re.DOTALL | re.IGNORECASE,
)
_OTHER_LETTER = re.compile(
    r"(?<![A-Za-z\\])(?:[A-HJ-Z]|A(?!\s[a-z]))(?![A-Za-z])|\([A-Za-z]\)"
    r"|\b(?:or|and|not)\s+\(?[A-Z]\b"
)


_BESIDE = re.compile(r"(?:,|.\s*(?:,|and\b|or\b|[或和]))\s*[\d$¤]|[^\n]*(?:\n|\?\s*[\d?])")


def _choice(text: str, gold: Gold, claim: Claim) -> bool:
    """Compare one letter (`B`, `(b)`, `B) Paris`), else the text; two letters are no choice."""
    if wanted := _LETTER.fullmatch(gold.text):
        return (_letter(text) or "").casefold() == wanted[1].casefold()
    return _word(text) == _word(gold.text)


def _letter(text: str, math: bool = False) -> str | None:
    """Return the letter that an answer chooses; None when it chooses none, or several."""
    text = _TEXT.sub(r"\1", text).strip()
    if chosen := _LETTER.fullmatch(text):
        return chosen[1]
    chosen = _CHOSEN.fullmatch(text)
    if chosen and _BESIDE.match(text, chosen.start(4) - 1):
        return None
    if chosen is None or _OTHER_LETTER.search(chosen[4]) or doubted(chosen[4]):
        return None
    if math and not chosen[1] and re.search(r"[\d=^]", chosen[4]):
        return None  # `B - 1` is a term
    return chosen[1] or chosen[2] or chosen[3]


def _exact(text: str, gold: Gold, claim: Claim) -> bool:
    """Compare texts, but for white space and wrapping (`$..$`, box, bold, full stop)."""
    return text == gold.text


def _scored(claim: Claim) -> bool | list[Job]:
    """Ask the data set's own scorer; correct is the full score.

    Some scorers pick the right part out of an answer, so that `20, 21` and `20%` earn as much as
    20. Where the gold answer is a number the answer must be one; and the gold answer with anything
    added is not it.
    """
    entry = _entry(claim.entry)
    raw = str((claim.gold if claim.gold is not None else entry["answer"]) or "").strip()
    text = claim.text.strip()
    if not text or text == raw:
        return bool(text)
    if entry["answer"] == "" or (_NAN.search(text) and not _NAN.search(raw)):
        return text in ('""', "''")  # An empty gold answer; a number that is none is never right.
    if len(text) > max(MAX_TEXT // 4, 4 * len(raw)) or depth(text) > _SCORED_DEPTH:
        return False
    contents = boxes(text) if "\\boxed" in text else []
    if contents is None or len(contents) > 1:
        return False
    text = contents[0].strip() if contents else text
    gold = read_gold(raw)
    if gold and gold.number is not None:
        value = scalar_text(candidate(claim.text) or "", gold)
        if value is None or number(value) is None:
            return False
        text = value.replace(",", "") if gold.text == raw else text
    elif raw and _bare(raw) in _bare(text) and _bare(raw) != _bare(text):
        return False
    if text == raw:
        return True
    if (right := is_right(text, entry)) is not None:
        return right
    return [("reasoning_gym", text, json.dumps(entry, sort_keys=True))]


_SCORED_DEPTH = 50
_NAN = re.compile(r"(?<![A-Za-z])nan(?![A-Za-z])", re.IGNORECASE)


def _bare(text: str) -> str:
    """Drop case and all white space."""
    return "".join(text.split()).casefold()


def _entry(entry: str | dict[str, Any] | None) -> dict[str, Any]:
    """Read the entry a reasoning-gym row carries; raise `InputError` for anything else."""
    try:
        read = json.loads(entry) if isinstance(entry, str) else entry
        if isinstance(read, dict) and read["metadata"]["source_dataset"] and "answer" in read:
            return read
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise InputError(
        "verifier reasoning_gym: the row needs a column `entry`, a JSON string with `question`, "
        f"`answer` and `metadata` (with `source_dataset`); it has {str(entry)[:80]!r}"
    )


Pairs = list[tuple[str, str]]
"""Scalars of an answer and a gold answer that a parser of mathematics must find equal."""


def compare(mine: Value, gold: Value) -> bool | Pairs:
    """Return whether an answer is the gold answer; pairs are what math-verify must find equal."""
    if gold.kind == "scalar" and mine.kind == "set" and len(mine.parts) == 1:
        mine = mine.parts[0]
    return _compare(mine, gold)


def _compare(mine: Value, gold: Value) -> bool | Pairs:
    if mine.name and gold.name and mine.name != gold.name:
        return False
    if gold.kind == "relation":
        return [(mine.raw, gold.raw)] if _alike(mine.raw, gold.raw) else False
    if mine.kind == "relation":
        # Another way of writing the equation `y = 2x + 3`.
        both = "=" in mine.raw and "=" in gold.raw and is_formula(gold.raw.partition("=")[2])
        return [(mine.raw, gold.raw)] if both and _alike(mine.raw, gold.raw) else False
    if gold.kind == "scalar":
        return same_scalar(mine, gold) if mine.kind == "scalar" else False
    if gold.kind == "region" or mine.kind == "region":
        return _same_region(as_region(mine), as_region(gold))
    if gold.kind == "matrix":
        if mine.kind != "matrix" or [*map(len, mine.parts)] != [*map(len, gold.parts)]:
            return False
        return _in_order([c for r in mine.parts for c in r], [c for r in gold.parts for c in r])
    if "named" in (mine.kind, gold.kind):
        return _same_named(mine, gold)
    if gold.kind in ("list", "set"):
        if mine.kind in ("list", "set"):
            return _in_any_order(mine, gold)
        if (mine.kind, gold.kind) != ("()", "list") or SIGNED.search(gold.text):
            return False
        return _in_order(mine.parts, gold.parts)
    listed = mine.kind == "list" and not mine.name and not JOINED.search(mine.raw)
    if mine.kind == gold.kind or (gold.kind == "()" and listed):
        return _in_order(mine.parts, gold.parts)
    return False


_BASED = re.compile(r"\s*([\dA-F]+)\s*_\s*\{?(\d+)\}?\s*")
_PLAIN = re.compile(
    r"(?:\\frac|\\sqrt(?:\s*\[\d+\])?|(?<![\d})])-(?!-)|[\d.{}^()\s]|/(?!.*/)|(?<=\{)-)+"
)
_PRODUCT = re.compile(r"[\d})]\s*\(|\)\s*\d")
_MARKS = re.compile(r"\\(?:le|ge|neq|in|pm|to|approx)(?![a-z])|[<>&?]|\\\\")


def _alike(text: str, gold: str) -> bool:
    """Return whether a relation has only signs of the gold answer's, reversed or not."""
    known = set(_MARKS.findall(gold))
    if _subscripts(text) > _subscripts(gold):
        return False
    return known | {FLIPPED.get(sign, sign) for sign in known} >= set(_MARKS.findall(text))


def _in_order(mine: Sequence[Value], gold: Sequence[Value]) -> bool | Pairs:
    if len(mine) != len(gold):
        return False
    found: Pairs = []
    for one, other in zip(mine, gold, strict=True):
        same = _compare(one, other)
        if same is False:
            return False
        found += same if isinstance(same, list) else []
    return found or True


def _in_any_order(mine: Value, gold: Value) -> bool | Pairs:
    """Compare the same number of values, each with one that is left; the unclear ones last."""
    if len(mine.parts) != len(gold.parts):
        return False
    left, unclear = list(gold.parts), []
    for one in mine.parts:
        verdicts = [_compare(one, other) for other in left]
        equal = next((place for place, same in enumerate(verdicts) if same is True), None)
        if equal is not None:
            left.pop(equal)
        elif all(same is False for same in verdicts):
            return False
        else:
            unclear.append(one)
    if len(unclear) < 2:
        return _in_order(unclear, left)
    return [(_set_of(unclear), _set_of(left))]


def _set_of(values: Sequence[Value]) -> str:
    """Write values as a set of LaTeX."""
    return f"\\{{{','.join(value.text for value in values)}\\}}"


def _same_named(mine: Value, gold: Value) -> bool | Pairs:
    """Compare `x=2, y=3` with `(2,3)` in the order of the names, or with named values."""
    sides, names = [], []
    for value, kinds in ((mine, ("named", "()", "list")), (gold, ("named", "()"))):
        if value.kind not in kinds or value.name:
            return False
        named = value.kind == "named"
        names.append([name for name, _ in value.parts] if named else None)
        parts = [part for _, part in value.parts] if named else value.parts
        sides.append([replace(part, name="") for part in parts])
    if None not in names and names[0] != names[1]:
        return False
    return _in_order(*sides)


def _same_region(mine: Value | None, gold: Value | None) -> bool | Pairs:
    if mine is None or gold is None or len(mine.parts) != len(gold.parts):
        return False
    if mine.name and gold.name and mine.name != gold.name:
        return False
    ends = [
        [end for interval in sorted(region.parts, key=_start) for end in interval]
        for region in (mine, gold)
    ]
    if [closed for _, closed in ends[0]] != [closed for _, closed in ends[1]]:
        return False
    return _in_order(*([value for value, _ in of] for of in ends))


def _start(interval: tuple[End, End]) -> Fraction | float:
    low = interval[0][0]
    if low is LOW:
        return float("-inf")
    return low.number.value if low.number else Fraction(evaluate(low.text) or 0)


def same_scalar(mine: Value, gold: Value) -> bool | Pairs:
    """Compare two scalars, with their units."""
    if mine.about and gold.number and not mine.number:
        return same_scalar(mine.about, gold)
    if mine.unit and gold.unit and mine.unit != gold.unit:
        return False
    if (mine.percent or gold.percent) and (mine.unit or not gold.percent):
        return False
    if _key(mine.text) == _key(gold.text) and _key(gold.text):
        return True
    if gold.number:
        if mine.number:
            golds = [gold.number]
            if gold.percent and not mine.percent:
                golds.append(Number(gold.number.value / 100, gold.number.place / 100))
            return any(mine.number.equals(one) for one in golds)
        if not worked_out(mine.text):
            return False
    if mine.percent or gold.percent:
        return False
    if (based := _BASED.fullmatch(mine.text)) is not None:  # math-verify overlooks the base
        gold_based = _BASED.fullmatch(gold.text)
        return gold_based is not None and based.groups() == gold_based.groups()
    if _subscripts(mine.text) > _subscripts(gold.text) or _BROKEN.search(mine.text):
        return False
    if ("\\circ" in mine.text) != ("\\circ" in gold.text):  # it overlooks degrees, too
        return False
    one, other = evaluate(mine.text), evaluate(gold.text)
    same = None if one is None or other is None else same_value(one, other)
    return [(mine.text, gold.text)] if same is None else same


# math-verify reads `8.\frac{3}{7}` as the fraction, `5 0` as 0.
_BROKEN = re.compile(r"\d\.(?!\d)|\d\s+\d")


def _subscripts(text: str) -> int:
    return text.count("_") - text.count("\\log_")


def _key(text: str) -> str:
    """Drop all spaces where none stands between two digits."""
    return squeeze(text) if re.search(r"\d\s+\d", text) else "".join(text.split())


def worked_out(text: str) -> bool:
    """Return whether a text is a value, not a task: one fraction, root or power of numbers."""
    text = squeeze(text)
    return bool(_PLAIN.fullmatch(text)) and not _PRODUCT.search(text)


_COMPARISONS: dict[str, Callable[[str, Gold, Claim], bool | list[Job]]] = {
    "math": _math,
    "arithmetic": _arithmetic,
    "numeric": _numeric,
    "choice": _choice,
    "exact": _exact,
}


VERIFIERS = (*_COMPARISONS, "reasoning_gym")
POOL = VerifierPool()
logger = logging.getLogger(__name__)

# What the pool answers instead of yes or no; the last two say nothing about the answer.
_WITHOUT = {"timeout": False, "memory": False, "crash": False, "gold": None, "lost": None}
_CACHE_SIZE = 65_536
_cache: dict[Job, Verdict] = {}


def verify(
    verifier: str,
    text: str,
    gold: str | None,
    entry: str | dict[str, Any] | None = None,
    tolerance: float = 1e-6,
) -> bool | None:
    """Verify one answer text; `verify_all` does a batch, over several processes."""
    return verify_all([Claim(verifier, text, gold, entry, tolerance)])[0]


def verify_all(claims: Sequence[Claim], pool: VerifierPool | None = None) -> list[bool | None]:
    """Verify a batch, in order. Raises `InputError` for an unknown verifier or a broken entry."""
    decisions = [decide(claim) for claim in claims]
    jobs = dict.fromkeys(job for item in decisions if isinstance(item, list) for job in item)
    if len(_cache) > _CACHE_SIZE:
        _cache.clear()
    unknown = [job for job in jobs if job not in _cache]
    verdicts = dict(zip(unknown, (pool or POOL).score(unknown), strict=True))
    for job, verdict in verdicts.items():
        if isinstance(verdict, str):
            logger.warning("%s while comparing %.80r with %.80r", verdict, job[1], job[2])
    known = {job: verdicts[job] if job in verdicts else _cache[job] for job in jobs}
    _cache.update({job: verdict for job, verdict in verdicts.items() if verdict != "lost"})
    return [
        _combine([known[job] for job in item]) if isinstance(item, list) else item
        for item in decisions
    ]


def start_pool(rows: Sequence[Mapping[str, Any]]) -> None:
    """Start the pool beside other work if rows will need it: for math other than numbers.

    It imports for a second or two, in which a model is loaded or the first batch generated.
    """
    math = (row for row in rows[:1000] if (row.get("verifier") or "math") == "math")
    if any(number(clean(str(row.get("answer") or ""))) is None for row in math):
        POOL.start(["math"])


def _combine(verdicts: Sequence[Verdict]) -> bool | None:
    """Return whether all parts of an answer are right; None when one cannot be verified."""
    parts = [_WITHOUT[one] if isinstance(one, str) else one for one in verdicts]
    return False if False in parts else None if None in parts else True


def check_verifier(name: str) -> None:
    """Raise `InputError` for an unknown verifier."""
    if name not in VERIFIERS:
        raise InputError(f"no verifier {name!r}; {hint(str(name), VERIFIERS)}")


def decide(claim: Claim) -> bool | list[Job] | None:
    """Compare here where that is safe, else return the jobs for the pool."""
    check_verifier(claim.verifier)
    if claim.verifier == "reasoning_gym":
        return _scored(claim)
    gold = read_gold(claim.gold)
    if gold is None or (claim.verifier in ("arithmetic", "numeric") and gold.number is None):
        return None
    text = candidate(claim.text)
    return text is not None and _COMPARISONS[claim.verifier](text, gold, claim)
