"""Decide whether answer texts give their gold answers: a batch in, verdicts out.

Six verifiers: `math`, `arithmetic`, `numeric`, `choice`, `exact`, `reasoning_gym`. A verdict is
True, False, or None where the gold answer itself cannot be judged.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from chainforge.core.errors import InputError, hint
from chainforge.rewards.answers import clean
from chainforge.rewards.claims import Claim
from chainforge.rewards.comparison import COMPARISONS
from chainforge.rewards.judges import Job, Judges
from chainforge.rewards.quantities import number

logger = logging.getLogger(__name__)

VERIFIERS = tuple(COMPARISONS)
JUDGES = Judges()
COUNTS: Counter[str] = Counter()
"""Answers `compared` here, `judged` by a process, and of those ended by `timeout`, `memory`..."""

# What a process says instead of yes or no; the last two say nothing about the answer.
_VERDICTS = {"timeout": False, "memory": False, "crash": False, "gold": None, "lost": None}
_CACHE_SIZE = 65_536
_cache: OrderedDict[Job, bool | str] = OrderedDict()


def verify(
    verifier: str,
    text: str,
    gold: str | None,
    entry: str | dict[str, Any] | None = None,
    tolerance: float = 1e-6,
) -> bool | None:
    """Judge one answer text; `verify_all` judges a batch over several processes."""
    return verify_all([Claim(verifier, text, gold, entry, tolerance)])[0]


def verify_all(claims: Sequence[Claim], judges: Judges | None = None) -> list[bool | None]:
    """Judge a batch, in order. Raises `InputError` for a verifier or an entry that is none."""
    decisions = [_compare(claim) for claim in claims]
    jobs = list(dict.fromkeys(job for item in decisions if isinstance(item, list) for job in item))
    verdicts = {job: known for job in jobs if (known := _cache.get(job)) is not None}
    unknown = [job for job in jobs if job not in verdicts]
    COUNTS["compared"] += sum(not isinstance(item, list) for item in decisions)
    COUNTS["judged"] += len(unknown)
    for job, verdict in zip(unknown, (judges or JUDGES).judge(unknown), strict=True):
        verdicts[job] = verdict
        if isinstance(verdict, str):
            COUNTS[verdict] += 1
            logger.warning("%s while judging %.80r against %.80r", verdict, job[1], job[2])
        if verdict != "lost":
            _cache[job] = verdict
    while len(_cache) > _CACHE_SIZE:
        _cache.popitem(last=False)
    return [
        _settle([verdicts[job] for job in item]) if isinstance(item, list) else item
        for item in decisions
    ]


def expect(rows: Sequence[Mapping[str, Any]]) -> None:
    """Start the judging program beside other work, where rows will need it: math, not numbers.

    It imports for a second or two, in which a model is loaded or the first batch generated.
    """
    math = (row for row in rows[:1000] if (row.get("verifier") or "math") == "math")
    if any(number(clean(str(row.get("answer") or ""))) is None for row in math):
        JUDGES.begin(["math"])


def forget() -> None:
    """Forget every verdict of a judging process, so that the next one is found anew."""
    _cache.clear()


def _settle(verdicts: Sequence[bool | str]) -> bool | None:
    """Return whether all parts of an answer are right; None when one cannot be judged."""
    said = [_VERDICTS[one] if isinstance(one, str) else one for one in verdicts]
    return False if False in said else None if None in said else True


def _compare(claim: Claim) -> bool | list[Job] | None:
    """Compare here where that is safe, else return the jobs for a judging process."""
    if claim.verifier not in COMPARISONS:
        raise InputError(f"no verifier {claim.verifier!r}; {hint(str(claim.verifier), VERIFIERS)}")
    found = COMPARISONS[claim.verifier](claim)
    return [found] if isinstance(found, tuple) else found
