"""Read files of rows that may be larger than memory: an index of each, and single rows by place."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row


@dataclass(frozen=True, slots=True)
class Entry:
    """What must be known of a row to choose it; `place` is where in its file it starts.

    `fate` is `kept`, `dropped: <reason>`, or empty where nothing has been decided.
    """

    place: int
    id: str
    model: str
    sample: int
    correct: bool | None
    task: str
    source: str
    fate: str
    step: int


def rows_of(path: Path, start: int = 0, end: int | None = None) -> Iterator[tuple[int, Row]]:
    """Yield each row with its place, of the lines that begin from `start` and before `end`.

    A torn last line, which is just being written, is left out; raises `InputError` for another.
    """
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        place = file.tell()
        for line in file:
            if end is not None and place >= end:
                return
            if line.strip() and (row := _row(path, place, line)) is not None:
                yield place, row
            place += len(line)


def _row(path: Path, place: int, line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        if line.endswith(b"\n"):
            raise InputError(f"{path}: the line at byte {place} is not JSON: {error}") from None
        return None
    if not isinstance(row, dict):
        raise InputError(f"{path}: the line at byte {place} is no JSON object")
    return row


def index(path: Path, window: int | None = None) -> list[Entry]:
    """Return what is in a file of Samples; of one larger than two windows, its start and its end.

    `window` is in bytes. A file that has not changed is not read again.
    """
    if not path.is_file():
        return []
    state = path.stat()
    return _index(path, window, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _index(path: Path, window: int | None, size: int, changed: int) -> list[Entry]:
    spans: list[tuple[int, int | None]] = [(0, None)]
    if window is not None and size > 2 * window:
        spans = [(0, window), (size - window, None)]
    found = (pair for span in spans for pair in rows_of(path, *span))
    return [_entry(place, row) for place, row in found if "completion" in row]


def _entry(place: int, row: Row) -> Entry:
    verdict = row.get("correct")
    fate = f"dropped: {row['drop']}" if row.get("drop") else "kept" if "drop" in row else ""
    return Entry(
        place=place,
        id=str(row.get("id", "")),
        model=str(row.get("model", "")),
        sample=_whole(row.get("sample")),
        correct=None if verdict is None else bool(verdict),
        task=str(row.get("task", "")),
        source=str(row.get("source") or "not recorded"),
        fate=fate,
        step=_whole(row.get("step")),
    )


def _whole(value: Any) -> int:
    return int(number) if (number := finite(value)) is not None else 0


def finite(value: Any) -> float | None:
    """Return a value as a number where it is one, and finite."""
    if not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None


def fetch(path: Path, entries: list[Entry]) -> list[tuple[Entry, Row]]:
    """Read the rows of some entries, in their order.

    A row that is no longer at its place, because a stage is just writing the file, is left out.
    """
    rows = []
    try:
        with open(path, "rb") as file:
            for entry in entries:
                file.seek(entry.place)
                try:
                    row = json.loads(file.readline())
                except ValueError:
                    continue
                if isinstance(row, dict) and _entry(entry.place, row) == entry:
                    rows.append((entry, row))
    except FileNotFoundError:
        return []
    return rows
