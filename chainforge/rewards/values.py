r"""Read an answer into the kind of thing it is: numbers, units, and what is made of them.

A value is a scalar with a unit, a list, a set, a tuple or an interval, a region (inequalities,
unions of intervals), a matrix, or another relation. Scalars that are sums of products are worked
out exactly.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Context, Decimal, DivisionByZero, InvalidOperation, Overflow, localcontext
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from string import ascii_letters
from typing import Any, NamedTuple

MAX_ANSWER = 300  # characters, of an answer that a parser may see
MAX_DEPTH = 12  # of nested brackets

_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_NUMBER = re.compile(rf"(?=[+-]?\.?\d)[+-]?{_DECIMAL}")
_RATIO = re.compile(
    rf"([+-]?)(?:\\frac\{{([+-]?{_DECIMAL})\}}\{{([+-]?{_DECIMAL})\}}"
    rf"|\(?([+-]?{_DECIMAL})\)?/\(?([+-]?{_DECIMAL})\)?)"
)
_MIXED = re.compile(r"([+-]?)(\d+)(?:\s*\\frac\{(\d+)\}\{(\d+)\}|\s(\d+)/(\d+))")
_SCIENTIFIC = re.compile(
    rf"([+-]?{_DECIMAL})(?:[eE]|(?:\\times|\\cdot|\*)\s*10\s*\^)\s*\{{?\s*([+-]?\d{{1,3}})\s*\}}?"
)
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(rf"([+-]?{_DECIMAL})\s*(?:\\text\{{\s*)?({'|'.join(_SCALES)})\s*\}}?")


def squeeze(text: str) -> str:
    """Drop meaningless spaces; keep those between letters or digits (`4 5` is two)."""
    return _LOOSE_SPACE.sub("", text)


class Number(NamedTuple):
    """A value, and how much the last written decimal place is worth: 0 for an exact one."""

    value: Fraction
    place: Fraction = Fraction(0)

    def equals(self, other: Number) -> bool:
        """Return whether both are one number: exactly, or one is the other cut after six digits."""
        off, place = abs(self.value - other.value), max(self.place, other.place)
        if self.place and other.place:
            place /= 2
        return off == 0 or (off <= abs(other.value) / 10**6 and off < place)

    def rounds(self, value: Fraction) -> bool:
        """Return whether this is a value rounded to as many places, or cut after two or more."""
        off, place = abs(self.value - value), float(self.place)
        return off <= 0.51 * place or (off < place <= 0.011)


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


def number(text: str) -> Fraction | None:
    """Return the value of a written-out number, None for others; see `read_number`."""
    read = read_number(text)
    return read.value if read else None


@lru_cache(maxsize=65_536)
def read_number(text: str) -> Number | None:
    r"""Read `-3`, `1,234`, `0.5`, `1/2`, `2\frac12`, `1.5e3`, `0.\overline{7}`, `1.5 million`."""
    if len(text) > MAX_ANSWER or re.search(r",\s", text):
        return None  # `574, 575` are two numbers, `574,575` is one.
    squeezed = re.sub(r"\A([+-]?)[¤€£¥]", r"\1", squeeze(text))
    if squeezed.startswith("(") and squeezed.endswith(")"):
        squeezed = squeezed[1:-1]
    if _NUMBER.fullmatch(squeezed):
        return _decimal(squeezed)
    if parts := ratio(squeezed):
        return Number(parts[0] / parts[1])
    if found := _MIXED.fullmatch(squeezed):
        sign, whole, *fraction = (part for part in found.groups() if part is not None)
        top, bottom = map(int, fraction)
        if not 0 < top < bottom:
            return None
        mixed = int(whole) + Fraction(top, bottom)
        return Number(-mixed if sign == "-" else mixed)
    if found := _SCIENTIFIC.fullmatch(squeezed):
        return _scaled(found[1], int(found[2]))
    if found := _SCALED.fullmatch(squeezed):
        return _scaled(found[1], _SCALES[found[2]])
    if found := _REPEATING.fullmatch(squeezed):
        sign, whole, fixed, period = found.groups()
        tail = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
        repeated = Fraction(f"{whole or 0}.{fixed or 0}") + tail
        return Number(-repeated if sign == "-" else repeated)
    return None


def _decimal(text: str) -> Number:
    digits = len(text.partition(".")[2])
    place = Fraction(1, 10**digits) if digits else Fraction(0)
    return Number(Fraction(text.replace(",", "")), place)


def _scaled(mantissa: str, exponent: int) -> Number | None:
    if not _NUMBER.fullmatch(mantissa):
        return None
    value, place = _decimal(mantissa)
    return Number(value * Fraction(10) ** exponent, place * Fraction(10) ** exponent)


def _read_units() -> dict[str, str]:
    """Return the units of `units.txt`: each name with the first name of the same unit."""
    units: dict[str, str] = {}
    for line in Path(__file__).with_name("units.txt").read_text(encoding="utf-8").splitlines():
        first, *others = line.split()
        if first == "+":
            units |= {name: name for name in others}
        elif first != "#":
            units |= dict.fromkeys((first, *others), first)
    return units


_UNITS = _read_units()
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3", "squared": "2", "cubed": "3"}
_SHAPES = frozenset({"old", "tall", "long", "wide", "high", "deep", "away", "apart"})
_CURRENCY = re.compile(
    r"([+-]?)\s*([¤€£¥₹]|(?:US|USD|EUR|GBP)(?=[\s¤]))\s*¤?\s*([+-]?)(?=[\s\d.\\(])"
)
_ATTACHED = re.compile(r"(?<=[\d)}])(?=[A-Za-z]{2,}(?:[\s^]|\Z)|[¤€£¥₹¢\u3040-\u9fff])")
_TEXT = re.compile(r"\\text\s*\{\s*([^{}\\]*?)\s*\}")
_ORDINAL = re.compile(
    r"(?<=\d)(?:\s*\^\s*\{?)?\s*(?:\\text\s*\{\s*)?(?<!\s)(?:st|nd|rd|th)\s*\}{0,2}\Z"
)
_SCALE = re.compile(r"\bdegrees?\s+(?=(?:[CF]|celsius|fahrenheit)\b)", re.IGNORECASE)
_DEGREES = re.compile(r"°\s*(?:\\text\s*\{\s*)?([CF])\s*\}?\Z")
_PART = re.compile(r"([^\W\d_]+|[¤€£¥₹¢°]C?F?)\.?(?:\^\{?(-?\d)\}?)?")


def split_unit(text: str, known: bool = True) -> tuple[str, str | None]:
    """Split a quantity into the text of its value and its unit; None where there is no unit.

    With `known` only a unit on the list is one; else any words behind a number are.
    """
    text = _ORDINAL.sub("", text)
    spaced, unit = _DEGREES.sub(r"°\1", text.replace("^{\\circ}", " ° ")), None
    if money := _CURRENCY.match(spaced):
        spaced, unit = money[1] + money[3] + spaced[money.end() :].strip(), _canonical(money[2])
    marked = "\\text" in spaced
    spaced = re.sub(r"\s+\^", "^", _TEXT.sub(r" \1 ", spaced)).replace("/", " / ")
    tokens = _SCALE.sub("", _ATTACHED.sub(" ", spaced)).split()
    for start in range(1, len(tokens)):
        value = " ".join(tokens[:start])
        found = _phrase(tokens[start:], unit)
        if unit and _phrase(tokens[start:], None) == unit:
            found = unit  # `$20 dollars`
        sure = marked or len(tokens[start]) > 1 or read_number(value) is not None
        if found and (sure or not _LETTER.search(value)):
            value = value.replace(" / ", "/")
            return (text, None) if _FUNCTION.search(value) and found == "degree" else (value, found)
    if unit:
        return " ".join(tokens).replace(" / ", "/"), unit
    if not known and (words := _WORDS.fullmatch(_TEXT.sub(r" \1 ", text))):
        return words[1].strip(), words[2].strip().casefold()
    return text, None


_LETTER = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_WORDS = re.compile(r"(.*?\d[\s)}]*)([A-Za-z][A-Za-z .]+)")


def _phrase(tokens: list[str], unit: str | None) -> str | None:
    """Return the unit that words name, `cm^2` for `square centimeters`; None for other words."""
    parts, power = [unit] if unit else [], None
    wanted = not unit
    if wanted and tokens[0] == "per":
        parts, wanted = ["1"], False
    while tokens and tokens[-1] in _SHAPES:
        tokens = tokens[:-1]
    for token in tokens[1:] if tokens[0] == "US" and tokens[1:] else tokens:
        if token in ("/", "per", "a", "an", "each") and parts and not wanted:
            wanted = True
        elif token.rstrip(".") in _POWERS and wanted:
            power = _POWERS[token.rstrip(".")]
        elif token in ("squared", "cubed") and parts and not wanted and "^" not in parts[-1]:
            parts[-1] += "^" + _POWERS[token]
        elif wanted and (found := _PART.fullmatch(token)) and (name := _canonical(found[1])):
            raised = found[2] or power
            parts.append(name + (f"^{raised}" if raised and raised != "1" else ""))
            wanted, power = False, None
        else:
            return None
    return None if wanted or power or not parts else "/".join(parts)


def _canonical(word: str) -> str | None:
    for name in (word, word.casefold() if len(word) > 2 else word):
        for singular in (name, name.removesuffix("s"), name.removesuffix("es"),
                         re.sub("ies$", "y", name)):  # fmt: skip
            if singular in _UNITS and (singular == name or len(singular) > 2):
                return _UNITS[singular]
    return None


Operators = Mapping[type[ast.operator], Callable[[Any, Any], Any]]
FOUR: Operators = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def work_out(
    node: ast.expr,
    number: Callable[[Any], Any],
    operators: Operators,
    names: Mapping[str, Any] | None = None,
    functions: Mapping[str, Any] | None = None,
) -> Any:
    """Work out a tree of numbers, these operators and names, and functions of one argument.

    Raises `ValueError` for anything else; `number` does so for a constant that is none.
    """

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=constant):
                return number(constant)
            case ast.Name(id=name) if name in (names or {}):
                return (names or {})[name]
            case ast.Call(func=ast.Name(id=name), args=[inside], keywords=[]) if name in (
                functions or {}
            ):
                return (functions or {})[name](value(inside))
            case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
                return value(operand) * (-1 if isinstance(sign, ast.USub) else 1)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in operators:
                return operators[type(op)](value(left), value(right))
        raise ValueError(f"not arithmetic: {type(node).__name__}")

    return value(node)


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


# A sum of products in Python's spelling: φ(a/b) for a fraction, ρ(a) for a square root, `@`
# for a product without a sign. `e` and `i` may be numbers or letters, `d` a differential.
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}(?!\s*\^)")  # `\frac12^2` is unclear
_SQUARE_ROOT = re.compile(r"\\sqrt\s*\{([^{}]*)\}")
_POWER = re.compile(r"\s*\^\s*(?:(\d)|\{\s*(-?\s*\d+)\s*\})(?!\s*\^)")
_SUM = re.compile(r"[0-9abcf-hj-zA-DF-Zφρπ+*/()\s-]+")
_UNCLEAR = (
    re.compile(  # `2 3`, `x2`, a mixed number, what may be a function, `f(x)`; signs in a row
        r"[\w)]\s+\d|[^\W\d]\d|\)\d|\d\s*φ|(?<![φρπ])(?<=[^\W\d])\s*\(|\*\*\(?-?\d+\)?\s*\("
        r"|[-+*/]\s*[-+]|\*\s*\*\s*\*"
    )
)
_SIDE_BY_SIDE = re.compile(r"(?<![φρ])(?<=[\w)])\s*(?=[^\W\d]|\()")
_DIGITS, _MOST_POWER = 400, 400
_EXACT = Context(prec=_DIGITS, traps=[InvalidOperation, DivisionByZero, Overflow])
_LETTERS = {
    letter: Decimal(random.Random(letter).randrange(10**_DIGITS)).scaleb(1 - _DIGITS)
    for letter in ascii_letters
} | {"π": Decimal("3.14159265358979323846264338327950288419716939937510582097494")}


def _power(base: Decimal, exponent: Decimal) -> Decimal:
    if abs(exponent) > _MOST_POWER:
        raise ValueError("too large a power")
    return base**exponent


_OPERATORS: Operators = {**FOUR, ast.MatMult: operator.mul, ast.Pow: _power}
_CALLS: dict[str, Callable[[Decimal], Decimal]] = {"φ": Decimal, "ρ": Decimal.sqrt}


@lru_cache(maxsize=65_536)
def evaluate(text: str) -> Decimal | None:
    """Return the value of a sum of products, with an arbitrary number for each letter.

    To so many digits that two sums are equal when their values are. None where the text is no such
    sum, or is unclear.
    """
    squeezed = squeeze(text)
    if squeezed in _ENDLESS:
        return Decimal(f"{_ENDLESS[squeezed]}Infinity")
    if len(text) > MAX_ANSWER or depth(text) > MAX_DEPTH or _WORD.search(text):
        return None
    if (number := read_number(text)) and not number.place:
        return _EXACT.divide(Decimal(number.value.numerator), Decimal(number.value.denominator))
    try:
        with localcontext(_EXACT):
            value: Decimal = work_out(_parsed(text), Decimal, _OPERATORS, _LETTERS, _CALLS)
            return value if value.is_finite() else None
    except (ValueError, SyntaxError, ArithmeticError):
        return None


def _parsed(text: str) -> ast.expr:
    """Parse a sum of products; raise `ValueError` where it is none or could be read in two ways."""
    if "**" in text or not text.isascii():
        raise ValueError("not LaTeX")
    for _ in range(MAX_DEPTH):
        text = _POWER.sub(lambda m: f"**({m[1] or m[2]})", text)
        text = _SQUARE_ROOT.sub(r"ρ(\1)", _FRACTION.sub(r"φ((\1)/(\2))", text))
    text = re.sub(r"\\(?:cdot|times)(?![A-Za-z])", "*", text)
    text = re.sub(r"\\pi(?![A-Za-z])", "π", text)
    if not _SUM.fullmatch(text) or _UNCLEAR.search(text):
        raise ValueError("not a sum of products")
    tree = ast.parse(_SIDE_BY_SIDE.sub("@", text).strip(), mode="eval").body
    for node in ast.walk(tree):
        match node:
            case ast.BinOp(op=ast.MatMult(), left=ast.BinOp(op=ast.Div())):
                raise ValueError("a/bc")
            case ast.Call(func=ast.Name(id="ρ"), args=[inside]):
                if any(isinstance(n, ast.Name) and n.id.isascii() for n in ast.walk(inside)):
                    raise ValueError("the root of a letter may be of either sign")
    return tree


def same_value(one: Decimal, other: Decimal) -> bool | None:
    """Return whether two sums are equal; None where both are too small to tell."""
    if one == other or not (one.is_finite() and other.is_finite()):
        return one == other
    largest = max(abs(one), abs(other))
    if _EXACT.subtract(one, other).copy_abs() <= largest.scaleb(50 - _DIGITS):
        return True
    return None if largest < Decimal("1e-200") else False


@dataclass(frozen=True)
class Value:
    """What a text says: its kind, its parts, and for a scalar what is known of it."""

    kind: str  # scalar, list, set, region, matrix, relation, named, empty, or the two brackets
    text: str
    parts: tuple[Any, ...] = ()
    name: str = ""  # what stood left of `=`
    number: Number | None = None
    unit: str | None = None
    percent: bool = False
    about: Value | None = None  # the decimal behind `\approx`
    raw: str = ""  # all of it, with name and unit


_SYMBOL = re.compile(
    r"(?:\\?[A-Za-z]|\\[a-z]+|\\(?:vec|mathbf|hat|bar|overline)\s*\{?\s*[A-Za-z]+\s*\}?|[A-Z]{1,4})'*"
    r"(?:_\s*(?:\{[^{}]{1,12}\}|\w))?'*(?:\^\s*\{?-1\}?)?(?:\([^()=<>]{1,20}\))?"
)
_NAMES = re.compile(
    r"\((?:\s*\\?[a-zA-Z]+\s*,)+\s*\\?[a-zA-Z]+\s*\)|\|(?-i:[A-Z]+|[zw])\||m?\s*\\angle\s*\{?\s*[A-Z]+\s*\}?"
    r"|(?:\\text\s*\{)?\s*(?:the\s+)?(?:total |surface |final )?(?:area|volume|perimeter|sum|total"
    r"|result|value|answer|cost|price|distance|time|speed|length|width|height|probability|average"
    r"|mean|median|mode|number|radius|circumference|product|difference|ratio|remainder|age|profit"
    r"|solution|solutions|ans)\s*\}?",
    re.IGNORECASE,
)
_FUNCTIONS = re.compile(r"\\(?:sin|cos|tan|log|ln|pi|infty|emptyset|sqrt|frac|text|pm|mp)\Z")
JOINED = re.compile(
    r"\s*\\text\s*\{\s*,?\s*(and|or)\s*,?\s*\}\s*|\s*,?\s+(and|or)\s+|\s*\\(lor|land)(?![a-z])\s*",
    re.IGNORECASE,
)
_EITHER = re.compile(r"\bor\b|\\lor", re.IGNORECASE)
_RELATED = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|\\neq(?![a-z])|<|>")
FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\neq": "\\neq"}
_EQUALS = re.compile(r"(?<![\\<>!=:])(=)(?![=>])|\\(approx)(?![a-z])")
_BUILDER = re.compile(
    r"\\\{\s*([A-Za-z])(?:\s*\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\||:|\\mid)(.+)\\\}"
)
_MEMBER = re.compile(r"\s*([A-Za-z](?:_\{?\w\}?)?)\s*\\in(?![a-z])(.+)", re.DOTALL)
_MATRIX = re.compile(
    r"[\[(]?\s*\\begin\s*\{([pbBvV]?|small)(?:matrix|(array))\}\s*(?:\{[clr|]*\})?(.*?)"
    r"\\end\s*\{[a-zA-Z]*\}\s*[\])]?",
    re.DOTALL,
)
_ROW = re.compile(r"\\\\(?:\[[^\]]*\])?")
_WHOLE_LINE = re.compile(r"\\mathbb\s*\{?R\}?|\\R(?![a-z])|all real numbers", re.IGNORECASE)
_THOUSANDS = re.compile(r"\d{3}(?!\d)")
_GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
SIGNED = re.compile(r"\\(?:pm|mp)(?![a-z])")
_PERCENT = re.compile(
    r"\s*(?:%|\\text\s*\{\s*(?:percent|per cent|pct)\s*\}|\b(?:percent|per cent|pct))\Z"
)
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{3,}")  # `log`, `abc`: a name or a product
_ENDLESS = {"\\infty": "+", "+\\infty": "+", "-\\infty": "-"}


@lru_cache(maxsize=16_384)
def read(text: str, gold: bool = False) -> Value:
    """Read a text spelled by `clean`; a gold answer may have a unit that no list knows."""
    text = text.strip()
    if len(text) > 8 * MAX_ANSWER or depth(text) > 2 * MAX_DEPTH:
        return Value("relation", text, raw=text)
    return replace(_read(text, gold), raw=text)


def _read(text: str, gold: bool) -> Value:
    if squeeze(text) in ("\\emptyset", "\\{\\}", "{}", "\\text{no solution}"):
        return Value("empty", text)
    if "\\begin" in text or "\\\\" in text:
        return _matrix(text) or Value("relation", text)
    if _RELATED.search(text) or "\\cup" in text or _WHOLE_LINE.fullmatch(text):
        return _region(text) or Value("relation", text)
    if (member := _MEMBER.fullmatch(text)) and not text.startswith("("):
        inside = _read(member[2].strip(), gold)
        return replace(inside, name=member[1]) if inside.parts else Value("relation", text)
    items = [item.strip() for item in _split(JOINED.sub(" , ", text))]
    return _listed(text, items, gold) if len(items) > 1 and all(items) else _single(text, gold)


def _listed(text: str, items: list[str], gold: bool) -> Value:
    """Read several values: of one thing (`x=2, x=3`), or of several (`x=2, y=3`)."""
    values = [_read(item, gold) for item in items]
    names = [re.sub(r"_.*", "", value.name) for value in values]
    if all(names) and len(set(names)) == len(values) and not _EITHER.search(text):
        pairs = sorted(zip(names, values, strict=True), key=lambda pair: pair[0])
        return Value("named", text, tuple(pairs))
    if len(set(names) - {""}) > 1 or (names[0] == "" and any(names)):
        return Value("relation", text)
    return Value("list", text, tuple(_flat(values)), name=names[0])


def _flat(values: Sequence[Value]) -> list[Value]:
    return [one for v in values for one in (v.parts if v.kind == "list" else (v,))]


def _single(text: str, gold: bool) -> Value:
    """Read one value: behind `x =`, between brackets, with `±`, or a scalar."""
    pieces = _EQUALS.split(text)
    if len(pieces) > 1:
        return _chain([piece.strip() for piece in pieces[::3]], text, gold)
    bracketed = _bracketed(text, gold)
    if bracketed:
        return bracketed
    if SIGNED.search(text):
        ways = ({"\\pm": "+", "\\mp": "-"}, {"\\pm": "-", "\\mp": "+"})
        signs = [SIGNED.sub(lambda m, way=way: way[m[0]], text) for way in ways]  # type: ignore[misc]
        two = [_scalar(re.sub(r"(\A|[{(=])\s*\+\s*", r"\1", sign), gold) for sign in signs]
        return Value("list", text, tuple(two))
    return _scalar(text, gold)


def _bracketed(text: str, gold: bool) -> Value | None:
    for opening, closing, kind in (("\\{", "\\}", "set"), ("{", "}", "set"),
                                   ("\\langle", "\\rangle", "()")):  # fmt: skip
        if text.startswith(opening) and text.endswith(closing):
            items = _split(text[len(opening) : -len(closing)])
            if items != [text[len(opening) : -len(closing)]] or opening == "\\{":
                return Value(kind, text, tuple(_read(item.strip(), gold) for item in items))
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        items = _split(text[1:-1])
        if len(items) > 1 and all(item.strip() for item in items):
            parts = tuple(_read(item.strip(), gold) for item in items)
            return Value(text[0] + text[-1], text, parts)
    return None


def _split(text: str) -> list[str]:
    """Split at the commas that no bracket encloses; `1,234` is one number outside brackets."""
    parts, level, start = [], 0, 0
    for place, character in enumerate(text):
        level += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if level < 0:
            return [text]
        if character in ",;" and level == 0:
            if _THOUSANDS.match(text, place + 1) and text[max(0, place - 1)].isdigit():
                group = re.search(r"(?<![\d,.])\d{1,3}(?:,\d{3})*\Z", text[start:place])
                if group and character == ",":
                    continue
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def _chain(sides: list[str], text: str, gold: bool) -> Value:
    r"""Read `x = 5`, `V = \pi r^2 h = 48\pi` and `\sqrt2 \approx 1.414`; others are relations."""
    name = ""
    if not sides[0]:
        sides = sides[1:]
    elif is_symbol(sides[0]) or _NAMES.fullmatch(sides[0]):
        name, sides = squeeze(sides[0]), sides[1:]
        letters = name.strip("()").split(",")
        if "," in name and letters != sorted(letters) and max(map(len, letters)) == 1:
            return Value("relation", text)  # `(y,x) = (2,3)`
    elif len(sides) == 2 and is_symbol(sides[1]) and not gold and "\\approx" not in text:
        name, sides = squeeze(sides[1]), sides[:1]
    sides = [side for place, side in enumerate(sides) if not (
        place < len(sides) - 1 and name and is_formula(side))]  # fmt: skip
    if not sides or not all(sides):
        return Value("relation", text)
    if len(sides) == 1:
        return replace(_read(sides[0], gold), name=name)
    last, unit = split_unit(sides[-1])
    sides = [*sides[:-1], last]
    exact = [side for side in sides if not _place(side)]
    decimals = [side for side in sides if side not in exact]
    values = [evaluate(side) for side in exact]
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values) or not all(same_value(known[0], v) for v in known):
        return Value("relation", text)
    rational = not re.search(r"[A-Za-z]", exact[-1].replace("\\frac", ""))
    numbers = [read_number(side) for side in sides] if rational and "\\approx" not in text else []
    if any(one and other and one.value != other.value for one, other in pairwise(numbers)):
        return Value("relation", text)
    if decimals and (is_formula(exact[0]) or not known[0].is_finite()):
        return Value("relation", text)
    for decimal in map(read_number, decimals):
        if decimal is None or not decimal.rounds(Fraction(known[0])):
            return Value("relation", text)
    # Without a symbol before it, `2+2=4` says the question, not a value.
    if not name and rational and not all(map(read_number, sides)):
        return Value("relation", text)
    about = _scalar(decimals[-1], gold) if decimals else None
    return replace(_scalar(exact[-1], gold), name=name, about=about, unit=unit)


def _place(text: str) -> Fraction:
    number = read_number(text)
    return number.place if number else Fraction(0)


def is_symbol(text: str) -> bool:
    """Return whether a text is a bare symbol, `x`, `x_1`, `f(x)`: the left side of a value."""
    return bool(_SYMBOL.fullmatch(text)) and not _FUNCTIONS.match(text)


def is_formula(text: str) -> bool:
    """Return whether a text has letters, so that no value can contradict it."""
    return bool(re.search(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", text))


def _scalar(text: str, gold: bool) -> Value:
    """Read a scalar: its percent sign, its unit, its value where it is a number."""
    text = _brace_free(text)
    bare, percent = text, False
    if found := _PERCENT.search(text):
        bare, percent = text[: found.start()].strip(), True
    unit = None
    if not percent and (read_number(text) is None or text[:1] in "¤€£¥+-"):
        bare, unit = split_unit(text, known=not gold)
        if _PERCENT.search(bare):
            return Value("scalar", text)
    bare = _brace_free(bare)
    number = read_number(bare)
    if number is None:
        bare = _GROUPED.sub("", bare)
    return Value("scalar", bare, number=number, unit=unit, percent=percent)


def _brace_free(text: str) -> str:
    while text.startswith("{") and text.endswith("}") and "{" not in text[1:]:
        text = text[1:-1].strip()
    return text


def _matrix(text: str) -> Value | None:
    """Read the rows of a matrix, also without the environment; a determinant is none."""
    found = _MATRIX.fullmatch(text)
    if found is None and "=" in text:
        left, _, right = text.partition("=")
        return _matrix(right.strip()) if is_symbol(left.strip()) else None
    if found is None and ("\\begin" in text or re.search(r"[=<>]", text)):
        return None
    inside = found[3] if found else text
    rows = [row for row in _ROW.split(inside) if row.strip()]
    if not rows or (found and found[1] in ("v", "V")) or (found is None and len(rows) < 2):
        return None
    cells = tuple(tuple(_read(cell.strip(), False) for cell in row.split("&")) for row in rows)
    if any(cell.name for row in cells for cell in row):
        return None
    return Value("matrix", text, cells)


def _region(text: str) -> Value | None:
    """Read inequalities of one symbol, and unions of intervals."""
    if found := _BUILDER.fullmatch(text):
        region = _region(found[2].strip())
        return region if region and region.name in ("", found[1]) else None
    name = ""
    if member := _MEMBER.fullmatch(text):
        name, text = member[1], member[2].strip()
    pieces: list[Any] = []
    for part in re.split(r"\\cup(?![a-z])|\\lor(?![a-z])|\\text\s*\{\s*,?\s*or\s*\}|\bor\b", text):
        found_piece = _piece(part.strip().strip(",").strip())
        if found_piece is None or (name and found_piece[0] and found_piece[0] != name):
            return None
        name = name or found_piece[0]
        pieces += found_piece[1]
    return Value("region", text, tuple(pieces), name=name)


End = tuple[Value, bool]
"""The end of an interval, and whether it belongs to it."""


def _piece(text: str) -> tuple[str, list[tuple[End, End]]] | None:
    """Read one interval or chain of inequalities, or two that hold together."""
    if _WHOLE_LINE.fullmatch(text):
        return "", [((LOW, False), (_HIGH, False))]
    if not _RELATED.search(text):
        value = _bracketed(text, False)
        if value is None:
            return None
        if value.kind == "set" and all(part.kind == "scalar" for part in value.parts):
            return "", [((part, True), (part, True)) for part in value.parts]
        interval = as_region(value)
        return ("", list(interval.parts)) if interval else None
    both = re.split(r"\\text\s*\{\s*and\s*\}|\band\b|\\land|,", text)
    if len(both) == 2:
        one, two = (_piece(part.strip()) for part in both)
        if one and two and one[0] == two[0] and len(one[1]) == len(two[1]) == 1:
            for [(low, high)], [(other_low, other_high)] in ((one[1], two[1]), (two[1], one[1])):
                if high[0] is _HIGH and other_low[0] is LOW:
                    return one[0], [(low, other_high)]
        return None
    return _inequality(text)


def _inequality(text: str) -> tuple[str, list[tuple[End, End]]] | None:
    signs = _RELATED.findall(text)
    sides = [side.strip() for side in _RELATED.split(text)]
    places = [place for place, side in enumerate(sides) if is_symbol(side)]
    if len(places) != 1 or len(sides) > 3 or not all(sides) or "=" in text:
        return None
    [place] = places
    name = squeeze(sides[place])
    ends = [_scalar(side, False) for side in sides]
    if signs == ["\\neq"]:
        other = ends[1 - place]
        return name, [((LOW, False), (other, False)), ((other, False), (_HIGH, False))]
    if len(sides) == 2:
        sign = signs[0] if place == 0 else FLIPPED[signs[0]]
        if sign in ("<", "\\le"):
            return name, [((LOW, False), (ends[1 - place], sign == "\\le"))]
        return name, [((ends[1 - place], sign == "\\ge"), (_HIGH, False))]
    upward = all(sign in ("<", "\\le") for sign in signs)
    if place != 1 or not (upward or all(sign in (">", "\\ge") for sign in signs)):
        return None
    first, last = (ends[0], signs[0] in ("\\le", "\\ge")), (ends[2], signs[1] in ("\\le", "\\ge"))
    return name, [(first, last) if upward else (last, first)]


LOW, _HIGH = (Value("scalar", text) for text in ("-\\infty", "\\infty"))


def as_region(value: Value) -> Value | None:
    """Read `(a,b)` as an interval."""
    if len(value.kind) != 2 or len(value.parts) != 2:
        return value if value.kind == "region" else None
    low, high = value.parts
    if low.kind != "scalar" or high.kind != "scalar":
        return None
    low = LOW if squeeze(low.text) == "-\\infty" else low
    high = _HIGH if _ENDLESS.get(squeeze(high.text)) == "+" else high
    ends = ((low, value.kind[0] == "["), (high, value.kind[1] == "]"))
    return Value("region", value.text, (ends,), name=value.name)
