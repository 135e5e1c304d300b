"""A full disk, said as such: which file, how much is free, what to do."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from chainforge.core.errors import Failed, first_line

_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
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

    In nested ones the innermost names the file; a folder serves where the file is not known.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        name = getattr(error, "filename", None)
        words = f"{type(error).__name__}: {first_line(error)}"
        place = Path(name) if isinstance(name, str) else Path(path)
        raise DiskFull(f"{message(place)} ({words})") from error


def message(path: Path) -> str:
    """Say that a file found no room, how much there is, and what to do."""
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
