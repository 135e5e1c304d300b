"""What a stage leaves on disk, and how one knows that it is whole.

A stage's directory is finished when it holds `manifest.json`, which is written last and by
`os.replace`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError

MANIFEST = "manifest.json"
STARTED = "stage.json"
PROGRESS = "progress.json"
UPLOAD = "upload.json"  # what of a signed stage is still to be sent, and where to


@dataclass
class Manifest:
    """The signed contents of a finished stage."""

    recipe: str
    fingerprint: str
    given: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    config: dict[str, Any]
    metrics: dict[str, Any]
    versions: dict[str, str]
    device: str
    seed: int
    seconds: float
    finished: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Sign the stage; from now on it counts as done."""
        self.finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(directory / MANIFEST, asdict(self))


def read_manifest(directory: str | Path) -> Manifest | None:
    """Return the manifest of a finished stage, or None."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        return None
    try:
        return Manifest(**read_json(path))
    except TypeError as error:
        raise InputError(f"{path} is not a manifest of this version: {error}") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; `InputError` names the file when it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, or of a folder's files with their relative names."""
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file_path.relative_to(path)}\0{sha256(file_path)}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def lock(directory: str | Path) -> Iterator[None]:
    """Hold a directory alone; a second holder gets an `InputError` that names the first.

    The kernel lets go when the holder dies, so no lock is ever stale.
    """
    path = Path(directory) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(
                f"{directory} is in use by {holder}; wait for it, or give another directory"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def holder(directory: str | Path) -> str | None:
    """Say who holds a directory just now (`process 12 on host`); None when nobody does.

    A free directory is never locked by asking, so that whoever wants it gets it.
    """
    try:
        with open(Path(directory) / ".lock", encoding="utf-8") as file:
            name = file.read().strip()
            if not name:  # a holder that ended in order has wiped its name out
                return None
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return name
    return None


def report_progress(
    directory: str | Path, done: int, total: int, unit: str, note: str = ""
) -> None:
    """Leave word of how far a stage is, for whoever watches: `{done, total, unit, note}`."""
    value = {"done": done, "total": total, "unit": unit, "note": note}
    path = Path(directory) / PROGRESS
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)
