"""Run a chain: skip what is done, make what is stale again, resume what was interrupted.

Each stage is a process of its own, so that no model stays in memory from one stage to the next.
What a stage had finished before is set aside while it is made again, and removed only when that has
succeeded.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from chainforge.chain.execute import STOPPED, StageFailed, execute
from chainforge.chain.plan import (
    Overrides,
    Step,
    chain_directory,
    plan_chain,
    plan_stage,
    read_sets,
)
from chainforge.chain.spec import Chain
from chainforge.core import artifacts, paths
from chainforge.core.errors import PAUSED, Failed, InputError, Stopped
from chainforge.core.run_dir import CHAIN, DONE, LOG, StageDir, read_log
from chainforge.hub.push import push_signed
from chainforge.report.formatting import duration
from chainforge.report.gates import judge

LINE_SECONDS = 30.0  # between reports of progress where there is no terminal to draw a bar on


class GateFailed(StageFailed):
    """A stage succeeded, and found a model that does not pass the stage's quality gate."""


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
    `GateFailed` when a model does not pass a gate, unless `ignore_gates`.
    """
    low, high = _range(chain, from_, until)
    overrides = Overrides(launch=launch, sets=read_sets(chain, sets), seed=seed)
    parent = chain_directory(chain, runs)
    display = _Display([stage.name for stage in chain.stages])
    ran: list[Step] = []
    gated = any(stage.gates for stage in chain.stages)  # and gates may have changed
    try:
        with artifacts.lock(parent):
            # The whole plan first, so that wrong input shows before any work is done.
            _describe(chain, parent, plan_chain(chain, runs, overrides))
            known = _taken_as_they_are(chain, parent, low, high)
            for stage in chain.stages[low : high + 1]:
                step = plan_stage(chain, stage, runs, known, overrides, thorough=True)
                if step.state != DONE or force:
                    ran.append(step)
                    _run_stage(step, display, force)
                else:
                    push_signed(step.directory)  # what a kill kept from being sent
                    display.line(stage.name, "done")
                known[stage.name] = _signed(step.directory)
                for aside in _asides(step.directory):  # also those of a run that was killed
                    aside.unlink() if aside.is_symlink() else shutil.rmtree(aside)
                _check_gates(step, display, ignore_gates)
    finally:
        if ran or gated:
            _write_report(parent, display)
    return ran


def _range(chain: Chain, first: str | None, last: str | None) -> tuple[int, int]:
    """Return the positions of the first stage to run and of the last, both included."""
    names = [stage.name for stage in chain.stages]
    low = names.index(chain.stage(first).name) if first else 0
    high = names.index(chain.stage(last).name) if last else len(names) - 1
    if low > high:
        raise InputError(f"--from {first} comes after --until {last}: there is nothing to run")
    return low, high


def _describe(chain: Chain, parent: Path, steps: list[Step]) -> None:
    """Write chain.json: the stages, what they are made from, and their gates."""
    stages = [
        {
            "name": step.stage.name,
            "recipe": Path(step.stage.recipe).stem,
            "inputs": {role: item.name for role, item in step.inputs.items()},
            "gate": [gate.as_given() for gate in step.stage.gates],
        }
        for step in steps
    ]
    artifacts.write_json(parent / CHAIN, {"name": chain.name, "stages": stages})


def _taken_as_they_are(chain: Chain, parent: Path, low: int, high: int) -> dict[str, str]:
    """Return the fingerprints of the stages before the first one to run."""
    earlier = {stage.name: StageDir(parent / stage.name) for stage in chain.stages[:low]}
    for stage in chain.stages[low : high + 1]:
        for name in stage.references:
            if (there := earlier.get(name)) is None:
                continue
            if there.manifest is None:
                raise InputError(
                    f"stage {stage.name} needs {name}, which is not done: --from {name}"
                )
            if damaged := artifacts.damage(there.directory, there.manifest, thorough=True):
                raise InputError(
                    f"stage {stage.name} needs {name}, of which {damaged[0]}: --from {name}"
                )
    return {name: there.manifest.fingerprint for name, there in earlier.items() if there.manifest}


def _check_gates(step: Step, display: _Display, ignore: bool) -> None:
    """Raise `GateFailed` when a stage's gates are not passed, unless they are to be ignored."""
    found = judge(step.stage.gates, step.directory)
    for words in found.passed:
        display.line(step.stage.name, f"gate passed: {words}")
    if found.failed and not ignore:
        raise GateFailed(
            f"stage {step.stage.name}: gate not passed: {'; '.join(found.failed)}. The chain stops "
            "here; --ignore-gates continues in spite of it"
        )
    for words in found.failed:
        display.line(step.stage.name, f"gate not passed, ignored: {words}")


def _run_stage(step: Step, display: _Display, force: bool) -> None:
    """Run one stage and check that it is signed."""
    name, directory = step.stage.name, step.directory
    if step.why:
        display.line(name, f"{step.state}: {'; '.join(step.why)}")
    if not _make_room(step, force):
        display.line(name, "done: what these settings made before is taken again")
        return
    directory.resolve().mkdir(parents=True, exist_ok=True)
    _write_report(directory.parent, display)
    started = time.monotonic()
    with display.stage(name, directory) as look:
        code = execute(step.command, directory / LOG, look)
    took, log = duration(time.monotonic() - started), paths.short(directory / LOG)
    end = read_log(directory / LOG)
    if code == 2:
        raise InputError(f"stage {name}: {end.message or f'see {log}'}")
    if code == PAUSED or code in STOPPED:  # not signed, and can be resumed
        display.line(name, f"stopped  {took}")
        raise Stopped(f"stage {name} {end.message or f'see {log}'}", code)
    if code != 0:
        display.line(name, f"failed  {took}")
        if not end.outcome:  # killed, or a recipe that reports nothing
            with open(directory / LOG, "a", encoding="utf-8") as file:
                file.write(f"\nfailed: {_ending(code)}\n")
        last = "\n".join(f"  {line}" for line in read_log(directory / LOG).lines)
        raise StageFailed(f"stage {name} {_ending(code)}. {log} ends:\n{last}")
    there = StageDir(directory)
    if there.manifest is None:
        raise StageFailed(f"stage {name} succeeded but left no manifest.json; see {log}")
    display.line(name, f"done  {took}  {there.progress['note']}".rstrip())


def _ending(code: int) -> str:
    """Return how a process ended."""
    if code >= 0:
        return f"failed with exit code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _signed(directory: Path) -> str:
    manifest = artifacts.read_manifest(directory)
    assert manifest is not None, f"{directory} was done a moment ago"
    return manifest.fingerprint


def _write_report(directory: Path, display: _Display) -> None:
    from chainforge.report.html import write_report

    try:
        write_report(directory)
    # A malformed file, or a full disk: the run itself reports what is wrong with it, if anything.
    except (InputError, Failed, OSError) as error:
        display.line("report", f"not written: {error}")


# Setting aside ------------------------------------------------------------------------------------


def _make_room(step: Step, force: bool) -> bool:
    """Set aside what the directory holds, unless the stage can resume from it.

    Return False when there is nothing to run: an earlier result, set aside since, was made from the
    very same settings and inputs, and is moved back.
    """
    there = StageDir(step.directory)
    begun = there.started and there.started["fingerprint"]
    if there.manifest is None and begun == step.fingerprint:
        return True
    earlier = None if force else _finished_before(step)
    if there.manifest or begun or (earlier and step.directory.exists()):
        _set_aside(step.directory)
    if earlier:
        earlier.rename(step.directory.resolve())
    return earlier is None


def _finished_before(step: Step) -> Path | None:
    """Return a directory, set aside, that holds what the step would make, undamaged."""
    for aside in _asides(step.directory):
        manifest = artifacts.read_manifest(aside)
        if manifest is None or manifest.fingerprint != step.fingerprint:
            continue
        if not artifacts.damage(aside, manifest, thorough=True):
            return aside
    return None


def _set_aside(directory: Path) -> None:
    """Rename a stage's directory to a free `<stage>.old-<n>`; of a link, what it leads to."""
    directory = directory.resolve()
    with artifacts.lock(directory):  # a process that works in it must not lose it
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


def _asides(directory: Path) -> Iterator[Path]:
    """Yield what was set aside of a stage."""
    directory = directory.resolve()
    name = re.compile(re.escape(directory.name) + r"\.old-\d+")
    for path in sorted(directory.parent.glob("*.old-*")):
        if name.fullmatch(path.name) and (path.is_dir() or path.is_symlink()):
            yield path


# What the terminal shows --------------------------------------------------------------------------


class _Display:
    """One bar for the running stage, one line for each that ended."""

    def __init__(self, names: list[str]) -> None:
        self.console = Console(highlight=False)
        self.width = max(map(len, names))

    def line(self, name: str, text: str) -> None:
        """Print one line about a stage."""
        self.console.print(f"{name:<{self.width}}  {text}", markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, directory: Path) -> Iterator[Callable[[], None]]:
        """Follow a stage; the function that this yields shows its progress once."""
        columns = (
            TextColumn(f"{escape(name):<{self.width}} "), BarColumn(bar_width=16),
            TaskProgressColumn(), TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
        )  # fmt: skip
        terminal = self.console.is_terminal
        bar = Progress(*columns, console=self.console, transient=True, disable=not terminal)
        task = bar.add_task("", total=None, note="starting")
        room = max(20, self.console.width - self.width - 33)
        started = told_at = time.monotonic()
        if not terminal:
            self.line(name, "running")

        def look() -> None:
            nonlocal told_at
            now = time.monotonic()
            if not terminal and now - told_at < LINE_SECONDS:
                return
            told_at = now
            try:
                told = StageDir(directory).progress
            except (OSError, InputError):
                return
            how_far = f"{told['done']}/{told['total']} {told['unit']}" if told["total"] else ""
            if terminal and how_far:
                note = (told["note"] or how_far)[:room]  # a longer line would push out the bar
                bar.update(task, completed=told["done"], total=told["total"], note=note)
            elif not terminal:
                words = (how_far, told["note"], duration(now - started))
                self.line(name, "  ".join(word for word in words if word))

        with bar:
            yield look
