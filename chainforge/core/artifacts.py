"""What a stage leaves on disk, and how one knows that it is whole.

A stage's directory is finished when it holds `manifest.json`, which is written last and by
`os.replace`. The fingerprint says what the stage was made from, as in make: the same fingerprint
means that running it again would make the same thing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError

MANIFEST = "manifest.json"
STARTED = "stage.json"
PROGRESS = "progress.json"

# Where things lie says nothing of what they are: these keys stay out of a fingerprint, and what
# the inputs among them hold goes in through `inputs`.
PATH_KEYS = frozenset(
    {
        "config",
        "output_dir",
        "model_name_or_path",
        "teacher_model_name_or_path",
        "data",
        "models",
        "pool",
        "gate_pool",
        "logging_dir",
    }
)

# How fast, how patiently and at what cost answers are fetched says nothing of what they are, nor
# do who watches, where they are sent and how many checkpoints are kept: a stage that a budget, a
# rule of health, steps in vain or a full disk stopped goes on with another setting.
FREE_KEYS = frozenset(
    {
        "drain",
        "dry_run",
        "expected_tokens",
        "health",
        "health_rules",
        "hub_dataset_id",
        "hub_model_id",
        "hub_private",
        "hub_private_repo",
        "hub_strategy",
        "hub_token",
        "longest_wait",
        "max_concurrency",
        "max_idle_steps",
        "max_requests",
        "max_retries",
        "max_tokens_total",
        "max_usd",
        "nonfinite_rewards",
        "patience",
        "prices",
        "project",
        "report_to",
        "push_to_hub",
        "retry_wait",
        "run_name",
        "save_total_limit",
        "timeout",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
    }
)


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


def input_fingerprint(reference: str | Path) -> str:
    """Say what an input is made of: a stage's fingerprint, a content hash, or a Hub id.

    A path inside a finished stage (its `model/`, say) has that stage's fingerprint. Raises
    `InputError` for a stage that is not finished.
    """
    path = Path(reference)
    if not path.exists():
        return f"hub:{reference}"
    # Made from, not made of: the stage's fingerprint is known before the stage has run.
    for directory in (path, path.parent):
        manifest = read_manifest(directory)
        if manifest is not None:
            return manifest.fingerprint
        if (directory / STARTED).exists():
            raise InputError(f"{directory}: this stage is not finished; run it first")
    return sha256(path)


def fingerprint(recipe: str, given: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hash what decides a stage's result: recipe, configuration without paths, inputs.

    `inputs` maps each input's role (`model`, `data.0`, `models.base`) to its `input_fingerprint`.
    Files that the configuration names (a reward's .py, a task's .jsonl) count by their content.
    """
    settings = canonical(given)
    content = {
        "recipe": recipe,
        "given": settings,
        "inputs": dict(inputs),
        "files": {name: sha256(name) for name in sorted(set(_files(settings)))},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def canonical(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without paths, numbers written one way (`1e-4` is text in YAML)."""
    left_out = PATH_KEYS | FREE_KEYS
    return {key: _number(value) for key, value in sorted(given.items()) if key not in left_out}


def _number(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _number(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_number(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str | int | float):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
            return int(number) if number == int(number) else number
    return value


def _files(value: Any) -> Iterator[str]:
    """Yield the local files that a configuration names."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _files(item)
    elif isinstance(value, list):
        for item in value:
            yield from _files(item)
    elif isinstance(value, str) and 0 < len(value) < 1024 and "\n" not in value:
        name = value.partition(".py:")[0] + ".py" if ".py:" in value else value
        if Path(name).is_file():
            yield name


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say in words which settings differ: `learning_rate: 0.0001 -> 0.0002`."""
    before, after = canonical(old), canonical(new)
    return [
        f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


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
