"""Write files whole, and say plainly why one cannot be written: no room, or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from chainforge.core.errors import Failed, InputError, first_line

_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What is wrong with the place that was named, and not with the work.
_PLACES = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
# torch and safetensors write in C++ and Rust: what they raise has the reason in its text, if at
# all (torch's writer only says that a position in the file, or the stream, is not as expected).
_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|\(os error (28|122|27)\)"
    r"|inline_container\.cc.*(unexpected pos|file write failed)|iostream error"
)


class DiskFull(Failed):
    """A file could not be written for want of room; names it, and says what is free."""


def is_full(error: BaseException) -> bool:
    """Whether an error says that there is no room: the disk, a quota or a limit on files."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NUMBERS
    return bool(_WORDS.search(str(error)))


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the want of room while `path` is written into `DiskFull`.

    A place that cannot be written (read-only, say, or below a file) becomes an `InputError`. In
    nested ones the innermost names the file; a folder serves where the file is not known.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        name = getattr(error, "filename", None)
        if isinstance(error, OSError) and error.errno in _PLACES and isinstance(name, str):
            raise InputError(
                f"{name}: {error.strerror}; name another place, or change what is wrong with it"
            ) from error
        if not is_full(error):
            raise
        words = f"{type(error).__name__}: {first_line(error)}"
        place = Path(name) if isinstance(name, str) else Path(path)
        raise DiskFull(f"{message(place)} ({words})") from error


@contextlib.contextmanager
def replacing(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Write a file whole: yield a temporary path beside it, which takes its place at the end.

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
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def to_disk(path: Path) -> None:
    """Force a file's contents, or the names in a folder, to disk."""
    windows = os.name == "nt"
    if windows and path.is_dir():  # Windows keeps names on its own
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of some file systems, for a folder
            raise
    finally:
        os.close(descriptor)


def message(path: Path) -> str:
    """Return an error: the file found no room, how much there is, and what to do."""
    folder = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    free = size_in_words(shutil.disk_usage(folder).free)
    which = f"a file, probably in {path}" if path.is_dir() else path
    return (
        f"no room to write {which}: {free} are free on its disk (a quota or a limit on the size "
        "of files may leave less). Make room, then run the same command again: it goes on from "
        "the last good state"
    )


def size_in_words(size: float) -> str:
    """Write 5368709120 bytes as `5.0 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
