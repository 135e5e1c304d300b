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
_WRONG_PLACE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
                errno.ENAMETOOLONG, errno.ELOOP)  # fmt: skip
# torch and safetensors write in C++ and Rust: their errors have the reason in their text, if at
# all (torch's writer only says that a position in the file, or the stream, is not as expected).
_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|\(os error (28|122|27)\)"
    r"|inline_container\.cc.*(unexpected pos|file write failed)|iostream error"
)


class DiskFull(Failed):
    """A file could not be written for lack of space; the message names it and the free space."""


def is_full(error: BaseException) -> bool:
    """Return whether an error means no space: the disk, a quota or a limit on files."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return bool(_WORDS.search(str(error)))


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
        name = getattr(error, "filename", None)
        if isinstance(error, OSError) and error.errno in _WRONG_PLACE and isinstance(name, str):
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
    """Return the error for a file without space: how much is free, and what to do."""
    folder = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    free = size_in_words(shutil.disk_usage(folder).free)
    which = f"a file, probably in {path}" if path.is_dir() else path
    return (
        f"no room to write {which}: {free} are free on its disk (a quota or a limit on the size "
        "of files may leave less). Make room, then run the same command again: it resumes from "
        "the last good state"
    )


def size_in_words(size: float) -> str:
    """Write 5368709120 bytes as `5.0 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
