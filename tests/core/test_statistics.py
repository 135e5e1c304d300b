"""Statistics agree with published tables, with exact arithmetic and with scipy."""

from __future__ import annotations

import numpy
import pytest
import scipy.stats

from chainforge.core.errors import InputError
from chainforge.core.statistics import (
    macro,
    maj_at_k,
    mcnemar,
    over_seeds,
    paired_difference,
    pass_at_k,
    wilson,
    wilson_over_prompts,
)


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 1), (2, 7), (250, 500), (500, 500), (77_777, 100_000)]
)
def test_wilson_agrees_with_scipy(successes: int, n: int) -> None:
    low, high = wilson(successes, n)
    reference = scipy.stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx(tuple(reference), abs=1e-12)
    assert 0 <= low <= successes / n <= high <= 1


def test_wilson_over_prompts_of_one_sample_each_is_wilson() -> None:
    for right in (0, 37, 100):
        shares = [1.0] * right + [0.0] * (100 - right)
        assert wilson_over_prompts(shares, 1) == pytest.approx((right / 100, *wilson(right, 100)))
        # Samples of a prompt that never differ tell nothing new.
        assert wilson_over_prompts(shares, 16)[1:] == pytest.approx(wilson(right, 100))
    # Those that differ as freely as rows of their own count as such, and no more than they are.
    assert wilson_over_prompts([0.25] * 100, 4)[1:] == pytest.approx(wilson(100, 400))


@pytest.mark.parametrize(("a", "b"), [(6.0, 0.3), (0.4, 0.6)])  # nearly all right; all or nothing
def test_wilson_over_prompts_covers_the_truth_about_as_often_as_it_says(a: float, b: float) -> None:
    random = numpy.random.default_rng(1)
    covered = 0
    for _ in range(1500):
        shares = random.binomial(4, random.beta(a, b, 60)) / 4
        _, low, high = wilson_over_prompts(shares.tolist(), 4)
        covered += low <= a / (a + b) <= high
    assert 0.93 <= covered / 1500 <= 0.97


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [(0, 0, 1.0), (0, 1, 1.0), (6, 0, 2 / 2**6), (1, 9, 2 * (1 + 10) / 2**10),
     # The exact p that SAS, R's exact2x2 and statsmodels print.
     (6, 16, 0.052478790283203125), (150, 86, 3.7159361395713866e-05)],
)  # fmt: skip
def test_mcnemar_is_exact(b: int, c: int, p: float) -> None:
    assert mcnemar(b, c) == pytest.approx(p, rel=1e-9)
    assert mcnemar(c, b) == pytest.approx(p, rel=1e-9)


@pytest.mark.parametrize("k", [1, 5, 100])
@pytest.mark.parametrize(("n", "c"), [(200, 0), (200, 57), (128, 128), (100_000, 50)])
def test_pass_at_k_agrees_with_scipys_hypergeometric(n: int, c: int, k: int) -> None:
    # The chance that k samples drawn without replacement hold at least one of the c right ones.
    assert pass_at_k(n, c, k) == pytest.approx(scipy.stats.hypergeom(n, c, k).sf(0), abs=1e-12)


def test_macro_of_one_part_is_wilson_and_of_several_is_narrower_than_its_worst() -> None:
    assert macro([(13, 100)]) == pytest.approx((0.13, *wilson(13, 100)))
    mean, low, high = macro([(100, 100), (0, 100)])
    assert mean == 0.5
    assert 0.47 < low < 0.5 < high < 0.53  # at 0 and 1 there is room on one side only
    assert macro([(30, 30), (30, 30)])[2] == 1.0


def test_macro_of_two_parts_is_the_interval_of_newcombe() -> None:
    # Newcombe 1998, "Interval estimation for the difference between independent proportions",
    # table II, method 10: 56/70 - 48/80 has the interval 0.0524 to 0.3339. A difference is twice
    # the mean with the second part's complement, less 1.
    _, low, high = macro([(56, 70), (80 - 48, 80)])
    assert (2 * low - 1, 2 * high - 1) == pytest.approx((0.0524, 0.3339), abs=5.1e-5)


def test_over_seeds_is_students_t_where_the_rows_are_certain() -> None:
    values = [0.61, 0.66, 0.59, 0.64]
    mean, low, high, p, sd = over_seeds([(v, v, v) for v in values])
    reference = scipy.stats.ttest_1samp(values, 0)
    assert (low, high) == pytest.approx(tuple(reference.confidence_interval()))
    assert (mean, p, sd) == pytest.approx(
        (numpy.mean(values), reference.pvalue, numpy.std(values, ddof=1))
    )


def test_over_seeds_is_never_surer_than_the_rows() -> None:
    mean, low, high, p, sd = over_seeds([(0.5, 0.4, 0.6)] * 5)
    assert (mean, low, high, sd) == pytest.approx((0.5, 0.4, 0.6, 0))
    assert p < 1e-3
    _, low, high, p, _ = over_seeds([(-0.05, -0.15, 0.05), (0.07, -0.03, 0.17)])
    assert low < 0 < high
    assert p > 0.05
    assert over_seeds([(0.0, 0.0, 0.0)] * 2) == (0.0, 0.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("answers", "correct", "k", "right"),
    [
        (["4", "5", "5"], [True, False, False], 3, False),
        (["4", "5", "5"], [True, False, False], 1, True),
        (["4", "5"], [True, False], 2, True),  # a tie goes to the first seen
        ([None, None, "4"], [False, False, True], 3, True),  # None has no vote
        ([None, None, "4"], [False, False, True], 2, False),  # nobody voted
    ],
)
def test_maj_at_k_votes_over_the_first_samples(
    answers: list[str | None], correct: list[bool], k: int, right: bool
) -> None:
    assert maj_at_k(answers, correct, k) is right


def test_paired_difference_is_the_bootstrap_over_rows() -> None:
    random = numpy.random.default_rng(1)
    first = random.random(300) < 0.5
    second = random.random(300) < 0.6
    _, low, high, p = paired_difference(first.tolist(), second.tolist())
    change = second.astype(int) - first.astype(int)
    reference = scipy.stats.bootstrap(
        (change,), numpy.mean, method="percentile", n_resamples=5000, rng=2
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(reference), abs=0.01)
    assert p == pytest.approx(mcnemar(sum(change < 0), sum(change > 0)))
    assert paired_difference(first, first) == (0.0, 0.0, 0.0, 1.0)


NO_ROWS = [
    lambda: wilson(0, 0), lambda: wilson(3, 2), lambda: wilson_over_prompts([], 4),
    lambda: over_seeds([(0.2, 0.1, 0.4)]), lambda: paired_difference([True], [True, False]),
]  # fmt: skip


@pytest.mark.parametrize("call", NO_ROWS)
def test_no_rows_give_no_number(call) -> None:
    with pytest.raises(InputError, match="needs"):
        call()
