"""Check a stage's JSON files, which users edit and other versions write, before they are read.

Keys that a shape does not have are allowed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
from msgspec import Meta

from chainforge.core.errors import InputError

Number = Annotated[float, Meta(ge=-1e18, le=1e18)]  # NaN is out of bounds, too
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


class Progress(TypedDict):
    """`progress.json`: how far a stage is."""

    done: Number
    total: Number
    unit: str
    note: NotRequired[str]


Kept = TypedDict("Kept", {"in": Count, "kept": Count})


class Funnel(Kept):
    """`funnel.json`: where the rows of a data stage went."""

    dropped: dict[str, Count]
    prompts: NotRequired[Kept | None]
    decontamination: NotRequired[dict[str, Any] | None]


class Spending(TypedDict):
    """What a teacher cost; `usd` is None where a price is not known."""

    usd: Number | None
    requests: Count
    tokens: Count


class Interval(TypedDict):
    """The bounds of an estimate."""

    low: Number
    high: Number


class Share(Interval):
    """A share of rows with its interval."""

    mean: Number


class Accuracies(TypedDict):
    """How much is right, read strictly and leniently."""

    strict: Share
    lenient: Share


class Measured(Accuracies):
    """What was measured on a set of rows."""

    n: Count
    format: Number
    tokens_mean: Number | None
    truncated: Number
    language: NotRequired[Number | None]
    tokens_per_solved: NotRequired[Number | None]
    reasoning_tokens_mean: NotRequired[Number | None]
    unjudged: NotRequired[Count]
    pass_at_1: NotRequired[Share]
    pass_at_k: NotRequired[dict[str, Number | None]]
    maj_at_k: NotRequired[dict[str, Number | None]]


class Model(Measured):
    """A model of an evaluation, on all rows and on each task's."""

    name: str
    tasks: NotRequired[dict[str, Measured]]
    macro: NotRequired[Accuracies]


class Pair(TypedDict("Ends", {"from": str, "to": str}), Interval):  # type: ignore[misc]
    """Two models compared on the same rows."""

    difference: Number
    p: Number


class Results(TypedDict):
    """`results.json`: what an evaluation measured."""

    models: list[Model]
    pairs: list[Pair]
    settings: NotRequired[dict[str, Any] | None]
