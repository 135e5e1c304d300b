"""Run a chain: skip what is done, make anew what is stale, go on with what was cut.

Each stage is a process of its own, because a model must never go from one stage to the next
alive. What a stage had finished before is set aside while it is made anew, and removed only when
that has succeeded.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from chainforge.chain import commands
from chainforge.chain.chain import Chain
from chainforge.chain.display import Display, read_progress, seconds_in_words
from chainforge.chain.execute import STOPPED, StageFailed, execute
from chainforge.chain.live import LiveReport
from chainforge.chain.plan import (
    DONE,
    RESUMABLE,
    STALE,
    Overrides,
    Step,
    chain_directory,
    plan_chain,
    plan_stage,
)
from chainforge.core import artifacts, paths
from chainforge.core.errors import PAUSED, InputError, Stopped
from chainforge.hub.export import push_signed
from chainforge.report import logs
from chainforge.report.gates import judge

LOG = "log.txt"


class GateShut(StageFailed):
    """A stage did what it should, and found a model that may not go on."""


def run_chain(
    chain: Chain,
    runs: str | Path = "runs",
    *,
    from_: str | None = None,
    until: str | None = None,
    force: bool = False,
    launch: str | None = None,
    sets: Iterable[str] = (),
    seed: int | None = None,
    ignore_gates: bool = False,
) -> list[Step]:
    """Bring the stages from `from_` to `until` up to date; return those that ran.

    Stages before `from_` are taken as they are. Raises `InputError` for wrong input, the chain's
    or a stage's, `StageFailed`, `Interrupted`, `Stopped` when a stage reached its budget, or
    `GateShut` when one found a model that may not go on, unless `ignore_gates`.
    """
    low, high = _range(chain, from_, until)
    overrides = Overrides(launch=launch, sets=commands.read_sets(chain, sets), seed=seed)
    parent = chain_directory(chain, runs)
    display = Display([stage.name for stage in chain.stages])
    report = LiveReport(parent, lambda text: display.line("report", text))
    ran: list[Step] = []
    judged = False
    try:
        with artifacts.lock(parent):
            # The whole plan first, so that wrong input shows before any work is done.
            _describe(chain, parent, plan_chain(chain, runs, overrides))
            known = _taken_as_they_are(chain, parent, low, high)
            judged = any(stage.gates for stage in chain.stages)  # and gates may have changed
            for stage in chain.stages[low : high + 1]:
                step = plan_stage(chain, stage, runs, known, overrides, thorough=True)
                if step.state != DONE or force:
                    ran.append(step)
                    _run_stage(step, display, report, force)
                else:
                    push_signed(step.directory)  # if a kill prevented it
                    display.line(stage.name, "done")
                known[stage.name] = _signed(step.directory)
                for aside in asides(step.directory):  # also those of a run that was cut
                    aside.unlink() if aside.is_symlink() else shutil.rmtree(aside)
                _pass_gates(step, display, ignore_gates)
    finally:
        if ran or judged:  # the page of a stage that failed is wanted most
            report.write()
    return ran


def _describe(chain: Chain, parent: Path, steps: list[Step]) -> None:
    """Leave word of the chain's stages and of what they are made from, for who looks at them."""
    stages = [
        {
            "name": step.stage.name,
            "recipe": Path(step.stage.recipe).stem,
            "inputs": {role: item.name for role, item in step.inputs.items()},
        }
        | ({"gate": [gate.as_given() for gate in step.stage.gates]} if step.stage.gates else {})
        for step in steps
    ]
    artifacts.write_json(parent / "chain.json", {"name": chain.name, "stages": stages})


def _pass_gates(step: Step, display: Display, ignore: bool) -> None:
    """Go on when a stage's gates are open, or are to be ignored; else raise `GateShut`."""
    if not step.stage.gates:
        return
    name = step.stage.name
    found = judge(step.stage.gates, step.directory)
    for words in found.opened:
        display.line(name, f"gate passed: {words}")
    if found.shut and not ignore:
        raise GateShut(
            f"stage {name}: gate not passed: {'; '.join(found.shut)}. The chain stops here; "
            "--ignore-gates goes on in spite of it"
        )
    for words in found.shut:
        display.line(name, f"gate not passed, ignored: {words}")


def _range(chain: Chain, first: str | None, last: str | None) -> tuple[int, int]:
    """Return the positions of the first stage to run and of the last, both included."""
    names = [stage.name for stage in chain.stages]
    low = names.index(chain.stage(first).name) if first else 0
    high = names.index(chain.stage(last).name) if last else len(names) - 1
    if low > high:
        raise InputError(f"--from {first} comes after --until {last}: there is nothing to run")
    return low, high


def _taken_as_they_are(chain: Chain, parent: Path, low: int, high: int) -> dict[str, str]:
    """Return the fingerprints of the stages before the first one to run."""
    known: dict[str, str] = {}
    for stage in chain.stages[:low]:
        manifest = artifacts.read_manifest(parent / stage.name)
        if manifest is not None:
            known[stage.name] = manifest.fingerprint
    earlier = {stage.name for stage in chain.stages[:low]}
    for stage in chain.stages[low : high + 1]:
        for name in stage.references:
            if name not in earlier:
                continue
            if name not in known:
                raise InputError(
                    f"stage {stage.name} needs {name}, which is not done: --from {name}"
                )
            manifest = artifacts.read_manifest(parent / name)
            if manifest and (damaged := artifacts.damage(parent / name, manifest, thorough=True)):
                raise InputError(
                    f"stage {stage.name} needs {name}, of which {damaged[0]}: --from {name}"
                )
    return known


def _run_stage(step: Step, display: Display, report: LiveReport, force: bool) -> None:
    """Run one stage and see that it is signed."""
    name, directory = step.stage.name, step.directory
    if step.state in (STALE, RESUMABLE) or step.why:
        display.line(name, f"{step.state}: {'; '.join(step.why)}")
    if not _make_room(step, force):
        display.line(name, "done: what these settings made before is taken again")
        return
    artifacts.make_directory(directory)
    started = time.monotonic()
    report.begin()
    with display.stage(name, directory) as look:

        def watch() -> None:
            look()
            report.look()

        code, text = execute(step.command, directory / LOG, watch)
    seconds = seconds_in_words(time.monotonic() - started)
    log = paths.short(directory / LOG)
    if code == 2:
        raise InputError(f"stage {name}: {logs.message(text) or f'see {log}'}")
    if code == PAUSED or code in STOPPED:  # not signed, and it goes on from there
        display.line(name, f"stopped  {seconds}")
        words = logs.message(text, "stopped: ") or f"see {log}"
        raise Stopped(f"stage {name} {words}", code)
    if code != 0:
        display.line(name, f"failed  {seconds}")
        if not logs.ending(directory / LOG).outcome:  # killed, or a recipe that says nothing
            with open(directory / LOG, "a", encoding="utf-8") as file:
                file.write(f"\nfailed: {ending(code)}\n")
        last = "\n".join(f"  {line}" for line in logs.ending(directory / LOG).lines)
        raise StageFailed(f"stage {name} {ending(code)}. {log} ends:\n{last}")
    if artifacts.read_manifest(directory) is None:
        raise StageFailed(f"stage {name} ended well but left no manifest.json; see {log}")
    display.line(name, f"done  {seconds}  {read_progress(directory)['note']}".rstrip())


def _make_room(step: Step, force: bool) -> bool:
    """Set aside what the directory holds, unless the stage can go on with it.

    False when there is nothing to run: an earlier result, set aside since, was made from the very
    same settings and inputs, and stands in its place again.
    """
    directory = step.directory
    finished = artifacts.read_manifest(directory) is not None
    started = artifacts.read_started(directory)
    begun = started and started["fingerprint"]
    if not finished and begun == step.fingerprint:
        return True
    earlier = None if force else _finished_before(step)
    if finished or begun or (earlier and directory.exists()):
        _set_aside(directory)
    if earlier:
        earlier.rename(directory.resolve())
    return earlier is None


def _finished_before(step: Step) -> Path | None:
    """Return a directory, set aside, that holds what the step would make, whole."""
    for aside in asides(step.directory):
        manifest = artifacts.read_manifest(aside)
        if manifest is None or manifest.fingerprint != step.fingerprint:
            continue
        if not artifacts.damage(aside, manifest, thorough=True):
            return aside
    return None


def _set_aside(directory: Path) -> None:
    """Rename a stage's directory to a free `<stage>.old-<n>`; of a link, what it leads to."""
    directory = directory.resolve()
    with artifacts.lock(directory):  # whoever works in it by hand must not lose it
        number = 1
        while os.path.lexists(aside := directory.with_name(f"{directory.name}.old-{number}")):
            number += 1
        try:
            directory.rename(aside)
        except OSError as error:  # a mount point, for one
            raise InputError(
                f"{directory} cannot be set aside as {aside.name} ({error.strerror}); move what it "
                "holds away, or delete it"
            ) from None


def asides(directory: Path) -> Iterator[Path]:
    """Yield what was set aside of a stage."""
    directory = directory.resolve()
    name = re.compile(re.escape(directory.name) + r"\.old-\d+")
    for path in sorted(directory.parent.glob("*.old-*")):
        if name.fullmatch(path.name) and (path.is_dir() or path.is_symlink()):
            yield path


def _signed(directory: Path) -> str:
    manifest = artifacts.read_manifest(directory)
    assert manifest is not None, f"{directory} was done a moment ago"
    return manifest.fingerprint


def ending(code: int) -> str:
    """Return how a process ended."""
    if code >= 0:
        return f"failed with exit code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
