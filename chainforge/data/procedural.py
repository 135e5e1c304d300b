"""The built-in task `reasoning_gym`: procedural data sets with scorers of their own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from chainforge.core.errors import InputError, hint
from chainforge.core.jsonl import Row


def reasoning_gym(
    dataset: str, *, size: int | None, seed: int, verifier: str = "reasoning_gym", **config: Any
) -> Iterator[Row]:
    """Yield rows of a procedural data set without end; `config` are its own settings.

    The column `entry` is the item as JSON, for the data set's own scorer. Raises `InputError`
    for an unknown data set, an unknown setting, and a value that the data set refuses.
    """
    from reasoning_gym.factory import DATASETS

    if dataset == "composite":
        raise InputError("composite: list its data sets as tasks of their own instead")
    if dataset not in DATASETS:
        raise InputError(
            f"reasoning-gym has no data set {dataset!r}; {hint(str(dataset), DATASETS)}"
        )
    if size is None:
        raise InputError(f"{dataset} has no end: say how many rows as `size`")
    settings = {item.name for item in dataclasses.fields(DATASETS[dataset][1])} - {"seed", "size"}
    for key in config:
        if key not in settings:
            raise InputError(f"{dataset} has no setting {key!r}; {hint(key, settings)}")
    # Some data sets prepare a list as long as `size`, so it is taken in pieces.
    piece = min(max(2 * size, 256), 4096)
    if verifier == "reasoning_gym":
        _check_scorer(dataset, _create(dataset, config, seed, piece))
    return _endless(dataset, config, seed, piece, verifier)


def _create(dataset: str, config: dict[str, Any], seed: int, size: int) -> Any:
    """Make a data set; what the library says against the settings is said as an `InputError`."""
    from reasoning_gym.factory import create_dataset

    try:
        made = create_dataset(dataset, seed=seed, size=size, **config)
        made[0]
    except (
        Exception
    ) as error:  # the library's own words: asserts, ValueError, TypeError, IndexError
        raise InputError(f"{dataset} refuses {config}: {error or type(error).__name__}") from error
    return made


def _endless(
    dataset: str, config: dict[str, Any], seed: int, piece: int, verifier: str
) -> Iterator[Row]:
    start = seed
    while True:
        made = _create(dataset, config, start, piece)
        for index in range(piece):
            item = made[index]
            yield {
                "question": item["question"],
                "answer": "" if item["answer"] is None else str(item["answer"]),
                "task": dataset,
                "verifier": verifier,
                "entry": _entry(item, dataset),
            }
        start += piece


def _entry(item: Mapping[str, Any], dataset: str) -> str:
    """Return an item as JSON; its metadata names the data set, which owns the scorer."""
    metadata = dict(item["metadata"]) | {"source_dataset": dataset}
    kept = {"question": item["question"], "answer": item["answer"], "metadata": metadata}
    return json.dumps(kept, ensure_ascii=False, default=str)


def _check_scorer(dataset: str, made: Any) -> None:
    """Refuse a data set whose scorer turns down its own answer once the entry was JSON.

    A few compare with tuples (arc_agi, rearc), which JSON turns into lists.
    """
    item = made[0]
    if item["answer"] is None:
        return
    entry = json.loads(_entry(item, dataset))
    if made.score_answer(item["answer"], entry) < made.score_answer(item["answer"], item):
        raise InputError(f"{dataset}: its own scorer cannot read entries from JSON; add "
                         "`verifier: exact` to params")  # fmt: skip
