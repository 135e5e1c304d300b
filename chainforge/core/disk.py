"""Write files whole, and explain why one cannot be written: a full disk, or a wrong place."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from chainforge.core.errors import Failed, InputError, first_line

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WRONG_PLACE = (errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
# torch and safetensors write in C++ and Rust: their errors have the reason in their text, if at
# all (torch's writer only says that a position in the file, or the stream, is not as expected).
_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|\(os error (28|122|27)\)"
    r"|inline_container\.cc.*(unexpected pos|file write failed)|iostream error"
)


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
            raise DiskFull(f"{message(place)} ({first_line(error)})") from error
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
                to_disk(temporary)
            os.replace(temporary, path)
            if durable:
                to_disk(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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


def message(path: Path) -> str:
    """Return the error for a file without space: how much is free, and what to do."""
    folder = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    which = f"a file, probably in {path}" if path.is_dir() else path
    return (
        f"no room to write {which}: {shutil.disk_usage(folder).free / 2**30:.1f} GiB are free on "
        "its disk (a quota may leave less). Make room, then run the same command again: it resumes"
    )
