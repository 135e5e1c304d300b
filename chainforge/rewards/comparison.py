"""Compare one answer with one gold answer, by each of the six verifiers.

Plain text, numbers and letters are compared here, in microseconds. What needs a parser of
mathematics, or a data set's own scorer, comes back as a job for a judging process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from chainforge.core.errors import InputError
from chainforge.rewards.answers import MAX_TEXT, boxes, candidate, depth, doubted
from chainforge.rewards.claims import Claim, read_answer, read_gold, refused, value_text, words_of
from chainforge.rewards.exact import compare, same_scalar
from chainforge.rewards.judges import Job
from chainforge.rewards.quantities import number, ratio, squeeze
from chainforge.rewards.scorers import plain_scorer


def _math(claim: Claim) -> bool | list[Job] | None:
    """Exact text, then structure and exact arithmetic, then math-verify for each scalar left."""
    gold = read_gold(claim.gold)
    if gold is None:
        return None
    text = candidate(claim.text)
    if text is None:
        return False
    if squeeze(text) == gold.key:
        return True
    if (words_of(gold.text) or "\\text" in gold.text) and _word(text) == _word(gold.text):
        return True
    if gold.prose:
        return False
    if (letter := _ONE_LETTER.fullmatch(gold.text)) and _letter(text, math=True) == letter[1]:
        return True
    value = read_answer(claim, gold)
    if value is None or refused(value, gold):
        return False
    same = compare(value, gold.said)
    return same if isinstance(same, bool) else [("math", *pair) for pair in same]


def _word(text: str) -> str:
    """Return a text in words as it is compared: without markup, quotes, case and blanks."""
    words = _TEXT.sub(r"\1", text).strip(" .\"'").casefold().split()
    return " ".join(words[1:] if words[1:] and words[0] in ("a", "an", "the") else words)


def _arithmetic(claim: Claim) -> bool | None:
    """As `math`, but the answer must be a number, worked out: `2+2` restates the question.

    A fraction counts only where the gold answer is one, with the same two numbers.
    """
    gold = read_gold(claim.gold)
    if gold is None or gold.value is None:
        return None
    value = read_answer(claim, gold)
    if value is None or value.kind != "scalar" or value.number is None:
        return False
    written = ratio(value.text)
    if written is not None and written != ratio(gold.said.text):
        return False
    return same_scalar(value, gold.said) is True


def _numeric(claim: Claim) -> bool | None:
    """Within `tolerance`, relative to the gold answer."""
    gold = read_gold(claim.gold)
    if gold is None or gold.value is None:
        return None
    text = value_text(claim, gold)
    value = number(text) if text else None
    if value is None:
        return False
    return abs(value - gold.value) <= Fraction(claim.tolerance) * abs(gold.value)


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


def _choice(claim: Claim) -> bool | None:
    """One letter (`B`, `(b)`, `B) Paris`); two letters are no choice. Other golds: exact text."""
    gold = read_gold(claim.gold)
    if gold is None:
        return None
    text = candidate(claim.text)
    wanted = _LETTER.fullmatch(gold.text)
    if text is None:
        return False
    if wanted is None:
        return _word(text) == _word(gold.text)
    return (_letter(text) or "").casefold() == wanted[1].casefold()


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


def _exact(claim: Claim) -> bool | None:
    """The same text, but for white space and wrapping (`$..$`, box, bold, full stop)."""
    gold = read_gold(claim.gold)
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
    if entry["answer"] == "" or (_NAN.search(text) and not _NAN.search(raw)):
        return text in ('""', "''")  # An empty gold answer; a number that is none is never right.
    if len(text) > max(MAX_TEXT // 4, 4 * len(raw)) or depth(text) > _SCORED_DEPTH:
        return False
    contents = boxes(text) if "\\boxed" in text else []
    if contents is None or len(contents) > 1:
        return False
    text = contents[0].strip() if contents else text
    gold = read_gold(raw)
    if gold and gold.value is not None:
        value = value_text(claim, gold)
        if value is None or number(value) is None:
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


COMPARISONS: dict[str, Callable[[Claim], bool | Job | list[Job] | None]] = {
    "math": _math,
    "arithmetic": _arithmetic,
    "numeric": _numeric,
    "choice": _choice,
    "exact": _exact,
    "reasoning_gym": _scored,
}
