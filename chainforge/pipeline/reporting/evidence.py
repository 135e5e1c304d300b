"""Read what the stages of a chain left on disk, finished or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chainforge.core import artifacts
from chainforge.core.artifacts import MANIFEST, PROGRESS, STARTED, Manifest, read_manifest
from chainforge.core.errors import InputError
from chainforge.core.records import Row, read_rows
from chainforge.pipeline import logs
from chainforge.pipeline.gates import Gate, Verdict, read_gates, verdict
from chainforge.pipeline.reporting.lineage import name_inputs
from chainforge.pipeline.reporting.rows import rows_of

CHAIN = "chain.json"
MODEL_KEYS = ("name", "n", "strict", "lenient", "format", "tokens_mean", "truncated")
PAIR_KEYS = ("from", "to", "difference", "low", "high", "p")
# Any of these in a folder makes it a stage, when no chain.json lists the stages.
MARKS = (MANIFEST, STARTED, PROGRESS, "config.yaml", "metrics.jsonl", "samples.jsonl")


@dataclass
class StageEvidence:
    """One stage's directory, read; what is not there is None or empty.

    `inputs` maps roles (`model`, `data.0`) to the names of stages and models.
    """

    name: str
    recipe: str
    directory: Path
    state: str
    note: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    prints: dict[str, str] = field(default_factory=dict)  # their fingerprints when it started
    manifest: Manifest | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    elapsed: float | None = None  # seconds from the start to the last word of progress
    metrics: list[Row] = field(default_factory=list)
    health: list[Row] = field(default_factory=list)
    spending: dict[str, Any] = field(default_factory=dict)
    funnel: dict[str, Any] | None = None
    results: dict[str, Any] | None = None
    config: str = ""
    log: logs.Ending = field(default_factory=logs.Ending)
    gate: Verdict | None = None
    held_by: str = ""

    @property
    def samples(self) -> Path:
        """Where the stage's scored rows are, if it has any."""
        return self.directory / "samples.jsonl"

    @property
    def how_far(self) -> str:
        """Say how far an unfinished stage is; empty where it has not said so."""
        if self.manifest or not self.progress.get("total"):
            return ""
        return "{done:,} of {total:,} {unit}".format(**self.progress)

    @property
    def seconds(self) -> float | None:
        """How long the stage took, or has taken so far."""
        return self.manifest.seconds if self.manifest else self.elapsed


@dataclass
class ChainEvidence:
    """A chain's name and its stages, in the order in which they run."""

    name: str
    stages: list[StageEvidence]
    running: bool = False

    def last_results(self) -> StageEvidence | None:
        """Return the last stage that measured models, whose numbers stand for the chain."""
        return next((stage for stage in reversed(self.stages) if stage.results), None)


def read_chain(directory: Path, stages: Sequence[Mapping[str, Any]] | None = None) -> ChainEvidence:
    """Read `runs/<chain>`; `stages` (or chain.json) gives order and what is not there yet.

    Each entry has `name` and `recipe`, and may say `inputs` (names by role), and `state` and `note`
    where the caller knows more than the files do. Without either, the folders count, in the order
    in which they finished.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such run; give the folder that holds a chain's stages")
    name, listed = directory.resolve().name, stages
    if (directory / CHAIN).is_file():
        chain = artifacts.read_json(directory / CHAIN)
        if not isinstance(chain, dict) or not isinstance(chain.get("stages"), list):
            raise InputError(f"{directory / CHAIN}: need an object with a list `stages`")
        name = str(chain.get("name") or name)
        listed = chain["stages"] if stages is None else stages
    if listed is None:
        listed = _found(directory)
    if not listed:
        raise InputError(f"{directory} holds no stage; give the folder that holds a chain's stages")
    read = [_read_stage(directory, entry) for entry in listed]
    name_inputs(read)
    running = artifacts.holder(directory) is not None
    _hold(read, running)
    return ChainEvidence(name, read, running)


def _hold(stages: Sequence[StageEvidence], running: bool) -> None:
    """Call `held` what has yet to run below a stage whose gates are shut: a run stops there.

    One that is at work has been told to go on, or has not come so far.
    """
    shut = None
    for stage in stages:
        if shut and stage.state in ("not started", "unfinished"):
            stage.state, stage.held_by = "held", shut
            stage.note = f"by the gate of {shut}"
        if stage.state != "done":
            stage.gate = None
        elif stage.gate and not stage.gate.passed and not running:
            shut = shut or stage.name


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
    log = logs.ending(directory / "log.txt")
    given = entry.get("inputs")
    stage = StageEvidence(
        name=name,
        recipe=str(entry.get("recipe") or _recipe(directory)),
        directory=directory,
        state=str(entry.get("state") or _state(directory, manifest, log)),
        note=str(entry.get("note") or ""),
        inputs={str(k): str(v) for k, v in given.items()} if isinstance(given, dict) else {},
        manifest=manifest,
        metrics=_lines(directory / "metrics.jsonl"),
        health=_lines(directory / "health.jsonl"),
        spending=_spending(directory, manifest),
        log=log,
        prints=manifest.inputs if manifest else _started(directory),
    )
    if (directory / PROGRESS).is_file():
        stage.progress = _object(directory / PROGRESS, "done", "total", "unit")
        if (directory / STARTED).is_file():
            started, told = ((directory / name).stat().st_mtime for name in (STARTED, PROGRESS))
            stage.elapsed = max(0.0, told - started)
    if (directory / "funnel.json").is_file():
        stage.funnel = _object(directory / "funnel.json", "in", "kept", "dropped")
    if (directory / "results.json").is_file():
        stage.results = _results(directory / "results.json")
    if stage.state == "done":
        stage.gate = verdict(_gates(chain, entry, stage.inputs), directory)
    if (directory / "config.yaml").is_file():
        stage.config = (directory / "config.yaml").read_text(encoding="utf-8", errors="replace")
    return stage


def _gates(chain: Path, entry: Mapping[str, Any], inputs: Mapping[str, str]) -> tuple[Gate, ...]:
    """Read the gates that chain.json tells of a stage."""
    models = [role.removeprefix("models.") for role in inputs if role.startswith("models.")]
    try:
        return read_gates(entry.get("gate"), models)
    except InputError as error:
        raise InputError(f"{chain / CHAIN}: stage {entry['name']}: {error}") from None


def _recipe(directory: Path) -> str:
    """Return the recipe that a folder says it was, or is being, made by."""
    for name in (MANIFEST, STARTED):
        if (directory / name).is_file():
            return str(_object(directory / name, "recipe")["recipe"])
    return ""


def _started(directory: Path) -> dict[str, str]:
    """Return the fingerprints that an unfinished stage is being made from."""
    path = directory / STARTED
    prints = _object(path).get("inputs") if path.is_file() else None
    return prints if isinstance(prints, dict) else {}


def _state(directory: Path, manifest: Manifest | None, log: logs.Ending) -> str:
    """Tell done, running, failed, stopped, unfinished and not started apart."""
    if manifest:
        return "done"
    if not any((directory / mark).is_file() for mark in (*MARKS, "log.txt")):
        return "not started"
    if artifacts.holder(directory):
        return "running"
    return log.outcome or "unfinished"


def _spending(directory: Path, manifest: Manifest | None) -> dict[str, Any]:
    """Return what a teacher cost: as signed, or as the account of an unfinished stage has it."""
    if manifest:
        spending = manifest.metrics.get("spending")
        return spending if isinstance(spending, dict) else {}
    account = directory / "requests.jsonl"
    if not account.is_file():
        return {}
    sent, told = 0, []
    for _, line in rows_of(account):
        if "outcome" not in line:
            sent += 1
        elif line.get("told"):
            told.append(line)
    prices = [line.get("usd") for line in told]
    return {
        "requests": sent,
        "tokens": sum(line.get("tokens") or 0 for line in told),
        "usd": None if None in prices else sum(price for price in prices if price),
        "untold_requests": sent - len(told),
    }


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
    value = artifacts.read_json(path)
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise InputError(f"{path}: need a JSON object with the keys {', '.join(keys)}")
    return value


def _lines(path: Path) -> list[Row]:
    """Read a file of JSON lines; a last line that is just being written is left out."""
    return read_rows(path, torn_tail=True) if path.is_file() else []
