"""Say how sure a number is: intervals, paired tests, pass@k and majority votes.

Every function refuses an empty sample with an `InputError`: no rows, no number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from chainforge.core.errors import InputError


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval (low, high) of a proportion, both in [0, 1].

    Unlike the normal interval it keeps to [0, 1] and stays honest near 0 and 1
    (Wilson 1927, without continuity correction).
    """
    from scipy.stats import binomtest

    if not 0 <= successes <= n or n == 0:
        raise InputError(
            f"wilson: {successes} successes of {n} rows; need 0 <= successes <= n, n > 0"
        )
    if not 0 < confidence < 1:
        raise InputError(
            f"wilson: confidence {confidence}; need a share between 0 and 1, like 0.95"
        )
    interval = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    # Rounding may leave the point estimate outside by 1e-17 at 0 and at n.
    return max(0.0, float(interval.low)), min(1.0, float(interval.high))


def mcnemar(b: int, c: int) -> float:
    """Return the exact two-sided McNemar p-value of b against c discordant pairs.

    b rows only the first got right, c rows only the second; 1.0 when the two never differ.
    """
    from scipy.stats import binomtest

    if b < 0 or c < 0:
        raise InputError(f"mcnemar: {b} and {c} discordant pairs; need counts from 0 up")
    return 1.0 if b + c == 0 else float(binomtest(b, b + c, 0.5).pvalue)


def paired_difference(
    first: Sequence[bool],
    second: Sequence[bool],
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> tuple[float, float, float, float]:
    """Return (difference, low, high, p) of `second` minus `first`, judged on the same rows.

    The interval is the percentile bootstrap over rows, so a row keeps its pair; p is the exact
    McNemar test. Where every row changes alike the bootstrap has no spread and low equals high.
    """
    import numpy

    n = len(first)
    if n != len(second) or n == 0:
        raise InputError(
            f"paired_difference: {n} and {len(second)} rows; need the same rows, at least one"
        )
    if resamples < 1:
        raise InputError(f"paired_difference: resamples is {resamples}; need at least 1")
    lost = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    won = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    # A row contributes -1, 0 or +1, so drawing n rows with replacement is one multinomial draw of
    # the three counts: the same bootstrap, without an array of resamples x n.
    shares = numpy.array([lost, won, n - lost - won]) / n
    counts = numpy.random.default_rng(seed).multinomial(n, shares, size=resamples)
    tail = (1 - confidence) / 2
    low, high = numpy.quantile((counts[:, 1] - counts[:, 0]) / n, [tail, 1 - tail])
    return (won - lost) / n, float(low), float(high), mcnemar(lost, won)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate that at least one of k samples is right, given c of n right.

    1 - C(n-c, k) / C(n, k), as a product so that no binomial overflows
    (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise InputError(f"pass_at_k: n={n}, c={c}, k={k}; need 0 <= c <= n and 1 <= k <= n")
    miss = 1.0
    for i in range(n - c + 1, n + 1):
        miss *= max(0.0, 1 - k / i)
    return 1 - miss


def maj_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> bool:
    """Return whether the majority answer of the first k samples is right.

    None does not vote; a tie goes to the answer seen first; without any vote the result is False.
    The winner is as right as its first sample was judged to be.
    """
    if len(answers) != len(correct) or not 1 <= k <= len(answers):
        raise InputError(
            f"maj_at_k: {len(answers)} answers, {len(correct)} judgements, k={k}; "
            "need one judgement an answer and 1 <= k <= answers"
        )
    votes = Counter(answer for answer in answers[:k] if answer is not None)
    if not votes:
        return False
    # A Counter keeps insertion order and most_common is stable: the first seen wins a tie.
    winner = votes.most_common(1)[0][0]
    return bool(correct[list(answers).index(winner)])
