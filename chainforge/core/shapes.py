"""The shapes of a stage's JSON files, to which every reader holds them.

A key that a shape does not have is let through: later versions and users may write more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import Meta

from chainforge.core.errors import InputError

# As large as anything that is counted; NaN is out of bounds, too.
Number = Annotated[float, Meta(ge=-1e18, le=1e18)]
Count = Annotated[int, Meta(ge=0, le=10**18)]


def shaped(value: Any, shape: Any, path: str | Path, what: str) -> Any:
    """Return a JSON value as its `shape`; an `InputError` names the file and the place in it."""
    try:
        return msgspec.convert(value, shape)
    except (msgspec.ValidationError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is not {what}: {error}") from None


class Started(TypedDict, total=False):
    """`stage.json`: what a stage is being made from."""

    recipe: str
    fingerprint: str
    given: dict[str, Any]
    inputs: dict[str, str]


class _Note(TypedDict, total=False):
    note: str


class Progress(_Note):
    """`progress.json`: how far a stage is."""

    done: Number
    total: Number
    unit: str


Kept = TypedDict("Kept", {"in": Count, "kept": Count})


class _Screened(TypedDict, total=False):
    prompts: Count
    questions: Count
    prompts_dropped: Count


class _Prompts(TypedDict, total=False):
    prompts: Kept | None
    decontamination: _Screened | None


class Funnel(Kept, _Prompts):
    """`funnel.json`: where the rows of a data stage went."""

    dropped: dict[str, Count]


class Spending(TypedDict):
    """What a teacher cost; `usd` is None where a price is not known."""

    usd: Number | None
    requests: Count
    tokens: Count


class Bill(TypedDict, total=False):
    """A line of a teacher's account."""

    usd: Number | None
    tokens: Count | None


class _Interval(TypedDict):
    low: Number
    high: Number


class _Share(_Interval):
    mean: Number


class _Accuracies(TypedDict):
    strict: _Share
    lenient: _Share


class _Optional(TypedDict, total=False):
    language: Number | None
    tokens_per_solved: Number | None
    reasoning_tokens_mean: Number | None
    unjudged: Count
    pass_at_1: _Share
    pass_at_k: dict[str, Number | None]
    maj_at_k: dict[str, Number | None]


class _Measured(_Accuracies, _Optional):
    n: Count
    format: Number
    tokens_mean: Number | None
    truncated: Number


class _Parts(TypedDict, total=False):
    tasks: dict[str, _Measured]
    macro: _Accuracies


class _Model(_Measured, _Parts):
    name: str


Ends = TypedDict("Ends", {"from": str, "to": str})


class _Pair(Ends, _Interval):
    difference: Number
    p: Number


class _Sampling(TypedDict, total=False):
    temperature: Number | None
    top_p: Number | None
    top_k: Number | None
    max_new_tokens: Count | None
    num_samples: Count | None


class _Settings(TypedDict, total=False):
    sampling: _Sampling | None
    seeds: list[Any]


class _Asked(TypedDict, total=False):
    settings: _Settings | None


class Results(_Asked):
    """`results.json`: what an evaluation measured."""

    models: list[_Model]
    pairs: list[_Pair]
