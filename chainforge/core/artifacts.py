"""Write and check what a stage leaves on disk: its manifest, its fingerprint and its lock.

A stage's directory is finished when it holds `manifest.json`, which is written last and whole. Its
fingerprint, one hash of recipe, settings and inputs, is the same when running the stage again would
make the same thing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.jsonl import replacing, to_disk
from chainforge.core.paths import paths_in, shipped, unplaced
from chainforge.core.secrets import redact

MANIFEST = "manifest.json"
STARTED = "stage.json"
PROGRESS = "progress.json"
UPLOAD = "upload.json"  # what of a signed stage is still to be sent, and where to
LOCK = ".lock"
LOCK_SECONDS = 1.0  # a process that asks for the holder's name takes the lock for a moment, too

# Where a file is does not change what it contains: a fingerprint counts inputs by content instead.
_PATHS = (
    "config output_dir model_name_or_path teacher_model_name_or_path data models pool gate_pool"
)
# Speed, patience, budgets, trackers, uploads and kept checkpoints do not change the result: a stage
# that a limit or a full disk stopped resumes with another value of these.
_FREE = (
    "dry_run expected_tokens health hub_dataset_id hub_model_id hub_private "
    "hub_private_repo hub_strategy hub_token max_concurrency max_requests max_retries "
    "max_tokens_total max_usd max_zero_advantage_steps "
    "outage_timeout prices project push_to_hub report_to run_name save_total_limit "
    "timeout trackio_bucket_id trackio_space_id trackio_static_space_id"
)
PATH_KEYS, FREE_KEYS = frozenset(_PATHS.split()), frozenset(_FREE.split())


@dataclass
class Manifest:
    """What a stage is made from; once it is finished, also what it made and measured."""

    recipe: str
    fingerprint: str
    given: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    seed: int = 0
    seconds: float = 0.0
    finished: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    states: dict[str, list[int]] = field(default_factory=dict)  # size and time of each output

    def write(self, directory: Path) -> None:
        """Sign the stage; from now on it counts as done."""
        self.finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(directory / MANIFEST, asdict(self))


def read_manifest(directory: str | Path, name: str = MANIFEST) -> Manifest | None:
    """Return the manifest of a finished stage, or None."""
    path = Path(directory) / name
    return shaped(path, read_json(path), Manifest) if path.is_file() else None


def sign_for(directory: Path, names: Iterable[str]) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Force files and their folders to disk; return a manifest's `outputs` and `states` of them."""
    outputs, states = {}, {}
    folders = {directory.resolve().parent, directory}
    for name in names:
        path = directory / name
        to_disk(path)
        outputs[name], states[name] = sha256(path), _state(path)
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
        elif (thorough or _state(path) != manifest.states.get(name)) and sha256(path) != digest:
            words.append(f"{name} is not what was signed: its contents changed")
    return words


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


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
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def shaped(path: Path, value: Any, shape: Any) -> Any:
    """Return a value of a JSON file as its `shape`; an `InputError` names the file and the place.

    Users edit these files, and other versions write them. Keys that a shape lacks are allowed.
    """
    import msgspec

    try:
        return msgspec.convert(value, shape)
    except (msgspec.ValidationError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is damaged, or not of this version: {error}") from None


@contextlib.contextmanager
def lock(directory: str | Path) -> Iterator[None]:
    """Lock a directory; a second process gets an `InputError` that names the holder.

    The kernel releases the lock when its holder dies, so no lock is ever stale.
    """
    Path(directory).resolve().mkdir(parents=True, exist_ok=True)
    with open(Path(directory) / LOCK, "a+", encoding="utf-8") as file:
        latest = time.monotonic() + LOCK_SECONDS
        while not locked(file.fileno()):
            if time.monotonic() > latest:
                file.seek(0)
                name = file.read().strip() or "another process"
                raise InputError(f"{directory} is in use by {name}; wait, or give another folder")
            time.sleep(0.05)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def locked(descriptor: int) -> bool:
    """Take the lock of an open file until it is closed; return whether it was free."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


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
    so do a recipe `script` of one's own, functions of modules, and what these import of local code.
    """
    return digest(fingerprinted(recipe, given, inputs, script))


def digest(content: Mapping[str, Any]) -> str:
    """Return the fingerprint of what `fingerprinted` returns."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def fingerprinted(
    recipe: str,
    given: Mapping[str, Any],
    inputs: Mapping[str, str],
    script: str | Path | None = None,
) -> dict[str, Any]:
    """Return what a fingerprint is made of; what does not count is left out."""
    from chainforge.core.plugins import sources

    counted = _counted(given)
    own = script is not None and Path(script).resolve().parent != shipped("recipes")
    code = sources(str(script)) if own else {}
    name = "" if code else recipe  # one's own script is known by its code
    for function in _functions(counted):
        code |= sources(function)
    return {
        "recipe": name,
        "given": canonical(given),
        "inputs": dict(inputs),
        "files": [(path.name, sha256(path)) for path in paths_in(counted)],
        "code": {name: sha256(path) for name, path in code.items()},
    }


def canonical(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that count, without folders, with 1.0 as 1."""
    text = json.dumps(unplaced(_counted(given)), default=str)

    def number(text: str) -> float:
        return int(value) if (value := float(text)).is_integer() else value

    return dict(json.loads(text, parse_float=number))


def _counted(given: Mapping[str, Any]) -> dict[str, Any]:
    left_out = PATH_KEYS | FREE_KEYS
    counted = {key: value for key, value in sorted(given.items()) if key not in left_out}
    if isinstance(rewards := counted.get("rewards"), list):  # a judge has such settings, too
        judges = [one for one in rewards if isinstance(one, dict) and one.get("fn") == "llm_judge"]
        counted["rewards"] = [
            one | {"params": _counted(one.get("params") or {})} if one in judges else one
            for one in rewards
        ]
    return counted


def _functions(value: Any) -> Iterator[str]:
    """Yield the values of a configuration that may name a function."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _functions(item)
    elif isinstance(value, str) and ":" in value and len(value) < 1024 and "\n" not in value:
        yield value
