"""Answers that cost a verifier seconds, minutes, or its life."""

from __future__ import annotations

import random
from collections.abc import Callable

from chainforge.core.jsonl import Row
from chainforge.core.transcript import write

Maker = Callable[[int], str]


def _numbered(template: str) -> Maker:
    return lambda number: template.replace("N", str(number))


def _repeated(unit: str, end: str = "") -> Maker:
    return lambda times: unit * times + end


def _nested(opening: str, closing: str) -> Maker:
    return lambda times: f"\\boxed{{{opening * times}4{closing * times}}}"


# With the least and the largest number that a maker is given: so they differ.
TRICKS: dict[str, tuple[Maker, int, int]] = {
    "tower": (_numbered(r"\boxed{N^{9^{9}}}"), 3, 99),
    "tower of four": (_numbered(r"\boxed{9^{9^{9^N}}}"), 3, 99),
    "tower of a product": (_numbered(r"\boxed{9^{N \cdot 9^{9}}}"), 3, 99),
    "tower in a fraction": (_numbered(
        r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - N}{16}}"
    ), 3, 99),
    "huge power": (_numbered(r"\boxed{N^{1000000000}}"), 2, 99),
    "factorial": (_numbered(r"\boxed{1000N!}"), 100, 999),
    "factorial twice": (_numbered(r"\boxed{(N!)!}"), 18, 29),
    "binomial": (_numbered(r"\boxed{\binom{1000N}{500000}}"), 100, 999),
    "sum": (_numbered(r"\boxed{\sum_{k=1}^{100000N} k}"), 100, 999),
    "integral": (_numbered(r"\boxed{\int_0^N \sin(x^x)e^{x^7} dx}"), 2, 99),
    "expansion": (_numbered(r"\boxed{(x+y+z+1)^{N}}"), 50, 99),
    "common divisor": (_numbered(r"\boxed{\gcd(10^{10^6}+N, 10^{10^6}-1)}"), 2, 99),
    "parentheses": (_nested("(", ")"), 40, 60),
    "many parentheses": (_nested("(", ")"), 2000, 3000),
    "braces": (_nested("{", "}"), 1500, 2000),
    "fractions": (_nested(r"\frac{1}{", "}"), 25, 35),
    "boxes": (_repeated(r"\boxed{4}"), 4000, 6000),
    "open boxes": (_repeated(r"\boxed{"), 4000, 6000),
    "digits": (_repeated("9"), 90_000, 110_000),
    "ones": (_repeated("1 "), 40_000, 60_000),
    "brackets": (_repeated("["), 90_000, 110_000),
    "sum of many": (_repeated("x+", "x"), 2500, 3500),
    "surrogates": (_repeated("\u202e\x00", "?"), 900, 1100),
}  # fmt: skip


def trick(name: str, rng: random.Random) -> Row:
    """Return what makes a row of `mathrows.py` a hostile one."""
    make, low, high = TRICKS[name]
    text = write("A trick.", make(rng.randint(low, high)))
    return {"kind": f"hostile: {name}", "right": False, "completion": text}
