"""Read and write JSON lines, and replace whole files, so that both survive a crash.

An *Example* is a question with its gold answer; a *Sample* is an Example with a completion and
where that came from. Both are plain dictionaries, so that a user's own columns travel with them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from chainforge.core.errors import Failed, InputError, first_line

Row = dict[str, Any]
Message = dict[str, str]

_DECODER = msgspec.json.Decoder(Row)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WRONG_PLACE = (errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
# torch and safetensors write in C++ and Rust: their errors have the reason in their text, if at
# all (torch's writer only says that a position in the file, or the stream, is not as expected).
_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|\(os error (28|122|27)\)"
    r"|inline_container\.cc.*(unexpected pos|file write failed)|iostream error"
)


class JsonLines:
    """Append rows to a file of JSON lines; what was appended survives a kill.

    A torn last line, which a kill can leave, is cut off on open.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        repair(self.path)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)

    def append(self, row: Row) -> None:
        """Write one row; the kernel has it when this returns, so that it survives a kill."""
        self.extend([row])

    def extend(self, rows: Iterable[Row]) -> None:
        """Write several rows with one call; a kill may tear only the last one."""
        data = memoryview(b"".join(map(line_of, rows)))
        with writing(self.path):
            while data:
                data = data[self._file.write(data) :]

    def sync(self) -> None:
        """Force the rows to disk, so that they survive a power cut."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Force the rows to disk and close the file."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def line_of(row: Row) -> bytes:
    """Encode a row as one line of UTF-8; text that UTF-8 cannot hold is escaped, never lost.

    Raises `ValueError` for NaN and infinity, which JSON does not have.
    """
    with contextlib.suppress(TypeError, UnicodeEncodeError):  # as for NumPy's numbers
        line = msgspec.json.encode(row)
        # A null that no column explains may be a NaN: json, seven times as slow, finds out.
        if line.count(b"null") == sum(value is None for value in row.values()):
            return line + b"\n"
    text = json.dumps(row, allow_nan=False, separators=(",", ":"))
    return f"{text}\n".encode()


def row_of(line: bytes) -> Row:
    """Return the row of a line; raise `ValueError` (or `RecursionError`) where it is none."""
    try:
        return _DECODER.decode(line)
    except msgspec.DecodeError:  # which json may read: NaN, or text that UTF-8 cannot hold
        row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not an object")
    return row


def repair(path: Path) -> None:
    """Cut a torn last line off a file of JSON lines; one that is whole JSON gets its newline."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        file.seek(max(0, path.stat().st_size - 1))
        if file.read() in (b"", b"\n"):  # as nearly always: the rest need not be read
            return
        file.seek(0)
        data = file.read()
        start = data.rfind(b"\n") + 1
        try:
            json.loads(data[start:])
            file.write(b"\n")
        except ValueError:
            file.truncate(start)


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Replace a file of JSON lines whole: a reader sees the old rows or the new ones."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.writelines(map(line_of, rows))


def read_rows(path: str | Path, *, torn_tail: bool = False) -> list[Row]:
    """Read a file of JSON lines; raise `InputError` naming each malformed line.

    Blank lines are passed over. With `torn_tail`, for files that `JsonLines` writes, a torn last
    line is left out: the writer will repair it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    rows: list[Row] = []
    wrong: list[str] = []
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(row_of(line))
        except (ValueError, RecursionError) as error:
            if not torn_tail or number < len(lines):
                wrong.append(f"line {number}: {error}")
    if wrong:
        head = f"{path}: {len(wrong)} of {len(lines)} lines are not JSON objects; the first:"
        raise InputError("\n  ".join([head, *wrong[:5]]))
    return rows


class DiskFull(Failed):
    """A file could not be written for lack of space; the message names it and the free space."""


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn a lack of space while `path` is written into `DiskFull`.

    A place that cannot be written (read-only, or below a file) becomes an `InputError`. In nested
    calls the innermost names the file; give a folder where the file is not known.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        number, name = getattr(error, "errno", None), getattr(error, "filename", None)
        if number in _WRONG_PLACE and name:
            raise InputError(f"{name}: {error.strerror}; name another place") from error  # type: ignore[attr-defined]
        if number in _FULL or (number is None and _WORDS.search(str(error))):
            place = Path(name) if isinstance(name, str) else Path(path)
            raise DiskFull(f"{no_room(place)} ({first_line(error)})") from error
        raise


@contextlib.contextmanager
def replacing(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Write a file whole: yield a temporary path beside it, which replaces it at the end.

    A reader sees the old file or the new one, also after a power cut if `durable`. An error leaves
    the old one and nothing else.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            if durable:
                move(temporary, path)
            else:
                os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def move(file: Path, path: Path) -> None:
    """Put a whole file in the place of another, so that a power cut leaves one of them."""
    to_disk(file)
    os.replace(file, path)
    to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Force a file's contents, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of some file systems, for a folder
            raise
    finally:
        os.close(descriptor)


def no_room(path: Path) -> str:
    """Return the error for a file without space: how much is free, and what to do."""
    folder = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    which = f"a file, probably in {path}" if path.is_dir() else path
    return (
        f"no room to write {which}: {shutil.disk_usage(folder).free / 2**30:.1f} GiB are free on "
        "its disk (a quota may leave less). Make room, then run the same command again: it resumes"
    )
