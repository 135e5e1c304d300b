"""Return what running a chain would do: each stage's command, its inputs, and whether it must run.

A stage's fingerprint is known before it has run, because it is a hash of what the stage is made
from. So the state of every stage is known at once: done, stale, resumable or to run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chainforge.chain import commands, handover
from chainforge.chain.chain import Chain
from chainforge.chain.stages import RECIPES, Stage, at
from chainforge.core import artifacts, paths
from chainforge.core.config import given
from chainforge.core.errors import InputError
from chainforge.report.gates import check_samples

DONE, STALE, RESUMABLE, TO_RUN = "done", "stale", "resumable", "to run"


@dataclass(frozen=True)
class Input:
    """What a stage takes: a stage's or model's name, where it lies, what it is made from."""

    name: str
    path: str
    fingerprint: str


@dataclass(frozen=True)
class Step:
    """A stage with everything that running it needs, and its state on disk."""

    stage: Stage
    directory: Path
    command: list[str]
    inputs: dict[str, Input]
    given: dict[str, Any]
    fingerprint: str
    state: str
    why: list[str]

    @property
    def shell(self) -> str:
        """The command as one line for a shell."""
        return commands.shell(self.command)


@dataclass(frozen=True)
class Overrides:
    """What the command line changes about a chain."""

    launch: str | None = None
    sets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int | None = None


def chain_directory(chain: Chain, runs: str | Path) -> Path:
    """Return where a chain's stages lie."""
    if Path(runs).exists() and not Path(runs).is_dir():
        raise InputError(f"--runs {runs}: a file; name the folder that holds the chains' results")
    return Path(runs) / chain.name


def plan_chain(chain: Chain, runs: str | Path, overrides: Overrides | None = None) -> list[Step]:
    """Plan every stage of a chain, in the order in which they run."""
    known: dict[str, str] = {}
    steps: list[Step] = []
    for stage in chain.stages:
        step = plan_stage(chain, stage, runs, known, overrides or Overrides())
        known[stage.name] = step.fingerprint
        steps.append(step)
    return steps


def plan_stage(
    chain: Chain,
    stage: Stage,
    runs: str | Path,
    known: dict[str, str],
    overrides: Overrides,
    *,
    thorough: bool = False,
) -> Step:
    """Plan one stage. `known` holds the fingerprints of the stages before it, and of models.

    `thorough` hashes what a finished stage made, and does not only look at sizes and times.
    """
    parent = chain_directory(chain, runs)
    directory = parent / stage.name
    with at(f"stage {stage.name}"):
        _check_place(directory)

    def settings(one: Stage) -> dict[str, Any]:
        return commands.settings_of(one, chain, overrides.sets, overrides.seed)

    places_of = commands.references(
        stage, chain, parent, lambda one: commands.settled(one, settings(one))
    )
    words = commands.recipe_words(stage, places_of, directory, settings(stage))
    script = paths.short(paths.recipe_script(stage.recipe, chain.folder))
    own = script if stage.recipe not in RECIPES else None
    inputs = {}
    for role, (name, path) in places_of.items():
        if name not in known:
            known[name] = artifacts.input_fingerprint(path, thorough=thorough)
        inputs[role] = Input(name, path, known[name])
    settled = given(words)
    with at(f"stage {stage.name}"):
        check_samples(stage.gates, settled)
    prints = {role: item.fingerprint for role, item in inputs.items()}
    fingerprint = artifacts.fingerprint(_recipe_name(stage, directory), settled, prints, own)
    state, why = _state(directory, fingerprint, settled, inputs, thorough)
    return Step(
        stage=stage,
        directory=directory,
        command=[*commands.launcher_words(stage, chain, overrides.launch), script, *words],
        inputs=inputs,
        given=settled,
        fingerprint=fingerprint,
        state=state,
        why=why,
    )


def _check_place(directory: Path) -> None:
    """Raise `InputError` for a place where no stage's directory can be."""
    if directory.is_dir():
        return
    try:
        place = directory.resolve()
    except (OSError, RuntimeError):  # which one depends on the version of Python
        raise InputError(f"{directory} is a link that leads to itself; remove it") from None
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{place} is a file where a folder belongs; move it away")


def _recipe_name(stage: Stage, directory: Path) -> str:
    """A built-in recipe's name; a user's own signs with a name that only it knows."""
    if stage.recipe in RECIPES:
        return stage.recipe
    if manifest := artifacts.read_manifest(directory):
        return manifest.recipe
    if started := artifacts.read_started(directory):
        return str(started["recipe"])
    return Path(stage.recipe).stem


def _state(
    directory: Path,
    fingerprint: str,
    settled: dict[str, Any],
    inputs: dict[str, Input],
    thorough: bool,
) -> tuple[str, list[str]]:
    """Compare what a directory was made from with what it would be made from now."""
    manifest = artifacts.read_manifest(directory)
    if manifest is not None:
        if manifest.fingerprint != fingerprint:
            return STALE, _changes(manifest.given, manifest.inputs, settled, inputs)
        damaged = artifacts.damage(directory, manifest, thorough=thorough)
        here = paths.short(directory)
        return (STALE, [f"{here}/{words}" for words in damaged]) if damaged else (DONE, [])
    started = artifacts.read_started(directory)
    if started is None:
        return TO_RUN, []
    if started["fingerprint"] == fingerprint:
        how_far = traces_of_work(directory)
        return (RESUMABLE, [how_far]) if how_far else (TO_RUN, [])
    changed = _changes(started["given"], started["inputs"], settled, inputs)
    return TO_RUN, ["an unfinished stage with other settings is set aside", *changed]


def _changes(
    old_given: dict[str, Any],
    old_inputs: dict[str, str],
    settled: dict[str, Any],
    inputs: dict[str, Input],
) -> list[str]:
    """Return which settings and inputs differ."""
    words = artifacts.changes(old_given, settled)
    for role in sorted(old_inputs.keys() | inputs.keys()):
        if role not in inputs:
            words.append(f"{role}: no longer an input")
        elif role not in old_inputs:
            words.append(f"{role}: {inputs[role].name} is a new input")
        elif old_inputs[role] != inputs[role].fingerprint:
            old, new = old_inputs[role][:8], inputs[role].fingerprint[:8]
            words.append(f"{role}: {inputs[role].name} changed ({old} -> {new})")
    return words or ["code or a file that the settings name changed"]


def traces_of_work(directory: Path) -> str:
    """Return what an unfinished stage has to go on from; empty when there is nothing."""
    checkpoints = [
        int(path.name.rpartition("-")[2])
        for path in (directory / "checkpoints").glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit()
    ]
    if checkpoints:
        return f"from checkpoint {max(checkpoints)}"
    rows = 0
    for samples in directory.glob(
        "samples*.jsonl"
    ):  # one for each process, while there are several
        with open(samples, "rb") as file:
            rows += sum(1 for _ in file)
    return f"from {rows} rows" if rows else ""


def contracts(step: Step) -> list[tuple[str, str]]:
    """Return where a stage starts and, in RL with a KL penalty, which policy it is held to."""
    lines: list[tuple[str, str]] = []
    model = step.inputs.get("model")
    if model is not None:
        lines.append(("starts from", f"{model.name}: {model.path}"))
        lines += handover.contract(step.stage, step.given, model.path)
    if kept := step.given.get("save"):
        lines.append(("saves", ", ".join(kept) if isinstance(kept, list) else str(kept)))
    teacher = step.inputs.get("teacher")
    if teacher is not None:
        lines.append(("teacher", f"{teacher.name}: {teacher.path}"))
    for role, item in step.inputs.items():
        if role.startswith("data."):
            lines.append(("data", f"{item.name}: {item.path}"))
    if step.stage.models:
        lines.append(("models", ", ".join(step.stage.models)))
    if step.stage.gates:
        lines.append(("gate", ", and ".join(map(str, step.stage.gates))))
    return lines


def to_json(chain: Chain, runs: str | Path, steps: Iterable[Step]) -> dict[str, Any]:
    """Return the plan for a machine to read."""
    return {
        "name": chain.name,
        "file": str(chain.file),
        "directory": str(chain_directory(chain, runs)),
        "stages": [
            {
                "name": step.stage.name,
                "recipe": step.stage.recipe,
                "state": step.state,
                "why": step.why,
                "directory": str(step.directory),
                "command": step.shell,
                "inputs": {role: vars(item) for role, item in step.inputs.items()},
                "given": step.given,
                "fingerprint": step.fingerprint,
                "contract": dict(contracts(step)),
            }
            for step in steps
        ],
    }


def as_text(chain: Chain, runs: str | Path, steps: list[Step]) -> str:
    """Return the plan for a person: every command on one line of its own, ready to paste."""
    blocks = [f"{chain.name}: {len(steps)} stages in {chain_directory(chain, runs)}"]
    for number, step in enumerate(steps, start=1):
        lines = [f"{number}. {step.stage.name} ({Path(step.stage.recipe).stem}): {step.state}"]
        lines += [f"   {'because' if step.state == STALE else 'note':<14}{why}" for why in step.why]
        lines += [f"   {label:<14}{text}" for label, text in contracts(step)]
        blocks.append("\n".join([*lines, step.shell]))
    return "\n\n".join(blocks)
