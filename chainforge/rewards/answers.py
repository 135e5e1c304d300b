"""Read one answer out of an answer text, compare numbers exactly, refuse what is hostile.

Everything here is linear in the text and runs in the trainer's own process; anything that needs a
parser of mathematics is left to `chainforge.rewards.judges`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from math import comb

# Measured with math-verify 0.9: 50 nested parentheses, 30 nested fractions, 5,000 boxes, 100,000
# digits or a power that is 1,000 terms when multiplied out cost it seconds to minutes, so none of
# them reaches it.
MAX_TEXT = 20_000
MAX_ANSWER = 300
MAX_DEPTH = 12
MAX_DIGITS = 60
MAX_BOXES = 20
MAX_FRACTIONS = 12
MAX_TERMS = 1_000

_SYMBOLS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "\u00a0": " ",
        "\u2009": " ",
        "\u202f": " ",
        "≈": r"\approx ",
        "≠": r"\neq ",
        "≤": r"\leq ",
        "≥": r"\geq ",
        "％": "%",
        "×": r"\times ",
        "π": r"\pi ",
        "∞": r"\infty ",
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
    }
)
_WRAPS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_BOX = re.compile(r"\\boxed\s*\{")
_WHOLE_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BOLD = re.compile(r"(?:^|(?<=\s))\*\*([^*\n]+)\*\*")
_SAID = re.compile(r"\banswer\b(?:\s+is|\s*[:=])+\s*([^\n]*)", re.IGNORECASE)
_SPAN = re.compile(r"\$([^$]+)\$|\\\(((?:(?!\\\().)+?)\\\)")  # Stops where another one opens.
_DOUBT = re.compile(r"[\d%]|\b(?:or|not|nor|never|percent)\b", re.IGNORECASE)
_THIN = re.compile(r"(?<=\d)(?:\\[,!]|\{,\}|\{\\,\})\s*(?=\d{3})")
_SPACING = re.compile(r"\\(?:[,;:! ]|q?quad\b|displaystyle\b|left(?![a-z])|right(?![a-z]))|~")
_FRAC = re.compile(r"\\[dtc]frac")
_SHORT_FRAC = re.compile(r"\\frac\s*(\d)\s*(\d)(?!\d)")
_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)")
_NAMES = re.compile(r"(?<![\\A-Za-z])(pi|infty)(?![A-Za-z])")
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")
_DECIMAL = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_NUMBER = re.compile(rf"(?=[+-]?\.?\d){_DECIMAL}")
_RATIO = re.compile(
    rf"([+-]?)(?:\\frac\{{({_DECIMAL})\}}\{{({_DECIMAL})\}}|\(?({_DECIMAL})\)?/\(?({_DECIMAL})\)?)"
)
_TOWER = re.compile(
    r"(?:\^|\*\*)[\s{(]*(?:\\left)?[\s{(]*\d+[\s})]*(?:\^|\*\*|!)[\s{(]*(?=[\d!}]|$)"
)
_HUGE_POWER = re.compile(r"(?:\^|\*\*)[\s{(]*[-+]?\d{5}")
# A power within an exponent, also beside something: `9^{9 \cdot 9^{9}}`.
_POWER_IN_POWER = re.compile(r"\^\s*[{(][^{}()^]*\d\s*(?:\^|\*\*)[\s{(]*\d")
_HUGE_CHOICE = re.compile(r"binom\s*\{\s*\d{4}|\d{4}[\s}]*\\choose")
_FACTORIAL = re.compile(r"\d{4}[\s})]*!|![\s})]*!")
_POWER_OF_SUM = re.compile(r"\(([^()]*[A-Za-z][^()]*)\)\s*(?:\^|\*\*)[\s{(]*(\d+)")
_FURTHER_TERM = re.compile(r"(?<=[^\s+\-(])\s*[+\-]")


def clean(text: str) -> str:
    """Unwrap an answer (`$..$`, box, bold, text, full stop) and unify its spelling."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return text
    text = _BOLD.sub(r"\1", text.translate(_SYMBOLS)).strip()
    for _ in range(4):
        before = text
        text = text.rstrip(".;,。 \n\t") if len(text) > 1 else text
        for opening, closing in _WRAPS:
            inner = text[len(opening) : -len(closing)]
            if text.startswith(opening) and text.endswith(closing) and opening not in inner:
                text = inner.strip() or text
        content = boxes(text) if text.startswith("\\boxed") and text.endswith("}") else None
        if content and len(content) == 1:
            text = content[0].strip()
        elif whole := _WHOLE_TEXT.fullmatch(text):
            text = whole[1].strip()
        if text == before:
            break
    return _spell(text)


def _spell(text: str) -> str:
    """Unify LaTeX spellings that mean the same: spacing, fractions, thousands, currency."""
    if "\\" in text or "{" in text or "~" in text:
        text = _SPACING.sub(" ", _THIN.sub("", text))
        text = _SHORT_FRAC.sub(r"\\frac{\1}{\2}", _FRAC.sub(r"\\frac", text))
        text = text.replace(r"\%", "%").replace(r"\$", "")
    if "pi" in text or "sqrt" in text or "inf" in text:
        text = _NAMES.sub(r"\\\1", _ROOT.sub(r"\\sqrt{\1}", text))
    return " ".join(text.lstrip("$").split())


def squeeze(text: str) -> str:
    """Drop the spaces that mean nothing; keep those between letters or digits (`4 5` is two)."""
    return _LOOSE_SPACE.sub("", text)


def boxes(text: str) -> list[str] | None:
    """Return the contents of the outermost boxes; None when one is open or too many are."""
    found: list[str] = []
    position = 0
    while match := _BOX.search(text, position):
        depth = 1
        for brace in _BRACE.finditer(text, match.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                found.append(text[match.end() : brace.start()])
                position = brace.end()
                break
        if depth or len(found) > MAX_BOXES:
            return None
    return found


def candidate(text: str) -> str | None:
    """Return the one answer that an answer text gives; None when it gives none or several.

    In this order: the box, what follows "answer is", the only `$..$` among words, the whole text.
    Boxes (or "answer is") that disagree are several answers, and several are none: who names
    many has not answered.
    """
    if len(text) > MAX_TEXT:
        return None
    contents = boxes(text) if "\\boxed" in text else []
    if contents is None:
        return None
    if not contents and "nswer" in text.casefold():
        contents = [said for said in _SAID.findall(_BOLD.sub(r"\1", text)) if said.strip()]
    if not contents and ("$" in text or "\\(" in text) and not _wrapped(text.strip()):
        spans = [a or b for a, b in _SPAN.findall(text)]
        outside = _SPAN.sub(" ", text)
        if len(spans) == 1 and not _DOUBT.search(outside):
            contents = spans
    different = {squeeze(clean(content)) for content in contents} if contents else {clean(text)}
    if len(different) != 1 or not next(iter(different)):
        return None
    return clean(contents[0]) if contents else clean(text)


def _wrapped(text: str) -> bool:
    """Whether the whole text is one span of mathematics."""
    return bool(_SPAN.fullmatch(text.rstrip(". ")))


def hostile(text: str, gold: str = "") -> str | None:
    """Say why a candidate should not reach a parser, None when it may; a long gold allows more."""
    if len(text) > max(MAX_ANSWER, 2 * len(gold)):
        return "length"
    if sum(map(str.isdigit, text)) > max(MAX_DIGITS, 2 * sum(map(str.isdigit, gold))):
        return "digits"
    if text.count("\\frac") > max(MAX_FRACTIONS, gold.count("\\frac")):
        return "fractions"
    if depth(text) > MAX_DEPTH:
        return "nesting"
    if any(bomb.search(text) for bomb in (_TOWER, _HUGE_POWER, _FACTORIAL)) and text != gold:
        return "size"
    if any(bomb.search(text) and not bomb.search(gold) for bomb in (_POWER_IN_POWER, _HUGE_CHOICE)):
        return "size"
    if (terms := _terms(text)) > MAX_TERMS and terms > _terms(gold):
        return "size"
    return None


def _terms(text: str) -> int:
    """Return how many terms the longest power of a sum has when it is multiplied out."""
    powers = ((1 + len(_FURTHER_TERM.findall(inside)), int(exponent))
              for inside, exponent in _POWER_OF_SUM.findall(text))  # fmt: skip
    return max((comb(power + terms - 1, power) for terms, power in powers), default=1)


def depth(text: str) -> int:
    """Return how deep brackets of any kind are nested."""
    level = deepest = 0
    for character in text:
        if character in "([{":
            level += 1
            deepest = max(deepest, level)
        elif character in ")]}":
            level -= 1
    return deepest


def balanced(text: str) -> bool:
    """Whether each brace of a LaTeX text is closed, in order."""
    level = 0
    for brace in _BRACE.findall(text):
        level += {"{": 1, "}": -1}.get(brace, 0)
        if level < 0:
            return False
    return level == 0


def ratio(text: str) -> tuple[Fraction, Fraction] | None:
    """Return numerator and denominator as in `a/b` or a LaTeX fraction; None for others."""
    match = _RATIO.fullmatch(squeeze(text))
    if match is None:
        return None
    sign, *parts = match.groups()
    written = [part for part in parts if part]
    if len(written) != 2 or any(not _NUMBER.fullmatch(part) for part in written):
        return None
    top, bottom = (Fraction(part.replace(",", "")) for part in written)
    if bottom == 0:
        return None
    top = -top if sign == "-" else top
    return (-top, -bottom) if bottom < 0 else (top, bottom)


@lru_cache(maxsize=65_536)
def number(text: str) -> Fraction | None:
    """Return the value of a written-out number (`-3`, `1,234`, `0.5`, `1/2`), None for others."""
    squeezed = squeeze(text)
    if squeezed.startswith("(") and squeezed.endswith(")"):
        squeezed = squeezed[1:-1]
    if len(squeezed) > MAX_ANSWER or re.search(r",\s", text):
        return None  # `574, 575` are two numbers, `574,575` is one.
    if _NUMBER.fullmatch(squeezed):
        return Fraction(squeezed.replace(",", ""))
    parts = ratio(squeezed)
    return parts[0] / parts[1] if parts else None


_SCIENTIFIC = re.compile(
    r"([+-]?[\d.,]+)\s*(?:e|E|\\times\s*10\s*\^|\\cdot\s*10\s*\^|\*\s*10\s*(?:\^|\*\*))"
    r"\s*\{?\s*([+-]?\d{1,3})\s*\}?"
)


def decimal(text: str) -> Fraction | None:
    """Return a number's value, also of `1e3` and 1.5 times a power of ten."""
    value = number(text)
    if value is None and (match := _SCIENTIFIC.fullmatch(text)):
        mantissa = number(match[1])
        value = mantissa * Fraction(10) ** int(match[2]) if mantissa is not None else None
    return value
