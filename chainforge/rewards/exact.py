r"""Read an answer into the kind of thing it is, and compare two of them.

An answer is a scalar with a unit, a list, a set, a tuple or an interval, a region (inequalities,
unions of intervals), a matrix, or another relation. The structure is compared here, and so are
scalars that exact arithmetic can decide; what is left of it comes back as pairs for math-verify.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

from chainforge.rewards.answers import MAX_DEPTH, depth
from chainforge.rewards.quantities import MAX_ANSWER, Number, read_number, split_unit, squeeze
from chainforge.rewards.sums import Sum, Unclear, approximate, rational, read_sum

Pairs = list[tuple[str, str]]
"""Scalars of an answer and a gold answer that a parser of mathematics must find equal."""


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
_JOINED = re.compile(
    r"\s*\\text\s*\{\s*,?\s*(and|or)\s*,?\s*\}\s*|\s*,?\s+(and|or)\s+|\s*\\(lor|land)(?![a-z])\s*",
    re.IGNORECASE,
)
_EITHER = re.compile(r"\bor\b|\\lor", re.IGNORECASE)
_RELATED = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|\\neq(?![a-z])|<|>")
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\neq": "\\neq"}
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
_SIGNED = re.compile(r"\\(?:pm|mp)(?![a-z])")
_PERCENT = re.compile(
    r"\s*(?:%|\\text\s*\{\s*(?:percent|per cent|pct)\s*\}|\b(?:percent|per cent|pct))\Z"
)
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{3,}")  # `log`, `abc`: a name or a product
_BASED = re.compile(r"\s*([\dA-F]+)\s*_\s*\{?(\d+)\}?\s*")
_ENDLESS = {"\\infty": "+", "+\\infty": "+", "-\\infty": "-"}
_PLAIN = re.compile(
    r"(?:\\frac|\\sqrt(?:\s*\[\d+\])?|(?<![\d})])-(?!-)|[\d.{}^()\s]|/(?!.*/)|(?<=\{)-)+"
)
_PRODUCT = re.compile(r"[\d})]\s*\(|\)\s*\d")


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
    items = [item.strip() for item in _split(_JOINED.sub(" , ", text))]
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
    if _SIGNED.search(text):
        ways = ({"\\pm": "+", "\\mp": "-"}, {"\\pm": "-", "\\mp": "+"})
        signs = [_SIGNED.sub(lambda m, way=way: way[m[0]], text) for way in ways]  # type: ignore[misc]
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
    forms = [form(side) for side in exact]
    if not exact or None in forms or any(one != forms[0] for one in forms[1:]):
        return Value("relation", text)
    equal = rational(forms[0] or {}) and "\\approx" not in text
    numbers = [read_number(side) for side in sides] if equal else []
    if any(one and other and one.value != other.value for one, other in pairwise(numbers)):
        return Value("relation", text)
    near = approximate(forms[0] or {})
    for decimal in map(read_number, decimals):
        if near is None or decimal is None or not decimal.rounds(near):
            return Value("relation", text)
    # Without a symbol before it, `2+2=4` says the question, not a value.
    if not name and rational(forms[0] or {}) and not all(map(read_number, sides)):
        return Value("relation", text)
    about = _scalar(decimals[-1], gold) if decimals else None
    return replace(_scalar(exact[-1], gold), name=name, about=about, unit=unit)


def _place(text: str) -> Fraction:
    number = read_number(text)
    return number.place if number else Fraction(0)


def is_symbol(text: str) -> bool:
    """Whether a text is a bare symbol, `x`, `x_1`, `f(x)`: what may stand left of a value."""
    return bool(_SYMBOL.fullmatch(text)) and not _FUNCTIONS.match(text)


def is_formula(text: str) -> bool:
    """Whether a text has letters, so that no value can contradict it."""
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
        return "", [((_LOW, False), (_HIGH, False))]
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
                if high[0] is _HIGH and other_low[0] is _LOW:
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
        return name, [((_LOW, False), (other, False)), ((other, False), (_HIGH, False))]
    if len(sides) == 2:
        sign = signs[0] if place == 0 else _FLIPPED[signs[0]]
        if sign in ("<", "\\le"):
            return name, [((_LOW, False), (ends[1 - place], sign == "\\le"))]
        return name, [((ends[1 - place], sign == "\\ge"), (_HIGH, False))]
    upward = all(sign in ("<", "\\le") for sign in signs)
    if place != 1 or not (upward or all(sign in (">", "\\ge") for sign in signs)):
        return None
    first, last = (ends[0], signs[0] in ("\\le", "\\ge")), (ends[2], signs[1] in ("\\le", "\\ge"))
    return name, [(first, last) if upward else (last, first)]


_LOW, _HIGH = (Value("scalar", text) for text in ("-\\infty", "\\infty"))


def as_region(value: Value) -> Value | None:
    """Read `(a,b)` as an interval."""
    if len(value.kind) != 2 or len(value.parts) != 2:
        return value if value.kind == "region" else None
    low, high = value.parts
    if low.kind != "scalar" or high.kind != "scalar":
        return None
    low = _LOW if squeeze(low.text) == "-\\infty" else low
    high = _HIGH if _ENDLESS.get(squeeze(high.text)) == "+" else high
    ends = ((low, value.kind[0] == "["), (high, value.kind[1] == "]"))
    return Value("region", value.text, (ends,), name=value.name)


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
        if (mine.kind, gold.kind) != ("()", "list") or _SIGNED.search(gold.text):
            return False
        return _in_order(mine.parts, gold.parts)
    listed = mine.kind == "list" and not mine.name and not _JOINED.search(mine.raw)
    if mine.kind == gold.kind or (gold.kind == "()" and listed):
        return _in_order(mine.parts, gold.parts)
    return False


_MARKS = re.compile(r"\\(?:le|ge|neq|in|pm|to|approx)(?![a-z])|[<>&?]|\\\\")


def _alike(text: str, gold: str) -> bool:
    """Whether a relation has no signs but the gold answer's, turned round or not."""
    known = set(_MARKS.findall(gold))
    if _subscripts(text) > _subscripts(gold):
        return False
    return known | {_FLIPPED.get(sign, sign) for sign in known} >= set(_MARKS.findall(text))


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
    """Compare as many values, each with one that is left; what is unclear waits for the others."""
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
    """Compare `x=2, y=3` with `(2,3)` in the order of the names, or with its like."""
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
    found: Pairs = []
    parts = (sorted(region.parts, key=_start) for region in (mine, gold))
    for one, other in zip(*parts, strict=True):
        for (end, closed), (gold_end, gold_closed) in zip(one, other, strict=True):
            if closed is not gold_closed:
                return False
            same = same_scalar(end, gold_end)
            if same is False:
                return False
            found += same if isinstance(same, list) else []
    return found or True


def _start(interval: tuple[End, End]) -> Fraction | float:
    low = interval[0][0]
    if low is _LOW:
        return float("-inf")
    return low.number.value if low.number else approximate(form(low.text) or {}) or 0.0


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
    one, other = form(mine.text), form(gold.text)
    if one is not None and other is not None:
        return one == other
    return [(mine.text, gold.text)]


# math-verify reads `8.\frac{3}{7}` as the fraction, `5 0` as 0.
_BROKEN = re.compile(r"\d\.(?!\d)|\d\s+\d")


def _subscripts(text: str) -> int:
    return text.count("_") - text.count("\\log_")


def _key(text: str) -> str:
    """Drop all spaces where none stands between two digits."""
    return squeeze(text) if re.search(r"\d\s+\d", text) else "".join(text.split())


def worked_out(text: str) -> bool:
    """Whether a text is a value rather than a task: one fraction, root or power of numbers."""
    text = squeeze(text)
    return bool(_PLAIN.fullmatch(text)) and not _PRODUCT.search(text)


@lru_cache(maxsize=65_536)
def form(text: str) -> Sum | None:
    """Return the one form of a sum of products; None where it is unclear or no such sum."""
    squeezed = squeeze(text)
    if squeezed in _ENDLESS:
        return {(1, ((_ENDLESS[squeezed] + "infinite", 1),)): Fraction(1)}
    if len(text) > MAX_ANSWER or depth(text) > MAX_DEPTH or _WORD.search(text):
        return None
    if (number := read_number(text)) and not number.place:
        return {(1, ()): number.value} if number.value else {}
    try:
        return read_sum(text)
    except (Unclear, ZeroDivisionError):
        return None
