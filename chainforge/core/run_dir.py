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

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from chainforge.core import artifacts
from chainforge.core.artifacts import MANIFEST, PROGRESS, STARTED, Manifest, shaped
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, read_rows
from chainforge.core.paths import short

DONE, STALE, RUNNING = "done", "stale", "running"
RESUMABLE, FAILED, PENDING = "resumable", "failed", "pending"
CHAIN, LOG = "chain.json", "log.txt"
ABLATION = "-ablation"  # after a run's name: the folder of what it is without its stages
# Any of these in a folder makes it a stage, when no chain.json lists the stages.
STAGE_FILES = (MANIFEST, STARTED, PROGRESS, "config.yaml", "metrics.jsonl", "samples.jsonl")
LOG_LINES = 20
LAST_BYTES = 65_536
# How `chainforge.core.process.run` ends a recipe that did not succeed.
OUTCOMES = {"error: ": FAILED, "failed: ": FAILED, "stopped: ": RESUMABLE}
# A trainer's numbers and bars, which metrics.jsonl and progress.json have too; libraries' warnings.
_NOISE = re.compile(
    r"\s*\{'[\w/.-]+': .*\}$|.*\d+%\|.*\||.*/lib/.*\.py:\d+: \w*Warning: |  warnings\.warn\("
    "|Failed to load CPU gemm"
)

# Shapes of JSON files: keys with `?` may be missing, and others than these are allowed.
Number = Annotated[float, Meta(ge=-1e18, le=1e18)]  # NaN is out of bounds, too
Count = Annotated[int, Meta(ge=0, le=10**18)]
Maybe = Number | None


def _shape(kinds: Mapping[str, Any]) -> Any:
    """Return the type of a mapping with these keys."""
    given = {k.rstrip("?"): NotRequired[v] if k[-1] == "?" else v for k, v in kinds.items()}
    return TypedDict("Mapping", given)  # type: ignore[misc, operator]


PROGRESS_SHAPE = _shape({"done": Number, "total": Number, "unit": str, "note?": str})
SPENDING = _shape({"usd": Maybe, "requests": Count, "tokens": Count})
_KEPT = {"in": Count, "kept": Count}
_MORE = {"prompts?": _shape(_KEPT) | None, "decontamination?": dict[str, Any] | None}
FUNNEL = _shape(_KEPT | {"dropped": dict[str, Count]} | _MORE)
_SHARE = _shape({"mean": Number, "low": Number, "high": Number})
_BOTH = {"strict": _SHARE | None, "lenient": _SHARE | None}  # None: no row has an answer
_AT_K = dict[str, Maybe]
_ROWS = _BOTH | {
    "n": Count, "format": Number, "tokens_mean": Maybe, "truncated": Number, "language?": Maybe,
    "tokens_per_solved?": Maybe, "reasoning_tokens_mean?": Maybe, "unjudged?": Count,
    "pass_at_1?": _SHARE, "pass_at_k?": _AT_K, "maj_at_k?": _AT_K,
}  # fmt: skip
_TASKS = {"tasks?": dict[str, _shape(_ROWS)], "macro?": _shape(_BOTH)}  # type: ignore[misc]
_GENERAL = {"general?": _shape(_ROWS), "rewards?": dict[str, _SHARE]}  # type: ignore[valid-type]
_MODEL = _shape(_ROWS | {"name": str} | _TASKS | _GENERAL)
_DIFFERENCE = {"from": str, "to": str} | dict.fromkeys(("difference", "low", "high", "p"), Number)
_DIFFERENCE["seconds?"] = Number  # what the stages take that an ablation leaves out
_REWARD_PAIR = _shape(_DIFFERENCE | {"reward": str, "n": Count})
RESULTS = _shape({
    "models": list[_MODEL], "pairs": list[_shape(_DIFFERENCE)],  # type: ignore[misc, valid-type]
    "reward_pairs?": list[_REWARD_PAIR], "settings?": dict[str, Any] | None,  # type: ignore[valid-type]
    "failed?": dict[str, str],
})  # fmt: skip

_TEXT = str | None
# What an export publishes beside a model: which files there are, and an evaluation's samples.
STATED = _shape({"version": str, "what": str, "stage": str, "files": dict[str, str]})
SETTINGS = _shape({
    "seed": int, "tasks": list[dict[str, Any]], "transcript": str, "system_prompt": str,
    "language": str, "sampling": dict[str, Any],
})  # fmt: skip
SAMPLE = _shape({
    "id": str, "prompt": list[dict[str, Any]], "task": str, "answer?": _TEXT, "verifier": str,
    "entry?": _TEXT | dict[str, Any], "model": str, "sample": Count, "completion": str,
    "tokens?": Count | None, "reasoning_tokens?": Count | None, "finish_reason?": _TEXT,
    "correct": bool | None, "lenient_correct": bool | None, "formatted": bool, "extracted": _TEXT,
    "rewards?": dict[str, Maybe],
})  # fmt: skip


def read_results(path: Path) -> dict[str, Any]:
    """Return an evaluation's results.json, with all that it has beside `RESULTS`."""
    return _checked(path, artifacts.read_json(path), RESULTS)


def _checked(path: Path, value: dict[str, Any], shape: Any) -> dict[str, Any]:
    """Return what a file holds, if it has the shape."""
    shaped(path, value, shape)
    return value


def holder(directory: str | Path) -> str | None:
    """Return who holds a directory just now (`process 12 on host`); None when nobody does."""
    try:
        with open(Path(directory) / artifacts.LOCK, encoding="utf-8") as file:
            free = artifacts.locked(file.fileno())
            return None if free else file.read().strip() or "another process"
    except OSError:
        return None


@dataclass(frozen=True)
class LogEnd:
    """The last lines of a log, the state that they mean (if any), and the message."""

    lines: list[str] = field(default_factory=list)
    outcome: str = ""
    message: str = ""


def read_log(path: Path) -> LogEnd:
    """Read the end of a log: the last attempt, without what a launcher adds after its message."""
    if not path.is_file():
        return LogEnd()
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - LAST_BYTES))
        text = file.read().decode("utf-8", "replace")
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    attempts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    lines = lines[attempts[-1] + 1 :] if attempts else lines
    outcome = message = ""
    for number in reversed(range(len(lines))):
        if mark := next((mark for mark in OUTCOMES if lines[number].startswith(mark)), ""):
            more = takewhile(lambda line: line.startswith("  "), lines[number + 1 :])
            said = [lines[number], *more]
            outcome, message = OUTCOMES[mark], "\n".join(said).removeprefix(mark)
            lines = [*lines[:number], *said]
            break
    shown = [line for line in lines if line and not _NOISE.match(line)]
    return LogEnd(shown[-LOG_LINES:], outcome, message)


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

    # What its files hold, each read when it is asked for.
    manifest = cached_property(lambda self: artifacts.read_manifest(self.directory))
    started = cached_property(lambda self: artifacts.read_manifest(self.directory, STARTED))
    results = cached_property(lambda self: self._json("results.json", RESULTS))
    funnel = cached_property(lambda self: self._json("funnel.json", FUNNEL))
    metrics = cached_property(lambda self: self._rows("metrics.jsonl"))
    health = cached_property(lambda self: self._rows("health.jsonl"))
    log = cached_property(lambda self: read_log(self.directory / LOG))

    @property
    def name(self) -> str:
        """Return the stage's name, which is its folder's."""
        return self.directory.name

    @property
    def samples(self) -> Path:
        """Return where the stage's scored rows are, if it has any."""
        return self.directory / "samples.jsonl"

    @property
    def config(self) -> str:
        """Return the resolved configuration as written."""
        path = self.directory / "config.yaml"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    @property
    def seconds(self) -> float | None:
        """Return how long a finished stage took."""
        return self.manifest.seconds if self.manifest else None

    @cached_property
    def progress(self) -> dict[str, Any]:
        """Return what the stage last reported: `done`, `total`, `unit`, `note`."""
        told = self._json(PROGRESS, PROGRESS_SHAPE) or {}
        return {"done": 0, "total": 0, "unit": "", "note": ""} | told

    @property
    def how_far(self) -> str:
        """Return how far an unfinished stage is: `12 of 40 steps`."""
        told = self.progress
        unknown = self.manifest or not told["total"]
        return "" if unknown else "{done:,} of {total:,} {unit}".format(**told)

    @property
    def share(self) -> float | None:
        """Return which share of its work a running stage has done."""
        done, total = self.progress["done"], self.progress["total"]
        return float(min(1.0, done / total)) if self.state == RUNNING and total else None

    @cached_property
    def spending(self) -> dict[str, Any]:
        """Return what a teacher cost, as the finished stage signed it."""
        spending = (self.manifest.metrics.get("spending") if self.manifest else None) or {}
        return spending and _checked(self.directory / MANIFEST, spending, SPENDING)

    def _json(self, name: str, shape: Any) -> dict[str, Any] | None:
        path = self.directory / name
        return _checked(path, artifacts.read_json(path), shape) if path.is_file() else None

    def _rows(self, name: str) -> list[Row]:
        path = self.directory / name
        return read_rows(path, torn_tail=True) if path.is_file() else []

    def unsigned_state(self) -> tuple[str, str]:
        """Return the state of a stage without a manifest, and what it would resume from."""
        if holder(self.directory):
            return RUNNING, ""
        resumes = self._resumes_from()
        if self.log.outcome == FAILED:
            return FAILED, resumes
        return (RESUMABLE, resumes) if resumes or self.log.outcome else (PENDING, "")

    def _resumes_from(self) -> str:
        numbers = [path.name[11:] for path in self.directory.glob("checkpoints/checkpoint-*")]
        if steps := [int(number) for number in numbers if number.isdigit()]:
            return f"from checkpoint {max(steps)}"
        rows = sum(p.read_bytes().count(b"\n") for p in self.directory.glob("samples*.jsonl"))
        return f"from {rows} rows" if rows else ""


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
    made = stage.manifest or stage.started
    if holder(stage.directory):
        return RUNNING, []
    if made is None:
        return PENDING, []
    if made.fingerprint != fingerprint:
        why = differences(made, given, inputs)
        aside = "an unfinished stage with different settings is set aside"
        return (STALE, why) if stage.manifest else (PENDING, [aside, *why])
    if stage.manifest:
        damaged = artifacts.damage(stage.directory, made, thorough=thorough)
        here = short(stage.directory)
        return (STALE, [f"{here}/{words}" for words in damaged]) if damaged else (DONE, [])
    state, resumes = stage.unsigned_state()
    return state, [resumes] if resumes else []


def differences(
    made: Manifest, given: Mapping[str, Any], inputs: Mapping[str, tuple[str, str]]
) -> list[str]:
    """Return which settings and inputs differ from those of a stage, in words."""
    words = changes(made.given, given)
    for role in sorted(made.inputs.keys() | inputs.keys()):
        old, (name, new) = made.inputs.get(role, "none"), inputs.get(role, ("its input", "none"))
        if old != new:
            words.append(f"{role}: {name} changed ({old[:8]} -> {new[:8]})")
    return words or ["code or a file that the settings name changed"]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return which settings differ, in words: `learning_rate: 0.0001 -> 0.0002`."""
    before, after = artifacts.canonical(old), artifacts.canonical(new)
    return [
        f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


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
        folders = [
            p for p in directory.iterdir() if any((p / one).is_file() for one in STAGE_FILES)
        ]
        stages = [StageDir(folder) for folder in folders]
        # "~" sorts after every date: what is unfinished comes last.
        stages.sort(key=lambda s: (s.manifest.finished if s.manifest else "~", s.name))
    if not stages:
        raise InputError(f"{directory} holds no stage; give the folder that holds a chain's stages")
    for stage in stages:
        made = stage.manifest or stage.started
        stage.recipe = stage.recipe or (made.recipe if made else "")
        stage.state, stage.note = (DONE, "") if stage.manifest else stage.unsigned_state()
    _mark_stale(stages)
    name = str(chain.get("name") or directory.resolve().name)
    return RunDir(name, stages, holder(directory) is not None)


def _listed(directory: Path, entry: Any) -> StageDir:
    """Return the stage that an entry of chain.json describes."""
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
        raise InputError(f"{directory / CHAIN}: each stage needs a folder's `name`; got {entry!r}")
    inputs = entry.get("inputs")
    inputs = {str(k): str(v) for k, v in inputs.items()} if isinstance(inputs, dict) else {}
    return StageDir(directory / name, str(entry.get("recipe") or ""), inputs, entry.get("gate"))


def _mark_stale(stages: list[StageDir]) -> None:
    """Name inputs by fingerprint where chain.json does not; mark what an old input made stale."""
    made = {stage.manifest.fingerprint: stage.name for stage in stages if stage.manifest}
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        begun = stage.manifest or stage.started
        prints: dict[str, str] = begun.inputs if begun else {}
        if not stage.inputs:
            stage.inputs = {
                r: made.get(v) or v.removeprefix("hub:")[:40] for r, v in prints.items()
            }
        for role, name in stage.inputs.items():
            source = by_name.get(name)
            if stage.state != DONE or source is None or role not in prints:
                continue
            if source.manifest is None or source.manifest.fingerprint != prints[role]:
                stage.state, stage.note = STALE, f"made from an earlier {name}"
