"""Rows on disk, written by one process or by several that share the work.

A single process appends to `samples.jsonl`. Of several, each appends to `samples.rank-N.jsonl`,
and all may read all of them; the union counts, so that a run may continue with another number of
processes. The first process merges the files at the end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from chainforge.core.errors import InputError
from chainforge.core.jsonl import JsonLines, Row, repair, row_of, write_rows

T = TypeVar("T")
Key = tuple[str, int]  # id of the row, number of the sample
_RANK = re.compile(r"\.rank-\d+$")


def rank() -> int:
    """Return the number of this process in its launch."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes share the work."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def gathered(items: list[T]) -> list[T]:
    """Return the items of all processes, in their order; every process must call it."""
    if world_size() == 1:
        return items
    from accelerate.utils import gather_object

    return list(gather_object(items))


def shard_of(path: Path, number: int) -> Path:
    """Return the file that a process of several appends to."""
    return path.with_name(f"{path.stem}.rank-{number}{path.suffix}")


def own_file(path: Path) -> Path:
    """Return the file that this process appends to."""
    return path if world_size() == 1 else shard_of(path, rank())


def shards_of(path: Path) -> list[Path]:
    """Return the files of single processes that belong to a file."""
    beside = path.parent.glob(f"{path.stem}.rank-*{path.suffix}")
    return sorted(file for file in beside if _RANK.search(file.stem))


def merge(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows of all files as one, and remove those of single processes."""
    write_rows(path, rows)
    for shard in shards_of(path):
        shard.unlink()


class Shards:
    """The rows of a stage's files that `mine` accepts, those of other processes included."""

    def __init__(self, path: Path, mine: Callable[[Row], bool]) -> None:
        self.path, self.mine = path, mine
        self.rows: dict[Key, Row] = {}
        self._own = own_file(path)
        self._lines: JsonLines | None = None  # opened with the first row
        self._read: dict[Path, int] = {}  # bytes of each file that were read
        repair(self._own)
        self.refresh()

    def extend(self, rows: list[Row]) -> None:
        """Append rows and force them to disk, so that the caller may discard its own copy."""
        if rows:
            self._lines = self._lines or JsonLines(self._own)
            self._lines.extend(rows)
            self._lines.sync()
            self._note(rows)

    def refresh(self) -> list[Row]:
        """Read what the files contain by now; return the new rows."""
        new: list[Row] = []
        for file in (self.path, *shards_of(self.path)):
            if file.exists() and not (file == self._own and file in self._read):
                new += self._note(self._whole_lines(file))
        return new

    def _whole_lines(self, file: Path) -> list[Row]:
        """Read a file on from where it was read to its last whole line; others may be writing."""
        start = self._read.get(file, 0)
        with open(file, "rb") as lines:
            lines.seek(start)
            data = lines.read()
        end = data.rfind(b"\n") + 1
        self._read[file] = start + end
        try:
            return [row_of(line) for line in data[:end].splitlines()]
        except ValueError as error:
            raise InputError(f"{file}: a line is not JSON: {error}") from None

    def _note(self, rows: list[Row]) -> list[Row]:
        new = {(row["id"], row["sample"]): row for row in rows if self.mine(row)}
        new = {key: row for key, row in new.items() if key not in self.rows}
        self.rows |= new
        return list(new.values())

    def close(self) -> None:
        """Close the file of this process."""
        if self._lines:
            self._lines.close()
