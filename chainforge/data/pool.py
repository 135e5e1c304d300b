"""Samples that were scored before: files of them, measured on all cores and read again in order.

A GRPO stage leaves them in `rollouts.jsonl`, a collect or reject stage in `samples.jsonl`.

Of a million rows only what selection must know is held in memory (`Facts`); the rows themselves are
read once to measure them and once more to write them down.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, many_rows
from chainforge.data.facts import Facts, measure
from chainforge.data.filters import FilterArgs
from chainforge.data.salvage import Fault, read_lines, settle

if TYPE_CHECKING:
    from chainforge.data.rejection import SelectionArgs

NAMES = ("rollouts.jsonl", "samples.jsonl")
MARKS = frozenset({"drop", "drop_detail", "pass_rate"})
PART = 8 * 2**20  # bytes that a worker reads at a time
ALONE = 64 * 2**20  # files smaller than this are not worth starting processes for


@dataclass(frozen=True)
class _Part:
    """Whole lines of a file."""

    path: Path
    start: int
    end: int


@dataclass
class Pool:
    """Files of scored samples, one after the other."""

    files: list[Path]
    max_bad_rows: float = 0.01
    faults: dict[Path, list[Fault]] = field(default_factory=dict)

    def measure(self, args: SelectionArgs, texts: FilterArgs | None) -> Facts:
        """Measure every sample; raise `InputError` when too many rows are malformed."""
        parts = [part for path in self.files for part in _parts(path)]
        processes = os.cpu_count() or 1
        if processes == 1 or sum(part.end - part.start for part in parts) < ALONE:
            return self._gather(parts, (_measure(part, args, texts) for part in parts))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as workers:
            count = len(parts)
            return self._gather(
                parts, workers.map(_measure, parts, [args] * count, [texts] * count)
            )

    def _gather(
        self, parts: Sequence[_Part], measured: Iterator[tuple[Facts, list[Fault], int]]
    ) -> Facts:
        facts = Facts()
        lines: dict[Path, int] = {}
        totals: dict[Path, int] = {}
        for part, (found, faults, count) in zip(parts, measured, strict=True):
            before = lines.get(part.path, 0)
            own = self.faults.setdefault(part.path, [])
            own += [(number + before, why) for number, why in faults]
            lines[part.path] = before + count
            totals[part.path] = totals.get(part.path, 0) + len(found) + len(faults)
            facts.extend(found)
        for path, faults in self.faults.items():
            settle(path, faults, totals[path], self.max_bad_rows)
        return facts

    def rows(self) -> Iterator[Row]:
        """Yield every good row, in the order in which they were measured, without old marks.

        Samples are numbered anew within each prompt; `pooled_from` says where one is from.
        """
        numbers: Counter[str] = Counter()
        for path in self.files:
            with open(path, "rb") as file:
                for _, row, fault in read_lines(file):
                    if fault is None and row is not None and _wrong(row) is None:
                        number = numbers[row["id"]]
                        numbers[row["id"]] += 1
                        left = {key: value for key, value in row.items() if key not in MARKS}
                        yield left | {"sample": number, "pooled_from": path.parent.name}


def find_samples(paths: Sequence[str | Path]) -> list[Path]:
    """Return the files of samples that stages' directories and paths stand for."""
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
            yield _Part(path, start, end)
            start = end


def _measure(
    part: _Part, args: SelectionArgs, texts: FilterArgs | None
) -> tuple[Facts, list[Fault], int]:
    """Measure the rows of a part; return what is wrong with the others, and how many lines it has.

    Numbers count from the part's first line.
    """
    with open(part.path, "rb") as file:
        file.seek(part.start)
        lines = io.BytesIO(file.read(part.end - part.start)).readlines()
    faults: list[Fault] = []

    def good() -> Iterator[Row]:
        for number, row, fault in read_lines(lines, head=part.start == 0):
            fault = fault or (None if row is None else _wrong(row))
            if fault is not None:
                faults.append((number, fault))
            elif row is not None:
                yield row

    with many_rows():
        return measure(good(), args, texts), faults, len(lines)


def _wrong(row: Row) -> str | None:
    """Return what keeps a row from being a scored sample."""
    kinds = {"id": str, "completion": str}
    for name, kind in kinds.items():
        if not isinstance(row.get(name), kind):
            return f"{name}: expected text, found {row.get(name)!r:.60}"
    for name in ("reward", "tokens"):
        value = row.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{name}: expected a number, found {value!r:.60}"
    if not isinstance(row.get("correct"), bool | None):
        return f"correct: expected true, false or null, found {row['correct']!r:.60}"
    turns = row.get("prompt") or []
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns
    ):
        return f"prompt: expected messages, found {turns!r:.60}"
    return None
