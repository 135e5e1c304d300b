"""Write and check what a stage leaves on disk: its manifest, its fingerprint and its lock.

A stage's directory is finished when it holds `manifest.json`, which is written last and whole. Its
fingerprint, one hash of recipe, settings and inputs, is the same when running the stage again would
make the same thing.
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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from chainforge.core.disk import replacing, to_disk
from chainforge.core.errors import InputError
from chainforge.core.paths import paths_in, unplaced
from chainforge.core.plugins import own_script, sources
from chainforge.core.secrets import redact

MANIFEST = "manifest.json"
STARTED = "stage.json"
PROGRESS = "progress.json"
UPLOAD = "upload.json"  # what of a signed stage is still to be sent, and where to
LOCK, HOLDER = ".lock", ".holder"
LOCK_SECONDS = 1.0  # who asks for the holder's name holds the lock for a moment, too

# Where a file is does not change what it contains: a fingerprint counts inputs by content instead.
_PATHS = (
    "config output_dir model_name_or_path teacher_model_name_or_path data models pool gate_pool"
)
# Speed, patience, budgets, trackers, uploads and kept checkpoints do not change the result: a stage
# that a limit or a full disk stopped resumes with another value of these.
_FREE = (
    "dry_run expected_tokens health health_rules hub_dataset_id hub_model_id hub_private "
    "hub_private_repo hub_strategy hub_token max_concurrency max_requests max_retries "
    "max_retry_after max_tokens_total max_usd max_zero_advantage_steps "
    "outage_timeout prices project push_to_hub report_to retry_wait run_name save_total_limit "
    "shutdown_timeout timeout trackio_bucket_id trackio_space_id trackio_static_space_id"
)
PATH_KEYS, FREE_KEYS = frozenset(_PATHS.split()), frozenset(_FREE.split())


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

    A file of the same size and time counts as the same unless `thorough`; one of another time, as
    in a copied run, is hashed.
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
        elif (thorough or now != signed) and _hash(path, *now, path.stat().st_ctime_ns) != digest:
            words.append(f"{name} is not what was signed: its contents changed")
    return words


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


@functools.lru_cache(maxsize=4096)
def _hash(path: Path, *state: int) -> str:
    """Hash a file, once per process while its state stays the same."""
    return sha256(path)


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


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
        temporary.write_text(redact(text) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; `InputError` names a file that is missing or holds something else."""
    value = _json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def read_shaped(path: Path, shape: Any, what: str) -> Any:
    """Read a JSON file that has a shape of `core.shapes`, with all that it holds beside it."""
    from chainforge.core.shapes import shaped

    value = _json(path)
    found = shaped(value, shape, path, what)
    return value if isinstance(found, dict) else found


def _json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def report_progress(
    directory: str | Path, done: int, total: int, unit: str, note: str = ""
) -> None:
    """Write how far a stage is, for whoever watches: `{done, total, unit, note}`."""
    value = {"done": done, "total": total, "unit": unit, "note": note}
    with replacing(Path(directory) / PROGRESS, durable=False) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")


def make_directory(directory: Path) -> None:
    """Make a directory, or the target of a link of its name."""
    try:
        directory.resolve().mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, RuntimeError) as error:  # in /proc; a link to itself
        raise InputError(
            f"{directory}: no folder can be made there ({error}); name another place, or correct "
            "the link"
        ) from None


@contextlib.contextmanager
def lock(directory: str | Path) -> Iterator[None]:
    """Hold a directory alone; a second holder gets an `InputError` that names the first.

    The kernel releases the lock when its holder dies, so no lock is ever stale.
    """
    directory = Path(directory)
    make_directory(directory)
    held = _acquire(directory, LOCK_SECONDS)
    if held is None:
        raise InputError(
            f"{directory} is in use by {_name(directory) or 'another process'}; wait for it, or "
            "give another directory"
        )
    with contextlib.ExitStack() as stack:
        stack.callback(held.release)
        name = directory / HOLDER
        stack.callback(name.unlink, missing_ok=True)
        name.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield


def holder(directory: str | Path) -> str | None:
    """Return who holds a directory just now (`process 12 on host`); None when nobody does."""
    directory = Path(directory)
    name = _name(directory)
    if name is None:  # a holder that ended in order has removed its name
        return None
    try:
        held = _acquire(directory, 0)
    except (OSError, InputError):  # read-only, as a run that was copied away may be
        return None
    if held is not None:
        held.release()  # its holder was killed
    return name if held is None else None


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
        return held.acquire(timeout=seconds, poll_interval=0.05).lock
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
        raise InputError(
            f"{directory}: its file system does not support locks ({error.strerror}); without "
            "them two runs could write the same files: give a directory on another disk"
        ) from None


def input_fingerprint(reference: str | Path, *, thorough: bool = False) -> str:
    """Return what an input is made of: a stage's fingerprint, a content hash, or a Hub id.

    A path inside a finished stage, such as its `model/`, has that stage's fingerprint, which is
    known before the stage has run. Raises `InputError` for a stage that is not finished, or whose
    files are not what it signed; `thorough` hashes all of them.
    """
    path = Path(reference)
    if not path.exists():
        return f"hub:{reference}"
    for directory in (path, path.parent):
        manifest = read_manifest(directory)
        if manifest is not None:
            part = "" if directory == path else path.name
            if damaged := damage(directory, manifest, part, thorough=thorough):
                raise InputError(
                    f"{directory}: {'; '.join(damaged[:3])}; run the stage again, or copy it again"
                )
            return manifest.fingerprint
        if (directory / STARTED).exists():
            raise InputError(f"{directory}: this stage is not finished; run it first")
    return sha256(path)


def fingerprint(
    recipe: str,
    given: Mapping[str, Any],
    inputs: Mapping[str, str],
    script: str | Path | None = None,
) -> str:
    """Hash what decides a stage's result: recipe, configuration without paths, inputs, code.

    `inputs` maps each input's role (`model`, `data.0`, `models.base`) to its `input_fingerprint`.
    Files that the configuration names (a reward's .py, a task's .jsonl) count by their content, and
    so do functions of modules, the local modules that any of these import, and a recipe `script`
    of one's own.
    """
    counted = _counted(given)
    files = list(paths_in(counted))
    content = {
        "recipe": recipe,
        "given": canonical(given),
        "inputs": dict(inputs),
        "files": [(path.name, sha256(path)) for path in files],
    }
    code = sources(script) if own_script(script) else {}
    for text in _texts(counted):
        code |= sources(text)
    if other := {name: sha256(path) for name, path in code.items() if path not in files}:
        content["code"] = other
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def canonical(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that count, without folders, numbers written one way (`1`, `"1.0"`)."""
    return {key: _number(value) for key, value in unplaced(_counted(given)).items()}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return which settings differ, in words: `learning_rate: 0.0001 -> 0.0002`."""
    before, after = canonical(old), canonical(new)
    return [
        f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _counted(given: Mapping[str, Any]) -> dict[str, Any]:
    left_out = PATH_KEYS | FREE_KEYS
    return {key: value for key, value in sorted(given.items()) if key not in left_out}


def _number(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _number(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_number(item) for item in value]
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
            return int(number) if number == int(number) else number
    return value


def _texts(value: Any) -> Iterator[str]:
    """Yield the values of a configuration that may name a file or a function."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
    elif isinstance(value, str) and 0 < len(value) < 1024 and "\n" not in value:
        yield value
