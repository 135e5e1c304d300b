"""Read what the stages of a chain left on disk, finished or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from chainforge.core import artifacts
from chainforge.core.artifacts import MANIFEST, PROGRESS, STARTED, Manifest, read_manifest
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.core.shapes import Progress
from chainforge.report import logs, transcripts
from chainforge.report.gates import Gate, Verdict, read_gates, verdict
from chainforge.report.lineage import name_inputs
from chainforge.report.readings import funnel_of, lines_of, results_of, spending_of

CHAIN = "chain.json"
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

    @cached_property
    def sources(self) -> list[dict[str, Any]]:
        """Who wrote its rows, as `transcripts.sources` counts them."""
        return transcripts.sources(self.samples)

    @property
    def how_far(self) -> str:
        """Return how far an unfinished stage is; empty where it has not said so."""
        if self.manifest or not self.progress.get("total"):
            return ""
        return "{done:,} of {total:,} {unit}".format(**self.progress)

    @property
    def share(self) -> float | None:
        """How much of an unfinished stage's work is done; None where it has not said so."""
        if self.manifest or not self.progress.get("total"):
            return None
        return float(min(1.0, self.progress["done"] / self.progress["total"]))

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
    if Path(name).name != name or "\0" in name:
        raise InputError(f"{chain / CHAIN}: the stage {name!r} names no folder here")
    directory = chain / name
    manifest = read_manifest(directory)
    begun = directory / STARTED
    made = vars(manifest) if manifest else artifacts.read_started(directory) or {}
    log = logs.ending(directory / "log.txt")
    given = entry.get("inputs")
    stage = StageEvidence(
        name=name,
        recipe=str(entry.get("recipe") or made.get("recipe", "")),
        directory=directory,
        state=str(entry.get("state") or _state(directory, manifest, log)),
        note=str(entry.get("note") or ""),
        inputs={str(k): str(v) for k, v in given.items()} if isinstance(given, dict) else {},
        manifest=manifest,
        metrics=lines_of(directory / "metrics.jsonl"),
        health=lines_of(directory / "health.jsonl"),
        spending=spending_of(directory, manifest),
        log=log,
        prints=made.get("inputs", {}),
    )
    if (directory / PROGRESS).is_file():
        told = artifacts.read_shaped(directory / PROGRESS, Progress, "a stage's progress")
        stage.progress = told
        if begun.is_file():
            seconds = (directory / PROGRESS).stat().st_mtime - begun.stat().st_mtime
            # Else it has only begun, or begun once more, and told nothing since.
            stage.elapsed = seconds if seconds >= 1 else None
    if (directory / "funnel.json").is_file():
        stage.funnel = funnel_of(directory / "funnel.json")
    if (directory / "results.json").is_file():
        stage.results = results_of(directory / "results.json")
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


def _state(directory: Path, manifest: Manifest | None, log: logs.Ending) -> str:
    """Tell done, running, failed, stopped, unfinished and not started apart."""
    if manifest:
        return "done"
    if not any((directory / mark).is_file() for mark in (*MARKS, "log.txt")):
        return "not started"
    if artifacts.holder(directory):
        return "running"
    return log.outcome or "unfinished"
