"""Show what a chain has made so far: each stage, what it was made from, and whether it holds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from chainforge.chain.chain import Chain
from chainforge.chain.display import read_progress, seconds_in_words
from chainforge.chain.plan import DONE, RESUMABLE, STALE, TO_RUN, Step, chain_directory
from chainforge.core import artifacts, paths
from chainforge.report import logs
from chainforge.report.gates import verdict
from chainforge.report.readings import funnel_of, results_of

RUNNING, FAILED, STOPPED, HELD = "running", "failed", "stopped", "held"
SHUT = "gate shut"  # as people read it; to a machine the stage is done, and its gate not passed
STYLES = {
    DONE: "green",
    STALE: "yellow",
    RUNNING: "cyan",
    FAILED: "red",
    STOPPED: "yellow",
    HELD: "yellow",
    SHUT: "red",
    RESUMABLE: "cyan",
    TO_RUN: "dim",
}
LOG_LINES = 8
CAUSES = 3  # of a stale stage, that the table names; below it they all stand, with their values


def rows(steps: list[Step]) -> list[dict[str, Any]]:
    """Describe each stage by its state, its lineage and what it left.

    `state` is the plan's (done, stale, resumable, to run), or what its process is doing or came to
    (running, failed, stopped); `log` is the end of the log of the last two. `gate` is what a done
    stage's gates found. A run would stop where they are shut: what has yet to run below is `held`,
    and `held_by` names the stage; while a run is at work, it has been told to go on.
    """
    at_work = bool(steps) and artifacts.holder(steps[0].directory.parent) is not None
    described = []
    shut = None
    for step in steps:
        row = _row(step)
        if shut and row["state"] in (TO_RUN, RESUMABLE, STALE):
            row["held_by"] = shut
            row["state"] = row["state"] if row["state"] == STALE else HELD
        if row["gate"] and not row["gate"]["passed"] and not at_work:
            shut = shut or row["name"]
        described.append(row)
    return described


def _row(step: Step) -> dict[str, Any]:
    manifest = artifacts.read_manifest(step.directory)
    state, log = _state(step)
    gate = verdict(step.stage.gates, step.directory) if state == DONE else None
    return {
        "name": step.stage.name,
        "recipe": step.stage.recipe,
        "from": list(dict.fromkeys(item.name for item in step.inputs.values())),
        "state": state,
        "why": step.why,
        "gate": gate and {"passed": gate.passed, "opened": gate.opened, "shut": gate.shut},
        "held_by": None,
        "directory": str(step.directory),
        "fingerprint": step.fingerprint,
        "signed": manifest.fingerprint if manifest else None,
        "seconds": manifest.seconds if manifest else _so_far(step.directory, state),
        "finished": manifest.finished if manifest else None,
        "metrics": manifest.metrics if manifest else {},
        "progress": read_progress(step.directory),
        "log": log,
    }


def _state(step: Step) -> tuple[str, list[str]]:
    """Return a stage's state, and the end of its log where it did not end well."""
    if artifacts.holder(step.directory):
        return RUNNING, []
    if step.state in (DONE, STALE):
        return step.state, []
    ending = logs.ending(step.directory / "log.txt")
    return (ending.outcome, ending.lines) if ending.outcome else (step.state, [])


def _so_far(directory: Path, state: str) -> float | None:
    """Return how long a running stage has been at it."""
    marker = directory / artifacts.STARTED
    if state != RUNNING or not marker.is_file():
        return None
    return max(0.0, time.time() - marker.stat().st_mtime)


def to_json(chain: Chain, runs: str | Path, steps: list[Step]) -> dict[str, Any]:
    """Return the chain's state for a machine to read."""
    directory = chain_directory(chain, runs)
    return {
        "name": chain.name,
        "file": str(chain.file),
        "directory": str(directory),
        "models": chain.models,
        "running": artifacts.holder(directory),
        "stages": rows(steps),
    }


def print_chain(chain: Chain, runs: str | Path, steps: list[Step], console: Console) -> None:
    """Print the lineage, then why it stops or is stale, how failed stages ended, who is at work."""
    described = rows(steps)
    console.print(table(chain, runs, described))
    _print_gates(described, console)
    if stale := [row for row in described if row["state"] == STALE]:
        console.print("stale, and made anew by the next run:")
        causes = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        for row in stale:
            causes.add_row(f"  {row['name']}", Text("\n".join(row["why"]), overflow="fold"))
        console.print(causes, "")
    for row in described:
        if row["log"]:
            log = paths.short(Path(row["directory"]) / "log.txt")
            console.print(Text(f"{row['name']} {row['state']}; {log} ends:"))
            text = Text("\n".join(_end(row["log"])), overflow="fold")
            console.print(Padding(text, (0, 0, 1, 2)))
    if holder := artifacts.holder(chain_directory(chain, runs)):
        console.print(f"{holder} is running this chain", markup=False)


def _print_gates(described: list[dict[str, Any]], console: Console) -> None:
    """Return which gates are shut, and what waits for them."""
    for row in described:
        if row["gate"] and not row["gate"]["passed"]:
            console.print(Text(f"{row['name']}: gate not passed"))
            text = Text("\n".join(row["gate"]["shut"]), overflow="fold")
            console.print(Padding(text, (0, 0, 0, 2)))
    held = [row for row in described if row["held_by"]]
    if held:
        names = ", ".join(row["name"] for row in held)
        verb = "wait" if len(held) > 1 else "waits"
        console.print(Text(f"{names} {verb}; --ignore-gates goes on in spite of it\n"))


def _end(lines: list[str]) -> list[str]:
    """Return the last lines of a log; one that is very long, such as a prompt, is cut."""
    return [line if len(line) <= 400 else f"{line[:400]} …" for line in lines[-LOG_LINES:]]


def table(chain: Chain, runs: str | Path, described: list[dict[str, Any]]) -> Table:
    """Return the lineage as a table of at most 80 columns."""
    lineage = Table(
        title=escape(f"{chain.name} in {chain_directory(chain, runs)}"),
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,  # 80 columns are few
        title_justify="left",
        title_style="bold",
    )
    lineage.add_column("stage", overflow="fold")
    lineage.add_column("recipe", overflow="fold")
    lineage.add_column("made from", overflow="fold", max_width=20)
    lineage.add_column("state", no_wrap=True)
    lineage.add_column("took", justify="right", no_wrap=True)
    lineage.add_column("", overflow="fold")
    for row in described:
        shut = row["gate"] and not row["gate"]["passed"]
        state = SHUT if shut else row["state"]
        style = STYLES[state]
        lineage.add_row(
            row["name"],
            Path(row["recipe"]).stem,
            escape(_made_from(row)),
            f"[{style}]{state}[/{style}]",
            seconds_in_words(row["seconds"]) if row["seconds"] is not None else "-",
            escape(_remark(row)),
        )
    return lineage


def _made_from(row: dict[str, Any]) -> str:
    """Name what a stage was made from; of an evaluation's many models, how many."""
    names = row["from"]
    return f"{len(names)} models" if len(names) > 4 else ", ".join(names) or "-"


def _remark(row: dict[str, Any]) -> str:
    """Return how far a stage is, what it ended with, or why it must run; causes stand below."""
    told = row["progress"]
    how_far = f"{told['done']:,} of {told['total']:,} {told['unit']}" if told["total"] else ""
    if row["state"] == RUNNING:
        share = f"{told['done'] / told['total']:.0%}" if told["total"] else ""
        return ", ".join(word for word in (share, how_far, told["note"]) if word)
    if row["state"] == DONE:
        return _came_to(row)
    if row["state"] == HELD:
        return "; ".join([f"by the gate of {row['held_by']}", *row["why"]])
    if row["state"] in (FAILED, STOPPED):
        return f"after {how_far}" if how_far else ""
    if row["state"] == STALE:
        changed = [why.partition(":")[0] for why in row["why"]]
        return ", ".join(changed[:CAUSES]) + (" …" if len(changed) > CAUSES else "")
    return "; ".join(row["why"])


def _came_to(row: dict[str, Any]) -> str:
    """Return what a done stage came to: rows kept, the best model, or what it said last."""
    directory = Path(row["directory"])
    if (directory / "funnel.json").is_file():
        funnel = funnel_of(directory / "funnel.json")
        return f"kept {funnel['kept']:,} of {funnel['in']:,}"
    if (directory / "results.json").is_file():
        models = results_of(directory / "results.json")["models"]
        best = max(models, key=lambda model: model["strict"]["mean"])
        return f"best: {best['name']} {best['strict']['mean']:.1%}"
    return str(row["progress"]["note"])
