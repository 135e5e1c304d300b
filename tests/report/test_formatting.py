"""Numbers in words: rounded, with their sign and their interval."""

from __future__ import annotations

import pytest

from chainforge.report import formatting as wording


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (wording.percent(0.8723), "87.2 %"),
        (wording.points(0.252), "+25.2"),
        (wording.points(-0.03), "−3.0"),
        (wording.p_value(0.00001), "< 0.0001"),
        (wording.p_value(0.00042), "0.0004"),
        (wording.p_words(0.63), "p = 0.63"),
        (wording.count(12345), "12,345"),
        (wording.count(83.44), "83.4"),
        (wording.duration(4.23), "4.2 s"),
        (wording.duration(59.4), "59 s"),
        (wording.duration(185), "3 min 05 s"),
        (wording.duration(7620), "2 h 07 min"),
    ],
)
def test_numbers(written: str, expected: str) -> None:
    assert written.replace("\u00a0", " ") == expected


def test_a_difference_that_chance_explains_is_not_sold_as_a_gain() -> None:
    pair = {"from": "cold_start", "difference": -0.012, "low": -0.03, "high": 0.006, "p": 0.2}
    words = wording.gained(pair).replace("\u00a0", " ")
    assert words == (
        "1.2 points fewer than cold_start (−3.0 to +0.6, p = 0.20); chance alone could explain that"
    )
    assert "chance" not in wording.gained(pair | {"p": 0.01})
