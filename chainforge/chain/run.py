"""Run a chain: skip what is done, make what is stale again, resume what was interrupted.

Each stage is a process of its own, so that no model stays in memory from one stage to the next.
What a stage had finished before is set aside while it is made again, and removed only when that has
succeeded.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress

from chainforge.chain.execute import STOPPED, StageFailed, execute
from chainforge.chain.plan import Step, chain_directory, plan_chain, plan_stage
from chainforge.chain.spec import Chain, Stage
from chainforge.core import artifacts, paths
from chainforge.core.errors import PAUSED, Failed, InputError, Stopped
from chainforge.core.run_dir import CHAIN, DONE, LOG, StageDir, read_log
from chainforge.hub.push import push_signed
from chainforge.report.formatting import duration
from chainforge.report.gates import judge
from chainforge.report.html import write_report

LINE_SECONDS = 30.0  # between reports of progress where there is no terminal


class GateFailed(StageFailed):
    """A stage succeeded, but a model that it measured does not pass its quality gate."""


def run_chain(
    chain: Chain,
    runs: str | Path = "runs",
    *,
    from_: str | None = None,
    until: str | None = None,
    force: bool = False,
    ignore_gates: bool = False,
) -> None:
    """Bring the stages from `from_` to `until` up to date.

    Stages before `from_` are taken as they are. Raises `InputError` for wrong input, the chain's
    or a stage's, `StageFailed`, `Stopped` at a signal or when a stage reached its budget, or
    `GateFailed` when a model does not pass a gate, unless `ignore_gates`.
    """
    names = [stage.name for stage in chain.stages]
    low = names.index(chain.stage(from_).name) if from_ else 0
    high = names.index(chain.stage(until).name) if until else len(names) - 1
    if low > high:
        raise InputError(f"--from {from_} comes after --until {until}: there is nothing to run")
    parent = chain_directory(chain, runs)
    display = _Display(max(map(len, names)))
    # The whole plan first, so that wrong input shows before any work is done.
    steps = plan_chain(chain, runs)
    try:
        with artifacts.lock(parent):
            _describe(chain, parent, steps)
            known = _taken_as_they_are(chain, parent, low, high)
            for stage in chain.stages[low : high + 1]:
                step = plan_stage(chain, stage, runs, known, thorough=True)
                if step.state == DONE and not force:
                    push_signed(step.directory)  # what a kill kept from being sent
                    display.line(stage.name, "done")
                else:
                    _run_stage(step, display, force)
                known |= _signed([stage], parent)
                for aside in _asides(step.directory):  # also those of a run that was killed
                    shutil.rmtree(aside)
                _check_gates(step, display, ignore_gates)
    finally:
        _write_report(parent, display)


def _describe(chain: Chain, parent: Path, steps: list[Step]) -> None:
    """Write chain.json: the stages, what they are made from, and their gates."""
    stages = [
        {
            "name": step.stage.name,
            "recipe": Path(step.stage.recipe).stem,
            "inputs": {role: item.name for role, item in step.inputs.items()},
            "gate": step.stage.gate,
        }
        for step in steps
    ]
    artifacts.write_json(parent / CHAIN, {"name": chain.name, "stages": stages})


def _taken_as_they_are(chain: Chain, parent: Path, low: int, high: int) -> dict[str, str]:
    """Return the fingerprints of the stages before the first one to run."""
    needed = {name for stage in chain.stages[low : high + 1] for _, name in stage.references}
    for stage in chain.stages[:low]:
        if stage.name in needed and (why := _unfit(parent / stage.name)):
            raise InputError(f"stage {stage.name} is needed, but {why}: use --from {stage.name}")
    return _signed(chain.stages[:low], parent)


def _signed(stages: Sequence[Stage], parent: Path) -> dict[str, str]:
    manifests = {stage.name: artifacts.read_manifest(parent / stage.name) for stage in stages}
    return {name: manifest.fingerprint for name, manifest in manifests.items() if manifest}


def _unfit(directory: Path, fingerprint: str = "") -> str:
    """Return why a directory is no finished stage (with this fingerprint, if given), or ''."""
    manifest = artifacts.read_manifest(directory)
    if manifest is None or fingerprint not in ("", manifest.fingerprint):
        return "it is not done"
    return next(iter(artifacts.damage(directory, manifest, thorough=True)), "")


def _check_gates(step: Step, display: _Display, ignore: bool) -> None:
    """Raise `GateFailed` when a stage's gates are not passed, unless they are to be ignored."""
    found = judge(step.stage.gates, step.directory)
    for words in found.passed:
        display.line(step.stage.name, f"gate passed: {words}")
    if found.failed and not ignore:
        raise GateFailed(
            f"stage {step.stage.name}: gate not passed: {'; '.join(found.failed)} "
            "(--ignore-gates continues)"
        )
    for words in found.failed:
        display.line(step.stage.name, f"gate not passed, ignored: {words}")


def _run_stage(step: Step, display: _Display, force: bool) -> None:
    """Run one stage and check that it is signed."""
    name, directory = step.stage.name, step.directory
    if step.why:
        display.line(name, f"{step.state}: {'; '.join(step.why)}")
    if not _make_room(step, force):
        display.line(name, "done: an earlier result with these settings is used again")
        return
    directory.resolve().mkdir(parents=True, exist_ok=True)
    _write_report(directory.parent, display)
    started = time.monotonic()
    with display.following(name, directory) as look:
        on_cpu = step.given.get("use_cpu") is True
        code = execute(step.command, directory / LOG, look, on_cpu=on_cpu)
    took, log = duration(time.monotonic() - started), paths.short(directory / LOG)
    end = read_log(directory / LOG)
    if code == 2:
        raise InputError(f"stage {name}: {end.message or f'see {log}'}")
    if code == PAUSED or code in STOPPED:  # not signed, and can be resumed
        raise Stopped(f"stage {name} {end.message or f'see {log}'}", code)
    if code != 0:
        how = f"failed with exit code {code}"
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name} (out of memory?)"
        if not end.outcome:  # killed, or a recipe that reports nothing
            with open(directory / LOG, "a", encoding="utf-8") as file:
                file.write(f"\nfailed: {how}\n")
        last = "\n".join(f"  {line}" for line in read_log(directory / LOG).lines)
        raise StageFailed(f"stage {name} {how} after {took}. {log} ends:\n{last}")
    there = StageDir(directory)
    if there.manifest is None:
        raise StageFailed(f"stage {name} succeeded but left no manifest.json; see {log}")
    display.line(name, f"done  {took}  {there.progress['note']}".rstrip())


def _write_report(directory: Path, display: _Display) -> None:
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
    begun = there.started and there.started.fingerprint
    if there.manifest is None and begun == step.fingerprint:
        return True
    asides = [] if force else _asides(step.directory)
    earlier = next((path for path in asides if not _unfit(path, step.fingerprint)), None)
    if there.manifest or begun or (earlier and step.directory.exists()):
        _set_aside(step.directory)
    if earlier:
        earlier.rename(step.directory.resolve())
    return earlier is None


def _set_aside(directory: Path) -> None:
    """Rename a stage's directory to a free `<stage>.old-<n>`; of a link, what it leads to."""
    directory = directory.resolve()
    with artifacts.lock(directory):  # a process that works in it must not lose it
        number = 1
        while os.path.lexists(aside := directory.with_name(f"{directory.name}.old-{number}")):
            number += 1
        directory.rename(aside)


def _asides(directory: Path) -> Iterator[Path]:
    """Yield what was set aside of a stage."""
    directory = directory.resolve()
    name = re.compile(re.escape(directory.name) + r"\.old-\d+")
    for path in sorted(directory.parent.glob("*.old-*")):
        if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            yield path


# What the terminal shows --------------------------------------------------------------------------


class _Display:
    """A line for each stage that ended, and the running one's progress: on a terminal a bar."""

    def __init__(self, width: int) -> None:
        # Not what rich takes for one: a notebook shows plain lines, without widgets.
        terminal = sys.stdout.isatty()
        self.console = Console(highlight=False, force_jupyter=False, force_terminal=terminal)
        self.width = width

    def line(self, name: str, text: str) -> None:
        """Print one line about a stage."""
        self.console.print(f"{name:<{self.width}}  {text}", markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def following(self, name: str, directory: Path) -> Iterator[Callable[[], None]]:
        """Follow a stage; the function that this yields shows its progress once."""
        started = told_at = time.monotonic()
        terminal, left = self.console.is_terminal, _TimeLeft()
        if not terminal:
            self.line(name, "running")
        columns = ("{task.description}", BarColumn(20), "{task.fields[words]}")
        bar = Progress(*columns, console=self.console, transient=True, disable=not terminal)
        task = bar.add_task(escape(name), total=None, words="starting")

        def look() -> None:
            nonlocal told_at
            now = time.monotonic()
            if not terminal and now - told_at < LINE_SECONDS:
                return
            told_at = now
            with contextlib.suppress(OSError, InputError):
                there = StageDir(directory)
                done, total = there.progress["done"], there.progress["total"]
                words = [there.how_far, there.progress["note"], duration(now - started)]
                text = "  ".join(filter(None, [*words, left(done, total, now)]))
                if terminal:
                    bar.update(task, completed=done, total=total or None, words=escape(text))
                else:
                    self.line(name, text)

        with bar:
            yield look


class _TimeLeft:
    """Estimate how long a stage still takes, by what it has done since it began or resumed."""

    def __init__(self) -> None:
        self.begun = (-1.0, 0.0)  # how much was done, and when the next part of it began

    def __call__(self, done: float, total: float, now: float) -> str:
        """Return the time left in words; '' while nothing was done, and at the end."""
        if self.begun[0] < 0 or done <= self.begun[0]:
            self.begun = (done, now)
        if not self.begun[0] < done < total:
            return ""
        seconds = (now - self.begun[1]) / (done - self.begun[0]) * (total - done)
        return f"about {duration(seconds)} left"
