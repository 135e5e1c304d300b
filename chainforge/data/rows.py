"""Read rows that others wrote: bad ones are set aside, with their number and what is wrong.

A few bad rows are only left out; a larger share of them means that the file is not what it should
be, and stops the run. The rows that were set aside are in the stage's `rejects.jsonl`.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from chainforge.core.errors import InputError
from chainforge.core.jsonl import JsonLines, Row, write_rows
from chainforge.core.process import stage_directory, working_in
from chainforge.core.transcript import is_blank

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_BAD = 0.01  # the share of bad rows above which a file stops the run
MAX_LINE = 1_000_000  # bytes; a longer line is a file in a file, or two files glued together
REJECTS = "rejects.jsonl"

_early: contextvars.ContextVar[tuple[Row, ...]] = contextvars.ContextVar("early", default=())


@contextlib.contextmanager
def rejects_in(directory: str | Path) -> Iterator[None]:
    """Make a directory the open stage's; write bad rows there: those found so far, and from now on.

    Of several processes only the first one writes them.
    """
    path = Path(directory) / REJECTS
    path.unlink(missing_ok=True)
    if early := _early.get():
        write_rows(path, early)
        _early.set(())
    with working_in(Path(directory)):
        yield


@dataclass
class FoundRows:
    """Good rows with their numbers, and what was wrong with the others."""

    path: Path
    rows: Iterable[tuple[int, Row]] = ()
    faults: list[tuple[int, str]] = field(default_factory=list)

    def each(self, change: Callable[[Row], T], most: float = MAX_BAD) -> Iterator[T]:
        """Yield `change(row)` for each good row; rows that it refuses count as bad rows, too.

        Writes the bad rows down at the end; raises `InputError` when their share is above `most`.
        """
        good, refused = 0, []
        for number, row in self.rows:
            try:
                made = change(row)
            except InputError as error:
                refused.append((number, str(error)))
            else:
                good += 1
                yield made
        if faults := sorted(self.faults + refused):
            self.settle(faults, good + len(faults), most)

    def settle(self, faults: list[tuple[int, str]], total: int, most: float = MAX_BAD) -> None:
        """Write bad rows down; raise `InputError` when they are too many of all."""
        rows = [{"file": str(self.path), "row": number, "reason": why} for number, why in faults]
        if (folder := stage_directory.get()) and os.environ.get("RANK", "0") == "0":
            with JsonLines(folder / REJECTS) as file:
                file.extend(rows)
        else:
            _early.set((*_early.get(), *rows))
        unit = "line" if self.path.suffix == ".jsonl" else "row"
        shown = "".join(f"\n  {unit} {number}: {why}" for number, why in faults[:5])
        shown += f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        what = f"{self.path}: {len(faults)} of {total} rows are malformed"
        if len(faults) > most * total:
            raise InputError(f"{what}, more than {most:.0%}:{shown}")
        logger.warning("%s and left out (a stage lists them all in %s):%s", what, REJECTS, shown)


def read_file(path: str | Path) -> FoundRows:
    """Read JSON lines, good rows and bad, as they are asked for; others of a .txt are prompts."""
    found = FoundRows(Path(path))
    if not found.path.is_file():
        raise InputError(f"{path}: no such file")
    found.rows = _parsed(found)
    return found


def _parsed(found: FoundRows) -> Iterator[tuple[int, Row]]:
    for number, (_, line) in enumerate(lines_of(found.path), start=1):
        if line.strip():
            try:
                row = parse(line, found.path.suffix == ".txt" and not line.startswith(b"{"))
            except InputError as error:
                found.faults.append((number, str(error)))
            else:
                yield number, row


def lines_of(
    path: str | Path, start: int = 0, end: float = math.inf
) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that begin within a range of bytes, each with the place of its first byte."""
    with open(path, "rb") as file:
        if start:  # what begins before belongs to another range
            file.seek(start - 1)
            start += len(file.readline()) - 1
        for line in file:
            if start >= end:
                return
            text = line if start else line.removeprefix(b"\xef\xbb\xbf")
            yield start + len(line) - len(text), text
            start += len(line)


def parse(line: bytes, plain: bool = False) -> Row:
    """Return the row of a line, or a plain prompt as one; raise `InputError` for what is none."""
    if len(line) > MAX_LINE:
        raise InputError(f"{len(line):,} bytes long, more than {MAX_LINE:,}")
    try:
        row = {"prompt": line.decode().strip()} if plain else msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"not {'text' if plain else 'a line of JSON'}: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"a {type(row).__name__}, not an object")
    if not row:
        raise InputError("an empty object")
    return row


def wrong_turns(turns: Any) -> str | None:
    """Return why a value is not a prompt; None when it is one."""
    if turns is None:
        return "neither `question` nor `prompt`"
    if not isinstance(turns, list) or not turns:
        return f"the prompt must be a list of messages, found {turns!r:.80}"
    for turn in turns:
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            return f"a message must be {{role, content}}, found {turn!r:.80}"
        if not isinstance(turn["content"], str) or is_blank(turn["content"]):
            return f"the {turn['role']} turn must be text, found {turn['content']!r:.80}"
    if turns[-1]["role"] != "user":
        return f"the last turn must be the user's, found {turns[-1]['role']!r}"
    return None
