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

from chainforge.core import artifacts
from chainforge.pipeline import logs, places
from chainforge.pipeline.chain import Chain
from chainforge.pipeline.display import read_progress, seconds_in_words
from chainforge.pipeline.plan import DONE, STALE, Step, chain_directory

RUNNING, FAILED, STOPPED = "running", "failed", "stopped"
STYLES = {
    DONE: "green",
    STALE: "yellow",
    RUNNING: "cyan",
    FAILED: "red",
    STOPPED: "yellow",
    "resumable": "cyan",
    "to run": "dim",
}
LOG_LINES = 8


def rows(steps: list[Step]) -> list[dict[str, Any]]:
    """Describe each stage by its state, its lineage and what it left.

    `state` is the plan's (done, stale, resumable, to run), or what its process is doing or came to
    (running, failed, stopped); `log` is the end of the log of the last two.
    """
    described = []
    for step in steps:
        manifest = artifacts.read_manifest(step.directory)
        state, log = _state(step)
        described.append(
            {
                "name": step.stage.name,
                "recipe": step.stage.recipe,
                "from": list(dict.fromkeys(item.name for item in step.inputs.values())),
                "state": state,
                "why": step.why,
                "directory": str(step.directory),
                "fingerprint": step.fingerprint,
                "signed": manifest.fingerprint if manifest else None,
                "seconds": manifest.seconds if manifest else _so_far(step.directory, state),
                "finished": manifest.finished if manifest else None,
                "metrics": manifest.metrics if manifest else {},
                "progress": read_progress(step.directory),
                "log": log,
            }
        )
    return described


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
    """Print the lineage, then why stages are stale, how failed ones ended, and who is at work."""
    described = rows(steps)
    console.print(table(chain, runs, described))
    if stale := [row for row in described if row["state"] == STALE]:
        console.print("stale, and made anew by the next run:")
        causes = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        for row in stale:
            causes.add_row(f"  {row['name']}", Text("\n".join(row["why"]), overflow="fold"))
        console.print(causes, "")
    for row in described:
        if row["log"]:
            log = places.short(Path(row["directory"]) / "log.txt")
            console.print(Text(f"{row['name']} {row['state']}; {log} ends:"))
            text = Text("\n".join(_end(row["log"])), overflow="fold")
            console.print(Padding(text, (0, 0, 1, 2)))
    if holder := artifacts.holder(chain_directory(chain, runs)):
        console.print(f"{holder} is running this chain", markup=False)


def _end(lines: list[str]) -> list[str]:
    """Return the last lines of a log; one that is very long, such as a prompt, is cut."""
    return [line if len(line) <= 400 else f"{line[:400]} …" for line in lines[-LOG_LINES:]]


def table(chain: Chain, runs: str | Path, described: list[dict[str, Any]]) -> Table:
    """Return the lineage as a table of at most 80 columns."""
    lineage = Table(
        title=escape(f"{chain.name} in {chain_directory(chain, runs)}"),
        box=SIMPLE_HEAD,
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
        style = STYLES[row["state"]]
        lineage.add_row(
            row["name"],
            Path(row["recipe"]).stem,
            escape(_made_from(row)),
            f"[{style}]{row['state']}[/{style}]",
            seconds_in_words(row["seconds"]) if row["seconds"] is not None else "-",
            escape(_remark(row)),
        )
    return lineage


def _made_from(row: dict[str, Any]) -> str:
    """Name what a stage was made from; of an evaluation's many models, how many."""
    names = row["from"]
    return f"{len(names)} models" if len(names) > 4 else ", ".join(names) or "-"


def _remark(row: dict[str, Any]) -> str:
    """Say how far a stage is, what it ended with, or why it must run; causes stand below."""
    told = row["progress"]
    how_far = f"{told['done']:,} of {told['total']:,} {told['unit']}" if told["total"] else ""
    if row["state"] == RUNNING:
        share = f"{told['done'] / told['total']:.0%}" if told["total"] else ""
        return ", ".join(word for word in (share, how_far, told["note"]) if word)
    if row["state"] == DONE:
        return str(told["note"])
    if row["state"] in (FAILED, STOPPED):
        return f"after {how_far}" if how_far else ""
    return "; ".join(row["why"])
