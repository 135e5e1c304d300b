"""Read a written-out number exactly, and the unit behind it from a list of units."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_ANSWER = 300  # characters, of an answer that a parser may see

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
    """Drop the spaces that mean nothing; keep those between letters or digits (`4 5` is two)."""
    return _LOOSE_SPACE.sub("", text)


class Number(NamedTuple):
    """A value, and how much the last written decimal place is worth: 0 for an exact one."""

    value: Fraction
    place: Fraction = Fraction(0)

    def equals(self, other: Number) -> bool:
        """Whether both are one number: exactly, or the one is the other cut after six digits."""
        off, place = abs(self.value - other.value), max(self.place, other.place)
        if self.place and other.place:
            place /= 2
        return off == 0 or (off <= abs(other.value) / 10**6 and off < place)

    def rounds(self, value: float) -> bool:
        """Whether this is a value rounded to so many places, or cut after two of them or more."""
        off, place = abs(self.value - Fraction(value)), float(self.place)
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


# One unit a line or semicolon, its first name for all of them; plurals are understood.
_MEASURES = """
mm millimeter millimetre; cm centimeter centimetre; dm decimeter; m meter metre;
km kilometer kilometre; in inch; ft foot feet; yd yard; mi mile; mg milligram; g gram;
kg kilogram; lb lbs; oz ounce; ton tonne; ml mL milliliter millilitre; l L liter litre;
gallon gal; quart qt; pint pt; cup; tablespoon tbsp; teaspoon tsp; s sec second;
ms millisecond; μs microsecond; ns nanosecond;
nm nanometer nanometre; μm micrometer micrometre; μg microgram; min minute;
h hr hrs hour; day; week; month; year yr yrs; decade; century; degree deg °; rad radian; °C celsius;
°F fahrenheit; K kelvin; unit; dollar ¤ USD US buck 美元; cent ¢; euro € EUR 欧元; pound £ GBP;
yen ¥ 円 JPY; yuan 元 块 rmb RMB CNY; rupee ₹; N newton; J joule; kJ kilojoule; W watt; kW kilowatt;
kWh; Pa pascal; V volt; A ampere amp; ohm; Hz hertz;
kHz; MHz; GHz; kV; mV; mA; kPa; MW; MJ; keV; MeV; mol mole; cal calorie; kcal;
mi/h mph; km/h kph kmh; rpm; acre; hectare ha; bit; byte; MB; GB; kB; eV; 岁; 人; 个; 天;
小时; 分钟; 米; 厘米; 千米; 度
"""
_COUNTED = """
apple orange banana pear peach grape lemon cherry berry strawberry blueberry mango fruit vegetable
carrot potato tomato egg cookie cake cupcake candy pie pizza slice sandwich burger donut muffin
bagel loaf glass bottle can jar box bag basket carton crate bucket tray plate bowl person people
child children student boy girl man men woman women kid teacher friend player member worker employee
passenger guest customer voter adult visitor patient dog cat cow horse sheep pig chicken hen duck
bird fish rabbit mouse mice animal puppy kitten goat bee spider frog book page pencil pen notebook
crayon marker paper sheet card stamp sticker photo picture word problem question test game toy doll
ball marble bead block brick tile coin bill ticket token point goal vote car truck bus bike bicycle
train plane boat trip lap step house room floor door window chair table seat desk bed tree flower
rose plant seed leaf leaves shirt shoe sock hat dress button song movie lesson way outcome
arrangement combination permutation triangle rectangle circle line segment side edge vertex vertices
face angle diagonal number integer digit solution factor divisor element subset path route term
value piece item object phone call computer battery message email bolt nail screw clip necklace
bracelet ring gift present balloon bulb flag meal serving penny nickel dime row column group team
family bacteria cell stone rock shell wheel penguin elephant monkey lion bear turtle
"""
_UNITS = {name: group.split()[0] for group in _MEASURES.split(";") for name in group.split()} | {
    name: name for name in _COUNTED.split()
}
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
