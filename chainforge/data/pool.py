"""Read scored samples that a GRPO, collect or reject stage left."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, many_rows
from chainforge.data.rows import read_file

NAMES = ("rollouts.jsonl", "samples.jsonl")
MARKS = frozenset({"drop", "drop_detail", "pass_rate"})  # of an earlier selection


class _Turn(msgspec.Struct):
    role: str
    content: str


class _Sample(msgspec.Struct):
    """What a scored sample's columns must be."""

    id: str
    prompt: list[_Turn]
    completion: str
    reward: float | None = None
    tokens: float | None = None
    correct: bool | None = None


@many_rows()
def read_pool(paths: Sequence[str]) -> list[Row]:
    """Return the samples of stages and files, numbered again within each prompt, without old marks.

    `pooled_from` names a row's stage. Malformed rows are left out and written to the stage's
    rejects; raises `InputError` for too many of them, and for a path without samples.
    """
    if not paths:
        raise InputError("pool: name the samples, as --pool runs/quickstart/rejection")
    numbers: Counter[str] = Counter()
    pool: list[Row] = []
    for path in map(_file, paths):
        for row in read_file(path).each(_checked):
            left = {key: value for key, value in row.items() if key not in MARKS}
            pool.append(left | {"sample": numbers[row["id"]], "pooled_from": path.parent.name})
            numbers[row["id"]] += 1
    if not pool:
        raise InputError(f"pool: {', '.join(map(str, paths))}: no samples in it")
    return pool


def _file(path: str) -> Path:
    names = [Path(path), *(Path(path, name) for name in NAMES)]
    file = next((file for file in names if file.is_file()), None)
    if file is None:
        raise InputError(
            f"pool: {path}: no samples: expected a .jsonl file, or the directory of a stage with "
            f"{' or '.join(NAMES)}"
        )
    return file


def _checked(row: Row) -> Row:
    try:
        msgspec.convert(row, _Sample)
    except msgspec.ValidationError as error:
        raise InputError(str(error)) from None
    return row


def pass_rates(rows: Iterable[Row]) -> dict[str, float]:
    """Return the share of right samples by prompt; rows without a verdict are left out.

    Sampling that stops at a success has too large a share of successes. Where samples came in
    rounds (column `round`) only the first round counts, which every prompt got completely.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row.get("correct") is not None and not row.get("round"):
            right[row["id"]].append(bool(row["correct"]))
    return {identity: sum(of) / len(of) for identity, of in right.items()}
