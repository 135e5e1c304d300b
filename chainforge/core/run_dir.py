"""Read what stages left on disk: state, inputs, progress, numbers, log. Nothing here writes.

`StageDir` reads one stage's directory and `read_run` a chain's. Each file is read when it is asked
for; one that is malformed is an `InputError` that names it. The states are the same everywhere:

* done: signed, and as it should be
* stale: signed, but its settings, inputs or files have changed since
* running: a process holds the directory
* failed: its log ends in an error
* resumable: unfinished, with checkpoints or rows to resume from
* pending: not started
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from chainforge.core import artifacts, shapes
from chainforge.core.artifacts import (
    MANIFEST,
    PROGRESS,
    STARTED,
    Manifest,
    changes,
    read_shaped,
)
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, read_rows
from chainforge.core.paths import short

DONE, STALE, RUNNING = "done", "stale", "running"
RESUMABLE, FAILED, PENDING = "resumable", "failed", "pending"
CHAIN, LOG = "chain.json", "log.txt"
# Any of these in a folder makes it a stage, when no chain.json lists the stages.
MARKS = (MANIFEST, STARTED, PROGRESS, "config.yaml", "metrics.jsonl", "samples.jsonl")
LOG_LINES = 20
LAUNCHER_LINES = 60  # more than a launcher's own traceback takes
LAST_BYTES = 65_536
# How `chainforge.core.process.run` ends a recipe that did not succeed.
OUTCOMES = {"error: ": FAILED, "failed: ": FAILED, "stopped: ": RESUMABLE}
# A trainer's numbers and bars, which metrics.jsonl and progress.json have too, and warnings of
# libraries to programmers.
_NOISE = re.compile(
    r"\s*\{'[\w/.-]+': .*\}$|.*\d+%\|.*\||.*\b(Future|Deprecation)Warning: |\s*warnings\.warn\("
)


@dataclass(frozen=True)
class LogEnd:
    """The last lines of a log, the state that they mean (if any), and the message."""

    lines: list[str] = field(default_factory=list)
    outcome: str = ""
    message: str = ""


def read_log(path: Path) -> LogEnd:
    """Read the end of a log, up to the message that ended the last attempt.

    What a launcher adds after that message, its own traceback, is left out.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return LogEnd()
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    attempts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    lines = lines[attempts[-1] + 1 :] if attempts else lines
    for number in range(len(lines) - 1, max(-1, len(lines) - LAUNCHER_LINES), -1):
        for mark, outcome in OUTCOMES.items():
            if lines[number].startswith(mark):
                more = takewhile(lambda line: line.startswith("  "), lines[number + 1 :])
                said = [lines[number], *more]
                message = "\n".join(said).removeprefix(mark)
                return LogEnd(_last([*lines[:number], *said]), outcome, message)
    return LogEnd(_last(lines))


def _last(lines: list[str]) -> list[str]:
    return [line for line in lines if line and not _NOISE.match(line)][-LOG_LINES:]


@dataclass
class StageDir:
    """One stage's directory; what is not there is None or empty.

    `inputs` maps roles (`model`, `data.0`, `models.base`) to names of stages and models. `note`
    explains the state. `gate` is what chain.json says of the stage's quality gate.
    """

    directory: Path
    recipe: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    gate: Any = None
    state: str = PENDING
    note: str = ""

    @property
    def name(self) -> str:
        """Return the stage's name, which is its folder's."""
        return self.directory.name

    @cached_property
    def manifest(self) -> Manifest | None:
        """Return what the stage signed; None while it is unfinished."""
        return artifacts.read_manifest(self.directory)

    @cached_property
    def started(self) -> dict[str, Any] | None:
        """Return what an unfinished stage is being made from."""
        return artifacts.read_started(self.directory)

    @property
    def made_from(self) -> dict[str, str]:
        """Return the fingerprints of its inputs by role, when it started."""
        if self.manifest:
            return self.manifest.inputs
        return dict((self.started or {}).get("inputs", {}))

    @cached_property
    def progress(self) -> dict[str, Any]:
        """Return what the stage last reported: `done`, `total`, `unit`, `note`."""
        told: dict[str, Any] = {}
        if (self.directory / PROGRESS).is_file():
            told = read_shaped(self.directory / PROGRESS, shapes.Progress, "a stage's progress")
        return {"done": 0, "total": 0, "unit": "", "note": ""} | told

    @property
    def how_far(self) -> str:
        """Return how far an unfinished stage is: `12 of 40 steps`."""
        if self.manifest or not self.progress["total"]:
            return ""
        return "{done:,} of {total:,} {unit}".format(**self.progress)

    @property
    def share(self) -> float | None:
        """Return which share of its work a running stage has done."""
        if self.state != RUNNING or not self.progress["total"]:
            return None
        return float(min(1.0, self.progress["done"] / self.progress["total"]))

    @property
    def seconds(self) -> float | None:
        """Return how long the stage took, or has taken up to its last report."""
        if self.manifest:
            return self.manifest.seconds
        begun, told = self.directory / STARTED, self.directory / PROGRESS
        if not (begun.is_file() and told.is_file()):
            return None
        seconds = told.stat().st_mtime - begun.stat().st_mtime
        return seconds if seconds >= 0 else None  # resumed, and no report since

    @cached_property
    def results(self) -> dict[str, Any] | None:
        """Return what an evaluation measured."""
        return self._json("results.json", shapes.Results, "an evaluation's results")

    @cached_property
    def funnel(self) -> dict[str, Any] | None:
        """Return where the rows of a data stage went."""
        return self._json("funnel.json", shapes.Funnel, "a data stage's funnel")

    @cached_property
    def metrics(self) -> list[Row]:
        """Return what the trainer logged."""
        return self._rows("metrics.jsonl")

    @cached_property
    def health(self) -> list[Row]:
        """Return which health rules fired."""
        return self._rows("health.jsonl")

    @cached_property
    def log(self) -> LogEnd:
        """Return the end of the log."""
        return read_log(self.directory / LOG)

    @cached_property
    def spending(self) -> dict[str, Any]:
        """Return what a teacher cost, as the finished stage signed it."""
        spending = (self.manifest.metrics.get("spending") if self.manifest else None) or {}
        if spending:
            where = self.directory / MANIFEST
            shapes.shaped(spending, shapes.Spending, where, "a manifest: its spending")
        return dict(spending)

    @property
    def samples(self) -> Path:
        """Return where the stage's scored rows are, if it has any."""
        return self.directory / "samples.jsonl"

    @property
    def config(self) -> str:
        """Return the resolved configuration as written."""
        path = self.directory / "config.yaml"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def _json(self, name: str, shape: Any, what: str) -> dict[str, Any] | None:
        path = self.directory / name
        return dict(read_shaped(path, shape, what)) if path.is_file() else None

    def _rows(self, name: str) -> list[Row]:
        path = self.directory / name
        return read_rows(path, torn_tail=True) if path.is_file() else []

    def resumes_from(self) -> str:
        """Return what an unfinished stage can resume from; empty when there is nothing."""
        numbers = [path.name[11:] for path in self.directory.glob("checkpoints/checkpoint-*")]
        if steps := [int(number) for number in numbers if number.isdigit()]:
            return f"from checkpoint {max(steps)}"
        rows = 0
        for samples in self.directory.glob("samples*.jsonl"):  # one for each process
            with open(samples, "rb") as file:
                rows += sum(1 for _ in file)
        return f"from {rows} rows" if rows else ""


def unsigned_state(stage: StageDir) -> tuple[str, str]:
    """Return the state of a stage without a manifest, and what it would resume from."""
    if artifacts.holder(stage.directory):
        return RUNNING, ""
    resumes = stage.resumes_from()
    if stage.log.outcome == FAILED:
        return FAILED, resumes
    return (RESUMABLE, resumes) if resumes or stage.log.outcome else (PENDING, "")


def compare(
    stage: StageDir,
    fingerprint: str,
    given: Mapping[str, Any],
    inputs: Mapping[str, tuple[str, str]],
    *,
    thorough: bool = False,
) -> tuple[str, list[str]]:
    """Return a stage's state, and why, against what it would be made from now.

    `inputs` maps each role to a name and a fingerprint. `thorough` hashes what a finished stage
    made; otherwise files of the same size and time count as unchanged.
    """
    if artifacts.holder(stage.directory):
        return RUNNING, []
    if manifest := stage.manifest:
        if manifest.fingerprint != fingerprint:
            return STALE, _changes(manifest.given, manifest.inputs, given, inputs)
        damaged = artifacts.damage(stage.directory, manifest, thorough=thorough)
        here = short(stage.directory)
        return (STALE, [f"{here}/{words}" for words in damaged]) if damaged else (DONE, [])
    if stage.started is None:
        return PENDING, []
    if stage.started["fingerprint"] == fingerprint:
        state, resumes = unsigned_state(stage)
        return state, [resumes] if resumes else []
    changed = _changes(stage.started["given"], stage.started["inputs"], given, inputs)
    return PENDING, ["an unfinished stage with different settings is set aside", *changed]


def _changes(
    old_given: Mapping[str, Any],
    old_inputs: Mapping[str, str],
    given: Mapping[str, Any],
    inputs: Mapping[str, tuple[str, str]],
) -> list[str]:
    """Return which settings and inputs differ."""
    words = changes(old_given, given)
    for role in sorted(old_inputs.keys() | inputs.keys()):
        old, (name, new) = old_inputs.get(role, ""), inputs.get(role, ("", ""))
        if not new:
            words.append(f"{role}: no longer an input")
        elif not old:
            words.append(f"{role}: {name} is a new input")
        elif old != new:
            words.append(f"{role}: {name} changed ({old[:8]} -> {new[:8]})")
    return words or ["code or a file that the settings name changed"]


@dataclass
class RunDir:
    """A chain's directory: its stages in the order in which they run."""

    name: str
    stages: list[StageDir]
    running: bool = False

    def last_results(self) -> StageDir | None:
        """Return the last stage that measured models."""
        return next((stage for stage in reversed(self.stages) if stage.results), None)


def read_run(directory: Path) -> RunDir:
    """Read `runs/<chain>`: the stages that chain.json lists, or else all folders by their age."""
    if not directory.is_dir():
        raise InputError(f"{directory}: no such run; give the folder that holds a chain's stages")
    chain: dict[str, Any] = {}
    if (directory / CHAIN).is_file():
        chain = artifacts.read_json(directory / CHAIN)
        if not isinstance(chain.get("stages"), list):
            raise InputError(f"{directory / CHAIN}: need an object with a list `stages`")
        stages = [_listed(directory, entry) for entry in chain["stages"]]
    else:
        folders = [path for path in directory.iterdir() if _is_stage(path)]
        stages = [StageDir(folder) for folder in folders]
        # "~" sorts after every date: what is unfinished comes last.
        stages.sort(key=lambda s: (s.manifest.finished if s.manifest else "~", s.name))
    if not stages:
        raise InputError(f"{directory} holds no stage; give the folder that holds a chain's stages")
    for stage in stages:
        made = stage.manifest.recipe if stage.manifest else (stage.started or {}).get("recipe", "")
        stage.recipe = stage.recipe or str(made)
        stage.state, stage.note = (DONE, "") if stage.manifest else unsigned_state(stage)
    _name_inputs(stages)
    name = str(chain.get("name") or directory.resolve().name)
    return RunDir(name, stages, artifacts.holder(directory) is not None)


def _listed(directory: Path, entry: Any) -> StageDir:
    """Return the stage that an entry of chain.json describes."""
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
        raise InputError(f"{directory / CHAIN}: each stage needs a folder's `name`; got {entry!r}")
    inputs = entry.get("inputs")
    inputs = {str(k): str(v) for k, v in inputs.items()} if isinstance(inputs, dict) else {}
    return StageDir(directory / name, str(entry.get("recipe") or ""), inputs, entry.get("gate"))


def _is_stage(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS)


def _name_inputs(stages: list[StageDir]) -> None:
    """Name inputs by fingerprint where chain.json does not; mark what an old input made stale."""
    made = {stage.manifest.fingerprint: stage.name for stage in stages if stage.manifest}
    for stage in stages:  # an evaluation names the models from outside, too
        for role, value in stage.made_from.items():
            if role.startswith("models."):
                made.setdefault(value, role.removeprefix("models."))
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        prints = stage.made_from
        if not stage.inputs:
            stage.inputs = {r: made.get(v) or _outside(r, v) for r, v in prints.items()}
        for role, name in stage.inputs.items():
            source = by_name.get(name)
            if stage.state != DONE or source is None or role not in prints:
                continue
            if source.manifest is None or source.manifest.fingerprint != prints[role]:
                stage.state, stage.note = STALE, f"made from an earlier {name}"


def _outside(role: str, fingerprint: str) -> str:
    """Name what no stage made: a Hub id, or a local model or file by its hash."""
    if fingerprint.startswith("hub:"):
        return fingerprint.removeprefix("hub:")
    return f"{role.partition('.')[0]} {fingerprint[:8]}"


def finished_in(folder: Path) -> Iterator[tuple[Path, Manifest]]:
    """Yield the finished stages in a folder, which may hold other things too."""
    for path in sorted(folder.iterdir()):
        # A manifest.json of some other program, or a folder that is not ours to read.
        with contextlib.suppress(InputError, OSError):
            if manifest := artifacts.read_manifest(path):
                yield path.resolve(), manifest
