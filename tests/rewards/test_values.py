"""What is decided without a parser, what is left to one, and that math-verify says the same."""

import pytest

from chainforge.rewards.answers import clean
from chainforge.rewards.values import read
from chainforge.rewards.verify import POOL, compare


def decide(answer, gold):
    return compare(read(clean(answer)), read(clean(gold), True))


DECIDED = [
    ("4", r"\sqrt{16}", True),
    ("4", "x", False),
    (r"\sqrt{4}", r"\sqrt{16}-2", True),
    (r"2\sqrt{3}", r"\sqrt{3} \cdot 2", True),
    (r"2\sqrt{3}", r"3\sqrt{2}", False),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
    (r"3+2\sqrt{2}", r"(1+\sqrt{2})^2", True),
    (r"\frac{\pi}{4}", r"\frac{1}{4}\pi", True),
    ("2^{-3}", r"\frac{1}{8}", True),
    ("x^2+5x+6", "(x+2)(x+3)", True),
    ("x^2+5x+6", "y^2+5y+6", False),
    (r"\frac{1}{x+1}", r"\frac{1}{1+x}", True),
    (r"(3,\frac{\pi}{2})", r"(3,\pi/2)", True),
    (r"\{1,2,3\}", r"\{3, 1, 2\}", True),
    ("[0,1)", r"\left[0, \frac{2}{2}\right)", True),
    (r"(-\infty,1)\cup(2,\infty)", r"(-\infty, 1) \cup (2, \infty)", True),
    ("1, 2", "1", False),
]


LEFT = [
    ("e+4", "e+4.0"),  # a decimal may be rounded
    ("x", "1/2x"),
    ("x^2 3", "3x^2"),
    ("x^{12}", "x^12"),
    ("f(x)", "xf"),
    ("f^2(x)", "f^2x"),
    ("e^2", "e^2+0"),
    ("3+4i", "4i+3"),
    (r"\sin x", "x"),
    ("cos x", "x cos"),
    ("abc", "cba"),
    (r"\sqrt{x}", "x"),
    (r"\sqrt[3]{8}", "2"),
    ("1/0", "2"),
    ("0^{-1}", "2"),
    ("101_2", "101"),
]


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"), [*DECIDED, *((*pair, None) for pair in LEFT)]
)
def test_it_decides_without_the_pool_or_leaves_what_is_unclear(gold, answer, verdict):
    said = decide(answer, gold)
    assert isinstance(said, list) if verdict is None else said is verdict


def test_math_verify_says_the_same():
    cases = [(clean(answer), clean(gold), verdict) for gold, answer, verdict in DECIDED]
    said = POOL.score([("math", answer, gold) for answer, gold, _ in cases])
    assert [case for case, one in zip(cases, said, strict=True) if one is not case[2]] == []
