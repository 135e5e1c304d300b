r"""Read a sum of products of whole numbers, square roots, pi and letters into its one form.

Like terms stand together, squares are taken out of the roots, brackets are multiplied out. Two such
sums are equal when their forms are: square roots of different square-free numbers, and powers of
pi, are independent over the rationals.
"""

from __future__ import annotations

import re
from collections import defaultdict
from fractions import Fraction
from functools import lru_cache
from math import isfinite, isqrt, pi, sqrt

Term = tuple[int, tuple[tuple[str, int], ...]]
"""What a coefficient stands before: the square-free number under a root, letters with powers."""
Sum = dict[Term, Fraction]

_TOKEN = re.compile(
    r"\s*(?:(\d{1,15})(?![\d.])|(\\frac|\\sqrt|\\pi|\\cdot|\\times)(?![A-Za-z])|([a-zA-Z])|(\S))"
)
# `e` and `i` may be numbers or letters, `d` a differential.
_LETTERS = frozenset("abcfghjklmnopqrstuvwxyzABCDFGHJKLMNOPQRSTUVWXYZ")
_SIGNS = frozenset("+-*/^{}()")
_MOST_TERMS, _MOST_POWER, _MOST_ROOT, _LARGEST = 40, 400, 10**6, 10**150
_PI = "\\pi"


class Unclear(Exception):
    """A text that is no such sum, or that could be read in two ways."""


def read_sum(text: str) -> Sum:
    """Return the form of a text spelled by `clean`.

    Raises `Unclear`, and `ZeroDivisionError` where it divides by nothing.
    """
    return _Reader(text).all()


def rational(total: Sum) -> bool:
    """Whether a sum is a rational number."""
    return all(term == (1, ()) for term in total)


def approximate(total: Sum) -> float | None:
    """Return about what a sum is worth; None where it has letters or is too large."""
    worth = 0.0
    for (root, letters), factor in total.items():
        if any(name != _PI for name, _ in letters):
            return None
        try:
            worth += float(factor) * sqrt(root) * pi ** sum(power for _, power in letters)
        except OverflowError:
            return None
    return worth if isfinite(worth) else None


class _Reader:
    """Reads one sum, from left to right."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        place, text = 0, text.rstrip()
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise Unclear
            _, _, letter, other = match.groups()
            if (letter and letter not in _LETTERS) or (other and other not in _SIGNS):
                raise Unclear
            self.tokens.append(match[0].strip())
            place = match.end()
        self.place = 0

    def next(self, wanted: str | None = None) -> str:
        token = self.peek()
        if not token or (wanted and token != wanted):
            raise Unclear
        self.place += 1
        return token

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def all(self) -> Sum:
        total = self.sum()
        if self.peek():
            raise Unclear
        return total

    def sum(self) -> Sum:
        total: Sum = defaultdict(Fraction)
        sign = self.next() if self.peek() in ("+", "-") else "+"
        while True:
            for term, factor in self.product().items():
                total[term] += factor if sign == "+" else -factor
            if self.peek() not in ("+", "-"):
                return _kept(total)
            sign = self.next()

    def product(self) -> Sum:
        """Read factors; refuse `a/bc`, `2 3`, mixed numbers, and what may be a function, `f(x)`."""
        total, divided = self.power(), False
        while (token := self.peek()) and token not in ("+", "-", "}", ")"):
            if token in ("*", "\\cdot", "\\times"):
                self.next()
                total = _times(total, self.power())
            elif token == "/":
                self.next()
                total, divided = _times(total, _inverse(self.power())), True
                continue
            else:
                if divided or token.isdigit() or not self._is_product(token):
                    raise Unclear
                total = _times(total, self.power())
            divided = False
        return total

    def _is_product(self, token: str) -> bool:
        """Whether the last token and the next, side by side, can only mean a product."""
        last, number = self.tokens[self.place - 1], self.tokens[self.place - 1].isdigit()
        if token == "\\frac":
            return not number
        power = self.place > 1 and self.tokens[self.place - 2] == "^"
        return token != "(" or last in (")", _PI) or (number and not power)

    def power(self) -> Sum:
        first, base = self.peek(), self.value()
        if self.peek() != "^":
            return base
        if first == "\\frac":  # the whole, or what is above
            raise Unclear
        self.next()
        if self.peek() == "{":
            self.next()
            sign = -1 if self.peek() == "-" and self.next() else 1
            token = self.next()
            self.next("}")
        else:
            sign, token = 1, self.next()
            if len(token) > 1:  # a^12 is a^1 times 2 in LaTeX
                raise Unclear
        if not token.isdigit() or int(token) > _MOST_POWER or self.peek() == "^":
            raise Unclear
        total = _number(Fraction(1))
        for _ in range(int(token)):
            total = _times(total, base)
        return _inverse(total) if sign < 0 else total

    def value(self) -> Sum:
        token = self.next()
        if token.isdigit():
            return _number(Fraction(int(token)))
        if token == "\\frac":
            return _times(self.group(), _inverse(self.group()))
        if token == "\\sqrt":
            return _root(self.group())
        if token == "(":
            inside = self.sum()
            self.next(")")
            return inside
        if token == _PI or token in _LETTERS:
            return {(1, ((token, 1),)): Fraction(1)}
        raise Unclear

    def group(self) -> Sum:
        self.next("{")
        inside = self.sum()
        self.next("}")
        return inside


def _number(value: Fraction) -> Sum:
    return _kept({(1, ()): value})


def _kept(total: Sum) -> Sum:
    """Drop what cancels; refuse what grows."""
    if len(total) > _MOST_TERMS:
        raise Unclear
    for factor in total.values():
        if max(abs(factor.numerator), factor.denominator) > _LARGEST:
            raise Unclear
    return {term: factor for term, factor in total.items() if factor}


def _times(one: Sum, other: Sum) -> Sum:
    total: Sum = defaultdict(Fraction)
    for (root, letters), factor in one.items():
        for (second, others), more in other.items():
            outside, inside = _square_free(root * second)
            powers: defaultdict[str, int] = defaultdict(int, letters)
            for letter, power in others:
                powers[letter] += power
            term = (inside, tuple(sorted((x, power) for x, power in powers.items() if power)))
            total[term] += factor * more * outside
    return _kept(total)


def _inverse(total: Sum) -> Sum:
    """Return 1 over one term; over a sum it is unclear."""
    if not total:
        raise ZeroDivisionError
    if len(total) > 1:
        raise Unclear
    [((root, letters), factor)] = total.items()
    return {(root, tuple((x, -power) for x, power in letters)): 1 / (factor * root)}


def _root(total: Sum) -> Sum:
    """Return the square root of a whole number that is not negative."""
    if not total:
        return {}
    [((root, letters), factor), *more] = total.items()
    if more or root > 1 or letters or factor < 0 or factor.denominator > 1 or factor > _MOST_ROOT:
        raise Unclear
    outside, inside = _square_free(int(factor))
    return {(inside, ()): Fraction(outside)}


@lru_cache(maxsize=4096)
def _square_free(number: int) -> tuple[int, int]:
    """Return what comes out of the square root of a number, and what stays in it."""
    if number > _MOST_ROOT:
        raise Unclear
    outside, inside, divisor = 1, number, 2
    while divisor <= isqrt(inside):
        while inside % (divisor * divisor) == 0:
            inside //= divisor * divisor
            outside *= divisor
        divisor += 1
    return outside, inside
