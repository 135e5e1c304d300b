"""What a stage leaves on disk, and how one knows that it is whole.

A stage's directory is finished when it holds `manifest.json`, which is written last and by
`os.replace`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from chainforge.core.disk import replacing, to_disk
from chainforge.core.errors import InputError
from chainforge.core.redaction import redact

MANIFEST = "manifest.json"
STARTED = "stage.json"
PROGRESS = "progress.json"
UPLOAD = "upload.json"  # what of a signed stage is still to be sent, and where to
LOCK, HOLDER = ".lock", ".holder"
# A moment, for which whoever asks who holds a directory may hold it.
LOCK_SECONDS = 1.0


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
    states: dict[str, list[int]] = field(default_factory=dict)  # size and time of each output

    def write(self, directory: Path) -> None:
        """Sign the stage; from now on it counts as done."""
        self.finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(directory / MANIFEST, asdict(self))


def read_manifest(directory: str | Path) -> Manifest | None:
    """Return the manifest of a finished stage, or None."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        return None
    return cast(Manifest, read_shaped(path, Manifest, "a manifest of this version"))


def read_started(directory: str | Path) -> dict[str, Any] | None:
    """Return what an unfinished stage is being made from, or None."""
    from chainforge.core.shapes import Started

    path = Path(directory) / STARTED
    if not path.is_file():
        return None
    empty = {"recipe": "", "fingerprint": "", "given": {}, "inputs": {}}
    return {**empty, **read_shaped(path, Started, "the start of a stage")}


def sign_for(directory: Path, names: Iterable[str]) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Force files and their folders to disk; return a manifest's `outputs` and `states` of them."""
    outputs, states = {}, {}
    folders = {directory.resolve().parent, directory}
    for name in names:
        path = directory / name
        to_disk(path)
        outputs[name] = sha256(path)
        states[name] = _state(path)
        folders |= {directory / parent for parent in Path(name).parents}
    for folder in folders:
        to_disk(folder)
    return outputs, states


def damage(
    directory: Path, manifest: Manifest, part: str = "", *, thorough: bool = False
) -> list[str]:
    """Return which files under `part` are not what the stage signed: `model/x is missing`.

    A file of the same size and time is taken for the same unless `thorough`; one of another time,
    as in a copied run, is the same when its contents are.
    """
    words = []
    for name, digest in manifest.outputs.items():
        path = directory / name
        if part and name != part and not name.startswith(f"{part}/"):
            continue
        if not path.is_file():
            words.append(f"{name} is missing")
            continue
        now, signed = _state(path), manifest.states.get(name)
        if signed and now[0] != signed[0]:
            words.append(f"{name} has {now[0]:,} bytes, and not the {signed[0]:,} that were signed")
        elif (thorough or now != signed) and _hash_of(path) != digest:
            words.append(f"{name} is not what was signed: its contents changed")
    return words


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _hash_of(path: Path) -> str:
    """Hash a file, once per process while nobody touches it."""
    state = path.stat()
    return _hash(path, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@functools.lru_cache(maxsize=4096)
def _hash(path: Path, *state: int) -> str:
    return sha256(path)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
        file.write(redact(text) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; `InputError` names the file when it is missing, malformed or none."""
    value = _json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def read_shaped(path: Path, shape: Any, what: str) -> Any:
    """Read a JSON file that has a shape of `core.shapes`, with all that it holds beside it."""
    from chainforge.core.shapes import shaped

    value = _json(path)
    found = shaped(value, shape, path, what)
    return value if isinstance(found, dict) else found


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


def make_directory(directory: Path) -> None:
    """Make a directory, or what a link of its name leads to; `/proc`, for one, takes none."""
    try:
        directory.resolve().mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, RuntimeError) as error:  # the latter for a link to itself
        raise InputError(
            f"{directory}: no folder can be made there ({error}); name another place, or correct "
            "the link"
        ) from None


@contextlib.contextmanager
def lock(directory: str | Path) -> Iterator[None]:
    """Hold a directory alone; a second holder gets an `InputError` that names the first.

    The kernel lets go when the holder dies, so no lock is ever stale.
    """
    directory = Path(directory)
    make_directory(directory)
    held = _acquire(directory, LOCK_SECONDS)
    if held is None:
        raise InputError(
            f"{directory} is in use by {_name(directory) or 'another process'}; wait for it, or "
            "give another directory"
        )
    try:
        name = directory / HOLDER
        name.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        try:
            yield
        finally:
            name.unlink(missing_ok=True)
    finally:
        held.release()


def holder(directory: str | Path) -> str | None:
    """Return who holds a directory just now (`process 12 on host`); None when nobody does."""
    directory = Path(directory)
    name = _name(directory)
    if name is None:  # nobody does: a holder that ended in order has removed its name
        return None
    try:
        held = _acquire(directory, 0)
    except (OSError, InputError):  # read-only, as a run that was copied away may be
        return None
    if held is None:
        return name
    held.release()  # its holder was killed
    return None


def _name(directory: Path) -> str | None:
    try:
        return (directory / HOLDER).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _acquire(directory: Path, seconds: float) -> Any:
    """Return a directory's lock, held; None when somebody else holds it."""
    from filelock import FileLock, Timeout

    held = FileLock(directory / LOCK)
    try:
        held.acquire(timeout=seconds, poll_interval=0.05)
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
        raise InputError(
            f"{directory}: its file system gives no locks ({error.strerror}), without which two "
            "runs could write the same files; give a directory on another disk"
        ) from None
    return held


def report_progress(
    directory: str | Path, done: int, total: int, unit: str, note: str = ""
) -> None:
    """Leave word of how far a stage is, for whoever watches: `{done, total, unit, note}`."""
    value = {"done": done, "total": total, "unit": unit, "note": note}
    with replacing(Path(directory) / PROGRESS, durable=False) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")
