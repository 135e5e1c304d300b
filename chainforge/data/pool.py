"""Measure scored samples: rows in memory, or files of them, too large for memory.

Of a million rows only what selection must know is held in memory (`Features`); the rows themselves
are read once to measure them, on all cores, and once more to write them. A GRPO stage leaves its
samples in `rollouts.jsonl`, a collect or reject stage in `samples.jsonl`.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, many_rows
from chainforge.data.dedup import (
    Hashes,
    Sketches,
    cached_tokens,
    hashed,
    shingles,
    sketches,
    text_key,
    tokens,
)
from chainforge.data.filters import (
    FilterArgs,
    Finding,
    SelectionArgs,
    fault,
    filters,
    parts,
    text_fault,
)
from chainforge.data.rows import SHARE, Fault, read_lines, settle

if TYPE_CHECKING:
    import pandas as pd

NAMES = ("rollouts.jsonl", "samples.jsonl")
MARKS = frozenset({"drop", "drop_detail", "pass_rate"})
PART = 8 * 2**20  # bytes that a worker reads at a time
ALONE = 64 * 2**20  # files smaller than this are not worth starting processes for
COLUMNS = ("id", "task", "question", "verdict", "reward", "length", "key", "drop", "detail")


@dataclass
class Features:
    """What selection must know of samples: a row of `COLUMNS` each, in their order.

    `verdict` is None for unverified samples and for those of later rounds. `sketch` has one row
    for each sample without a finding, or none at all. `columns` are those that any sample has.
    """

    table: pd.DataFrame
    sketch: Sketches
    columns: set[str]

    @property
    def accepted(self) -> list[bool]:
        """Return for each sample whether it has no finding."""
        return list(self.table["drop"].isna())

    @staticmethod
    def join(some: Sequence[Features]) -> Features:
        """Return the features of the samples of all parts, one part after the other."""
        import pandas as pd

        table = pd.concat([one.table for one in some], ignore_index=True)
        sketch = np.concatenate([one.sketch for one in some])
        return Features(table, sketch, set().union(*(one.columns for one in some)))


def measure(rows: Iterable[Row], args: SelectionArgs, texts: FilterArgs | None = None) -> Features:
    """Return the features of samples; a finding is the first reason to drop one.

    Texts are filtered only where a sample's scores are fine, and sketched only when near duplicates
    or diversity are asked for.
    """
    import pandas as pd

    checks = filters(texts) if texts is not None else []
    sketched = bool(args.near_duplicates) or args.select == "diverse"
    made: list[tuple[Any, ...]] = []
    sets: list[Hashes] = []
    columns: set[str] = set()
    for row in rows:
        finding = fault(row, args)
        if finding is None and (checks or sketched):
            said = parts(row["completion"])
            finding = text_fault(row, said, checks)
            if sketched and finding is None:
                text = [cached_tokens(said.reasoning)[1], hashed(tokens(said.answer))]
                sets.append(shingles(np.concatenate(text)))
        made.append(_features(row, finding))
        columns.update(row)
    return Features(pd.DataFrame(made, columns=COLUMNS), sketches(sets), columns)


def _features(row: Row, finding: Finding | None) -> tuple[Any, ...]:
    reward, count, correct = row.get("reward"), row.get("tokens"), row.get("correct")
    # Later rounds go to prompts that lacked successes: counted in, they would bias the rate.
    verdict = float("nan") if correct is None or row.get("round") else float(correct)
    reason, detail = finding or (None, None)
    return (
        row["id"],
        _encodable(str(row.get("task", ""))),
        _encodable(asked(row)),
        verdict,
        float("-inf") if reward is None else float(reward),
        len(row["completion"]) if count is None else int(count),
        0 if finding else text_key(row["completion"]) >> 1,  # signed, as pandas wants it
        reason,
        detail and _encodable(detail),
    )


def _encodable(text: str) -> str:
    """Return a text without lone surrogates, which Arrow cannot hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def asked(row: Row) -> str:
    """Return what the user said, all turns of it; an empty text for a row without prompt."""
    turns = row.get("prompt") or ()
    return "\n".join(turn["content"] for turn in turns if turn.get("role") == "user")


_Part = tuple[Path, int, int]  # whole lines of a file: where they start and end


@dataclass
class Pool:
    """Files of scored samples, one after the other."""

    files: list[Path]
    max_bad_rows: float = SHARE

    def measure(self, args: SelectionArgs, texts: FilterArgs | None) -> Features:
        """Measure every sample; raise `InputError` when too many rows are malformed."""
        pieces = [part for path in self.files for part in _parts(path)]
        size, processes = sum(end - start for _, start, end in pieces), os.cpu_count() or 1
        settings = [args] * len(pieces), [texts] * len(pieces)
        if processes == 1 or size < ALONE:
            return self._join(pieces, map(_measure, pieces, *settings))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as workers:
            return self._join(pieces, workers.map(_measure, pieces, *settings))

    def _join(
        self, pieces: Sequence[_Part], measured: Iterable[tuple[Features, list[Fault], int]]
    ) -> Features:
        features: list[Features] = []
        faults: dict[Path, list[Fault]] = {path: [] for path in self.files}
        lines, totals = Counter[Path](), Counter[Path]()
        for (path, _, _), (found, wrong, count) in zip(pieces, measured, strict=True):
            faults[path] += [(number + lines[path], why) for number, why in wrong]
            lines[path] += count
            totals[path] += len(found.table) + len(wrong)
            features.append(found)
        for path, wrong in faults.items():
            settle(path, wrong, totals[path], self.max_bad_rows)
        if not features:
            raise InputError(f"pool: {', '.join(map(str, self.files))}: no samples in it")
        return Features.join(features)

    def rows(self) -> Iterator[Row]:
        """Yield every good row, in the order in which they were measured, without old marks.

        Samples are numbered again within each prompt; `pooled_from` names a row's stage.
        """
        numbers: Counter[str] = Counter()
        for path in self.files:
            with open(path, "rb") as file:
                for _, row, wrong in read_lines(file):
                    if wrong is None and row is not None and _wrong(row) is None:
                        number = numbers[row["id"]]
                        numbers[row["id"]] += 1
                        left = {key: value for key, value in row.items() if key not in MARKS}
                        yield left | {"sample": number, "pooled_from": path.parent.name}


def find_samples(paths: Sequence[str | Path]) -> list[Path]:
    """Return the files of samples in the stages' directories and paths that are given."""
    files: list[Path] = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else [path / name for name in NAMES]
        file = next((file for file in found if file.is_file()), None)
        if file is None:
            raise InputError(
                f"pool: {path}: no samples: expected a .jsonl file, or the directory of a stage "
                f"with {' or '.join(NAMES)}"
            )
        files.append(file)
    return files


def _parts(path: Path) -> Iterator[_Part]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = 0
        while start < size:
            file.seek(min(start + PART, size))
            file.readline()
            end = file.tell()
            yield path, start, end
            start = end


def _measure(
    part: _Part, args: SelectionArgs, texts: FilterArgs | None
) -> tuple[Features, list[Fault], int]:
    """Measure the rows of a part; return the faults of the others, and its number of lines.

    Numbers count from the part's first line.
    """
    path, start, end = part
    with open(path, "rb") as file:
        file.seek(start)
        lines = io.BytesIO(file.read(end - start)).readlines()
    faults: list[Fault] = []

    def good() -> Iterator[Row]:
        for number, row, wrong in read_lines(lines, head=start == 0):
            wrong = wrong or (None if row is None else _wrong(row))
            if wrong is not None:
                faults.append((number, wrong))
            elif row is not None:
                yield row

    with many_rows():
        return measure(good(), args, texts), faults, len(lines)


class _Turn(msgspec.Struct):
    content: str


class _Sample(msgspec.Struct):
    """What a scored sample's columns must be."""

    id: str
    completion: str
    reward: float | None = None
    tokens: float | None = None
    correct: bool | None = None
    prompt: list[_Turn] | None = None


def _wrong(row: Row) -> str | None:
    """Return why a row is not a scored sample; None when it is one."""
    try:
        msgspec.convert(row, _Sample)
    except msgspec.ValidationError as error:
        what, _, column = str(error).partition(" - at `$.")
        return f"{column.rstrip('`')}: {what[0].lower()}{what[1:]}" if column else what
    return None
