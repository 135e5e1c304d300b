"""Read what the stages of a chain left on disk, finished or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import (
    MANIFEST,
    PROGRESS,
    STARTED,
    Manifest,
    read_json,
    read_manifest,
)
from chainforge.core.errors import InputError
from chainforge.core.records import Row, read_rows

CHAIN = "chain.json"
LOG_LINES = 20
LAUNCHER_LINES = 60  # more than a launcher's own traceback takes
MODEL_KEYS = ("name", "n", "strict", "lenient", "format", "tokens_mean", "truncated")
PAIR_KEYS = ("from", "to", "difference", "low", "high", "p")
# As `chainforge.core.process.run` ends a recipe that did not end well.
ERRORS = ("error: ", "failed: ")
# Any of these in a folder makes it a stage, when no chain.json lists the stages.
MARKS = (MANIFEST, STARTED, PROGRESS, "config.yaml", "metrics.jsonl", "samples.jsonl")


@dataclass
class StageEvidence:
    """One stage's directory, read; what is not there is None or empty."""

    name: str
    recipe: str
    directory: Path
    state: str
    note: str = ""
    manifest: Manifest | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    funnel: dict[str, Any] | None = None
    results: dict[str, Any] | None = None
    config: str = ""
    log: list[str] = field(default_factory=list)

    def samples(self) -> list[Row]:
        """Read the stage's scored rows; a last line that is just being written is left out."""
        path = self.directory / "samples.jsonl"
        return read_rows(path, torn_tail=True) if path.is_file() else []


@dataclass
class ChainEvidence:
    """A chain's name and its stages, in the order in which they run."""

    name: str
    stages: list[StageEvidence]

    def last_results(self) -> StageEvidence | None:
        """Return the last stage that measured models, whose numbers stand for the chain."""
        return next((stage for stage in reversed(self.stages) if stage.results), None)


def read_chain(directory: Path, stages: Sequence[Mapping[str, Any]] | None = None) -> ChainEvidence:
    """Read `runs/<chain>`; `stages` (or chain.json) gives order and what is not there yet.

    Each entry has `name` and `recipe`, and may say `state` and `note` where the caller knows more
    than the files do (running, failed, stale). Without either, the folders count, in the order in
    which they finished.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such run; give the folder that holds a chain's stages")
    name, listed = directory.resolve().name, stages
    if (directory / CHAIN).is_file():
        chain = read_json(directory / CHAIN)
        if not isinstance(chain, dict) or not isinstance(chain.get("stages"), list):
            raise InputError(f"{directory / CHAIN}: need an object with a list `stages`")
        name = str(chain.get("name") or name)
        listed = chain["stages"] if stages is None else stages
    if listed is None:
        listed = _found(directory)
    if not listed:
        raise InputError(f"{directory} holds no stage; give the folder that holds a chain's stages")
    return ChainEvidence(name, [_read_stage(directory, entry) for entry in listed])


def _found(directory: Path) -> list[dict[str, Any]]:
    """List the stages by their folders: finished ones by time, then the others by name."""
    folders = [f for f in directory.iterdir() if any((f / mark).is_file() for mark in MARKS)]
    manifests = {folder: read_manifest(folder) for folder in folders}
    # "~" sorts after every date.
    folders.sort(key=lambda f: (m.finished if (m := manifests[f]) else "~", f.name))
    return [{"name": folder.name} for folder in folders]


def _read_stage(chain: Path, entry: Mapping[str, Any]) -> StageEvidence:
    try:
        name = str(entry["name"])
    except (KeyError, TypeError):
        raise InputError(f"{chain / CHAIN}: each stage needs a `name`; got {entry!r}") from None
    directory = chain / name
    manifest = read_manifest(directory)
    log = _tail(directory / "log.txt")
    stage = StageEvidence(
        name=name,
        recipe=str(entry.get("recipe") or _recipe(directory)),
        directory=directory,
        state=str(entry.get("state") or _state(directory, manifest, log)),
        note=str(entry.get("note") or ""),
        manifest=manifest,
        log=log,
    )
    if (directory / PROGRESS).is_file():
        stage.progress = _object(directory / PROGRESS, "done", "total", "unit")
    if (directory / "metrics.jsonl").is_file():
        stage.metrics = read_rows(directory / "metrics.jsonl", torn_tail=True)
    if (directory / "funnel.json").is_file():
        stage.funnel = _object(directory / "funnel.json", "in", "kept", "dropped")
    if (directory / "results.json").is_file():
        stage.results = _results(directory / "results.json")
    if (directory / "config.yaml").is_file():
        stage.config = (directory / "config.yaml").read_text(encoding="utf-8", errors="replace")
    return stage


def _recipe(directory: Path) -> str:
    """Return the recipe that a folder says it was, or is being, made by."""
    for name in (MANIFEST, STARTED):
        if (directory / name).is_file():
            return str(_object(directory / name, "recipe")["recipe"])
    return ""


def _state(directory: Path, manifest: Manifest | None, log: list[str]) -> str:
    """Tell done, failed (the log ends in an error), unfinished and not started apart."""
    if manifest:
        return "done"
    if not any((directory / mark).is_file() for mark in (*MARKS, "log.txt")):
        return "not started"
    return "failed" if any(line.startswith(ERRORS) for line in log) else "unfinished"


def _results(path: Path) -> dict[str, Any]:
    """Read an evaluation; a model or pair without its numbers is an `InputError`."""
    results = _object(path, "models", "pairs")
    for kind, keys in (("models", MODEL_KEYS), ("pairs", PAIR_KEYS)):
        for number, entry in enumerate(results[kind]):
            if missing := [key for key in keys if key not in entry]:
                raise InputError(f"{path}: {kind}[{number}] has no {', '.join(missing)}")
    return results


def _object(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object that has these keys."""
    value = read_json(path)
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise InputError(f"{path}: need a JSON object with the keys {', '.join(keys)}")
    return value


def _tail(path: Path) -> list[str]:
    """Return the end of a log as a terminal would show it, up to the error that ended it.

    What a launcher adds of its own after that error, its traceback, is left out.
    """
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 65_536))
        text = file.read().decode("utf-8", "replace")
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    for number in range(len(lines) - 1, max(-1, len(lines) - LAUNCHER_LINES), -1):
        if lines[number].startswith(ERRORS):
            end = number + 1
            while end < len(lines) and lines[end].startswith("  "):  # the message goes on
                end += 1
            lines = lines[:end]
            break
    return [line for line in lines if line][-LOG_LINES:]
