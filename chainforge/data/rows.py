"""Read rows that others wrote: bad ones are set aside, with their number and what is wrong.

A few bad rows cost nothing but themselves; more than a given share means that the file is not what
it should be, and stops the run. What was set aside is in `rejects.jsonl` of the stage.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from chainforge.core.errors import InputError
from chainforge.core.jsonl import JsonLines, Row
from chainforge.core.transcript import is_blank

logger = logging.getLogger(__name__)

MAX_LINE = 1_000_000  # bytes; a longer line is a file in a file, or two files glued together
SHARE = 0.01
NAME = "rejects.jsonl"

Fault = tuple[int, str]  # the row's number in its file, and what is wrong with it

_pending: list[Row] = []  # bad rows found before a stage was opened
_folder: contextvars.ContextVar[Path | None] = contextvars.ContextVar("rejects", default=None)


@contextlib.contextmanager
def rejects_in(directory: str | Path) -> Iterator[None]:
    """Write bad rows that are found in this context to `directory`/rejects.jsonl."""
    token = _folder.set(Path(directory))
    (Path(directory) / NAME).unlink(missing_ok=True)
    if _pending:
        with JsonLines(Path(directory) / NAME) as file:
            file.extend(_pending)
        _pending.clear()
    try:
        yield
    finally:
        _folder.reset(token)


@dataclass
class FoundRows:
    """Good rows with their numbers, and what was wrong with the others."""

    path: Path
    rows: list[tuple[int, Row]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def settle(path: Path, faults: list[Fault], total: int, most: float) -> None:
    """Write bad rows down; raise `InputError` when they are more than a share of `total`."""
    if not 0 <= most <= 1:
        raise InputError(f"max_bad_rows: expected a share from 0 to 1, found {most}")
    if not faults:
        return
    faults = sorted(faults)
    folder = _folder.get()
    rows = [{"file": str(path), "row": number, "reason": why} for number, why in faults]
    if folder is None:
        _pending.extend(rows)
    else:
        with JsonLines(folder / NAME) as file:
            file.extend(rows)
    unit = "line" if path.suffix == ".jsonl" else "row"
    shown = "".join(f"\n  {unit} {number}: {why}" for number, why in faults[:5])
    shown += f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
    what = f"{len(faults)} of {total} rows are malformed"
    if len(faults) > most * total:
        raise InputError(f"{path}: {what}, max_bad_rows is {most:.2%}:{shown}")
    where = f"; all of them are in {folder / NAME if folder else NAME}"
    logger.warning("%s: %s and left out%s:%s", path, what, where, shown)


def read_file(path: str | Path, *, unique: str | None = None) -> FoundRows:
    """Read a file of JSON lines, good rows and bad; `unique` names a column that must differ."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    found = FoundRows(path)
    seen: dict[Any, int] = {}
    with open(path, "rb") as file:
        for number, row, fault in read_lines(file):
            if row is not None and unique is not None and row.get(unique) is not None:
                key = json.dumps(row[unique])
                if key in seen:
                    fault = f"the {unique} {key[:60]} is that of row {seen[key]}"
                seen.setdefault(key, number)
            if fault:
                found.faults.append((number, fault))
            elif row is not None:
                found.rows.append((number, row))
    return found


def read_lines(
    lines: Iterable[bytes], head: bool = True
) -> Iterator[tuple[int, Row | None, str | None]]:
    """Yield the number of each line that is not blank, and its row, or what is wrong with it.

    A byte order mark at the `head` of a file and carriage returns do not count.
    """
    for number, line in enumerate(lines, start=1):
        if head and number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            row, fault = _parse(line)
            yield number, row, fault


def _parse(line: bytes) -> tuple[Row | None, str | None]:
    if len(line) > MAX_LINE:
        return None, f"{len(line):,} bytes long, more than {MAX_LINE:,}"
    if b"\0" in line or b"\\u0000" in line:
        return None, "contains a NUL character"
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        row, fault = _explained(line)
        if fault is not None:
            return None, fault
    if not isinstance(row, dict):
        return None, f"a {type(row).__name__}, not an object"
    return (row, None) if row else (None, "an empty object")


def _explained(line: bytes) -> tuple[Any, str | None]:
    """Decode with Python's own parser, which tells more precisely what is wrong and where."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: {error.reason} at byte {error.start}"
    except (ValueError, RecursionError) as error:
        torn = "" if line.endswith(b"\n") else " (torn: the last line has no end)"
        return None, f"not JSON: {error}{torn}"
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return None, "contains half a character (a lone surrogate)"
    except ValueError:
        return None, "contains a number that JSON cannot express: NaN or infinity"
    return row, None


def same_question(text: str) -> str:
    """Return what equal questions share: case and white space do not count."""
    return " ".join(text.lower().split())


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
