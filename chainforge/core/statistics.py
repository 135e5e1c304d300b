"""Measure how certain a number is: intervals, paired tests, pass@k and majority votes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import fsum, prod, sqrt
from statistics import NormalDist, mean, stdev

from chainforge.core.errors import InputError

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Return the 95 % Wilson score interval (low, high) of a proportion, both in [0, 1].

    Unlike the normal interval it stays in [0, 1] and is accurate near 0 and 1 (Wilson 1927, without
    continuity correction). Counts need not be whole: see `wilson_over_prompts`.
    """
    if not 0 <= successes <= n or n == 0:
        raise InputError(f"an interval needs rows: found {successes} successes of {n}")
    # scipy's binomtest(...).proportion_ci(method="wilson") takes whole numbers only.
    share, z2 = successes / n, _Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = sqrt(z2 * (share * (1 - share) + z2 / (4 * n)) / n) / (1 + z2 / n)
    # At 0 and at 1 rounding must not leave the share itself outside.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def wilson_over_prompts(shares: Sequence[float], samples: int) -> tuple[float, float, float]:
    """Return (mean, low, high) of the share of right samples, given each prompt's own share.

    The samples of one prompt are not independent rows: the interval is Wilson's for as many rows as
    would vary like the prompts do, at most prompts x samples (Dean and Pagano 2015, "Evaluating
    confidence interval methods for binomial proportions in clustered surveys").
    """
    n = len(shares)
    if not n:
        raise InputError("an interval needs rows: found none")
    middle = min(1.0, fsum(shares) / n)
    spread = fsum((share - middle) ** 2 for share in shares) / n
    rows = n * middle * (1 - middle) / spread if spread else n * (samples if 0 < middle < 1 else 1)
    rows = max(n, min(n * samples, rows))
    return middle, *wilson(middle * rows, rows)


def macro(parts: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """Return (mean, low, high) of the plain mean of several (successes, n) proportions.

    The interval recovers each part's variance from its Wilson limits (MOVER: Zou, Huang and Zhang
    2009, "A note on confidence interval estimation for a linear function of binomial proportions").
    """
    limits = [(wilson(successes, n), successes / n) for successes, n in parts]
    middle = mean(share for _, share in limits)
    below = sqrt(sum((share - low) ** 2 for (low, _), share in limits)) / len(parts)
    above = sqrt(sum((high - share) ** 2 for (_, high), share in limits)) / len(parts)
    return middle, max(0.0, middle - below), min(1.0, middle + above)


def over_seeds(
    estimates: Sequence[tuple[float, float, float]],
) -> tuple[float, float, float, float, float]:
    """Return (mean, low, high, p, sd) of (value, low, high) estimates, one a seed.

    The interval is Student's t over the seeds, and never narrower than a seed's own on average:
    more seeds do not make the rows more certain. p is two-sided, for a mean of 0.
    """
    from scipy.stats import t

    seeds = len(estimates)
    if seeds < 2:
        raise InputError(f"an interval over seeds needs two of them: found {seeds}")
    values = [value for value, _, _ in estimates]
    middle, spread = mean(values), stdev(values)
    critical = float(t.ppf((1 + CONFIDENCE) / 2, seeds - 1))
    own = mean((high - low) / 2 for _, low, high in estimates)
    half = max(critical * spread / sqrt(seeds), own)
    p = 2 * float(t.sf(abs(middle) * critical / half, seeds - 1)) if half else float(middle == 0)
    return middle, middle - half, middle + half, p, spread


def student(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Return (mean, low, high, p) of independent values of any scale, by Student's t.

    p is two-sided, for a mean of 0. A single value says nothing of its spread: p is 1.
    """
    from scipy.stats import t

    n, middle = len(values), fsum(values) / len(values)
    if n < 2:
        return middle, middle, middle, 1.0
    error = stdev(values) / sqrt(n)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    p = 2 * float(t.sf(abs(middle) / error, n - 1)) if error else float(middle == 0)
    return middle, middle - half, middle + half, p


def mcnemar(b: int, c: int) -> float:
    """Return the exact two-sided McNemar p-value of b against c discordant pairs.

    b rows only the first got right, c rows only the second; 1.0 when the two never differ.
    """
    from scipy.stats import binomtest

    return 1.0 if b + c == 0 else float(binomtest(b, b + c, 0.5).pvalue)


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], seed: int = 0, resamples: int = 10_000
) -> tuple[float, float, float, float]:
    """Return (difference, low, high, p) of `second` minus `first`, measured on the same rows.

    The interval is the percentile bootstrap over rows, so a row keeps its pair; p is the exact
    McNemar test. Where every row changes alike the bootstrap has no spread and low equals high.
    """
    import numpy

    n = len(first)
    if n != len(second) or n == 0:
        raise InputError(f"a comparison needs the same rows: found {n} and {len(second)}")
    lost = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    won = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    # A row contributes -1, 0 or +1, so drawing n rows with replacement is one multinomial draw of
    # the three counts: the same bootstrap, without an array of resamples x n.
    shares = numpy.array([lost, won, n - lost - won]) / n
    counts = numpy.random.default_rng(seed).multinomial(n, shares, size=resamples)
    tail = (1 - CONFIDENCE) / 2
    low, high = numpy.quantile((counts[:, 1] - counts[:, 0]) / n, [tail, 1 - tail])
    return (won - lost) / n, float(low), float(high), mcnemar(lost, won)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate that at least one of k samples is right, given c of n right.

    1 - C(n-c, k) / C(n, k), as a product so that no binomial overflows
    (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1).
    """
    return 1 - prod(max(0.0, 1 - k / i) for i in range(n - c + 1, n + 1))


def maj_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> bool:
    """Return whether the majority answer of the first k samples is right.

    None does not vote; a tie goes to the answer seen first; without any vote the result is False.
    The winner is as right as its first sample.
    """
    votes = Counter(answer for answer in answers[:k] if answer is not None)
    if not votes:
        return False
    # A Counter keeps insertion order and most_common is stable: the first seen wins a tie.
    return bool(correct[list(answers).index(votes.most_common(1)[0][0])])
