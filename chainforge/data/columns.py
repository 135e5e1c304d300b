"""Rows as columns of one type each, which is what Arrow and Parquet hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from chainforge.core.jsonl import Row


def columns_of(
    rows: Sequence[Row], messages: Sequence[str] = ("prompt", "completion")
) -> dict[str, list[Any]]:
    """Return rows as columns of one type each but `messages`; what a row lacks is None."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return {
        name: values if name in messages else _one_type(values) for name, values in columns.items()
    }


def _one_type(values: list[Any]) -> list[Any]:
    """Return a column that Arrow holds without changing a value, else its values as JSON text."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    # Arrow would give every mapping the keys of all, so mappings are text too.
    if len(kinds) <= 1 and dict not in kinds and not (list in kinds and _holds_mappings(values)):
        try:
            pa.array(values)
            return values
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            pass
    return [None if value is None else json.dumps(value, default=str) for value in values]


def _holds_mappings(values: list[Any]) -> bool:
    return any(
        isinstance(value, list) and any(isinstance(item, dict) for item in value)
        for value in values
    )
