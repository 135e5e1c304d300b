"""Find out what each stage is worth: leave out one at a time, and compare the final models.

A variant is a chain of its own in `RUNS/NAME-ablation/without_STAGE`: the stages that lead to its
final model, and an evaluation of that model on the rows of the whole chain's evaluation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from chainforge.chain.execute import StageFailed
from chainforge.chain.plan import chain_directory, plan_chain, settings_of
from chainforge.chain.run import run_chain
from chainforge.chain.spec import Chain, Stage
from chainforge.core.artifacts import read_manifest, write_json
from chainforge.core.errors import PAUSED, InputError, Stopped
from chainforge.core.jsonl import Row, read_rows
from chainforge.core.run_dir import ABLATION, DONE, StageDir, read_run
from chainforge.data.metrics import summarize
from chainforge.report.html import write_report
from chainforge.report.seeds import RESULTS

Found = dict[str, Any]


def ablate(chain: Chain, runs: Path, without: Sequence[str] = ()) -> Found:
    """Run a chain and its variants, or resume them; return `RUNS/NAME-ablation/results.json`.

    `without` names the stages to leave out; if empty, all that lead to the final model but
    `collect`. Raises what `run_chain` raises for the whole chain; a variant that fails is part of
    the result.
    """
    final, judge = _measured(chain)
    lineage = _lineage(chain, final)
    for stage in map(chain.stage, without):
        if stage not in lineage:
            names = ", ".join(one.name for one in lineage)
            raise InputError(f"--without {stage.name}: {final} is made without it, from {names}")
    run_chain(chain, runs, ignore_gates=True)
    whole, folder = chain_directory(chain, runs), runs / f"{chain.name}{ABLATION}"
    measured, seconds, failed = {final: _rows(whole / judge.name, final)}, {}, {}
    for name in without or [stage.name for stage in lineage if stage.recipe != "collect"]:
        try:
            variant, model, gone = _variant(chain, name, final, judge)
        except InputError as error:
            failed[f"without {name}"] = str(error)
            continue
        label = f"without {', '.join(gone)}"
        print(f"\n{label}:", flush=True)
        seconds[label] = sum(StageDir(whole / stage).seconds or 0 for stage in gone)
        there = chain_directory(variant, folder) if variant.stages else whole
        try:
            if variant.stages:
                share_stages(variant, folder, whole)
                run_chain(variant, folder, ignore_gates=True)
            measured[label] = _rows(there / judge.name, model)
        except (InputError, StageFailed, Stopped) as error:
            if isinstance(error, Stopped) and error.code != PAUSED:
                raise
            failed[label] = _reason(there, error)
            print(f"not measured: {failed[label]}", flush=True)
    made = StageDir(whole / judge.name)
    settings = (made.results or {}).get("settings", {})
    same = {key: settings[key] for key in ("seed", "language", "transcript") if key in settings}
    found = summarize(measured, [(label, final) for label in measured if label != final], **same)
    for pair in found["pairs"]:
        pair["seconds"] = seconds[pair["from"]]
    found |= {"settings": settings, "failed": failed}
    found["evaluation"] = made.manifest.fingerprint if made.manifest else ""
    write_json(folder / RESULTS, found)
    write_report(whole)
    return found


def share_stages(chain: Chain, runs: str | Path, whole: Path) -> None:
    """Link the stages that the run `whole` has finished from the same settings and inputs."""
    directory = chain_directory(chain, runs)
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():  # what was shared before may be another stage now
        if path.is_symlink() and path.resolve().parent == whole.resolve():
            path.unlink()
    for step in plan_chain(chain, runs):
        there = whole / step.stage.name
        made = read_manifest(there)
        if made and made.fingerprint == step.fingerprint and not step.directory.exists():
            step.directory.symlink_to(os.path.relpath(there, directory))


def _variant(chain: Chain, out: str, final: str, judge: Stage) -> tuple[Chain, str, list[str]]:
    """Return the chain without a stage, its final model, and the stages that it does not have.

    Stages that used the model of the one left out use that of `_start`, and stages that read its
    data do without; a stage with no data left is left out as well. The variant has no stages if
    the whole chain has measured its final model already.
    """
    place: dict[str | None, str | None] = {}  # what replaces the model of a stage that is left out
    rewired: list[Stage] = []
    for stage in chain.stages:
        data = tuple(name for name in stage.data if name not in place)
        if stage.name == out or (stage.data and not data and stage.recipe != "grpo"):
            start = _start(chain, stage)
            place[stage.name] = place.get(start, start)
            continue
        model, teacher = (place.get(name, name) for name in (stage.model, stage.teacher_model))
        rewired.append(replace(stage, data=data, model=model, teacher_model=teacher))
    model = place.get(final, final)
    if model is None:
        raise InputError(f"{final} starts from no model, so there is none to measure")
    kept = _lineage(replace(chain, stages=tuple(rewired)), model)
    names = {stage.name for stage in kept}
    gone = [stage.name for stage in _lineage(chain, final) if stage.name not in names]
    gone.sort(key=out.__ne__)  # the one that was asked for comes first
    if model in judge.models and all(stage in chain.stages for stage in kept):
        return replace(chain, stages=()), model, gone
    # Settings as in the whole chain, whose other evaluations decontaminate rows, too.
    kept = [replace(s, settings=settings_of(chain.stage(s.name), chain) | _unsent(s)) for s in kept]
    alone = judge.settings | ({"pairs": []} if judge.recipe == "evaluate" else {})
    kept.append(replace(judge, models=(model,), gate=None, settings=alone))
    return replace(chain, name=f"without_{out}", stages=tuple(kept)), model, gone


def _unsent(stage: Stage) -> dict[str, bool]:
    """Return what keeps a variant's stage from taking the place of the whole chain's on the Hub."""
    sends = stage.kind.trains or stage.recipe == "reject" or "push_to_hub" in stage.settings
    return {"push_to_hub": False} if sends else {}


def _start(chain: Chain, stage: Stage) -> str | None:
    """Return the model that replaces a stage which is left out: its own `model`.

    For SFT that restarts from the base on data of another model, it is that other model.
    """
    if stage.model not in {other.name for other in chain.stages}:
        above = _lineage(chain, stage.name)[:-1]
        for other in reversed(above):
            if "model" in other.kind.leaves and (other.model or other.kind.trains):
                return other.name
    return stage.model


def _lineage(chain: Chain, name: str) -> list[Stage]:
    """Return the stages that a stage is made from, and itself, in the order of the chain."""
    wanted, found = {name}, []
    for stage in reversed(chain.stages):
        if stage.name in wanted:
            wanted |= {other for _, other in stage.references}
            found.append(stage)
    return found[::-1]


def _measured(chain: Chain) -> tuple[str, Stage]:
    """Return the final model, which is RL's if there is RL, and the stage that measures it."""
    for stage in reversed(chain.stages):
        if made := [chain.stage(name) for name in stage.models if name not in chain.models]:
            rl = [one for one in made if one.recipe in ("grpo", "dpo")]
            return (rl or made)[-1].name, stage
    raise InputError(f"{chain.file}: no stage measures a model of the chain; add one of `evaluate`")


def _rows(directory: Path, model: str) -> list[Row]:
    return [row for row in read_rows(directory / "samples.jsonl") if row["model"] == model]


def _reason(directory: Path, error: Exception) -> str:
    """Return why a variant has no result: the message that ends the log of its last stage."""
    stages = [] if isinstance(error, InputError) else read_run(directory).stages
    said = [f"{s.name}: {s.log.message}" for s in stages if s.state != DONE and s.log.message]
    return said[0] if said else str(error)
