"""Show what a chain has made so far: each stage, what it was made from, and whether it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from chainforge.chain.plan import Step, chain_directory
from chainforge.chain.spec import Chain
from chainforge.core import artifacts, paths
from chainforge.core.run_dir import DONE, FAILED, LOG, PENDING, RESUMABLE, RUNNING, STALE, StageDir
from chainforge.report.formatting import duration
from chainforge.report.gates import verdict

STYLES = {DONE: "green", STALE: "yellow", RUNNING: "cyan", FAILED: "red", RESUMABLE: "cyan",
          PENDING: "dim"}  # fmt: skip
LOG_LINES = 8
REASONS = 3  # of a stale stage, that the table names; all of them are listed below it


def rows(steps: list[Step]) -> list[dict[str, Any]]:
    """Describe each stage by its state, its lineage and what it left.

    `log` is the end of the log of a stage that failed or was stopped. `gate` is what a done stage's
    quality gates found.
    """
    return [_row(step) for step in steps]


def _row(step: Step) -> dict[str, Any]:
    there = StageDir(step.directory, state=step.state)
    gate = verdict(step.stage.gates, step.directory) if step.state == DONE else None
    ended = step.state in (FAILED, RESUMABLE) and there.log.outcome
    return {
        "name": step.stage.name,
        "recipe": step.stage.recipe,
        "from": list(dict.fromkeys(item.name for item in step.inputs.values())),
        "state": step.state,
        "why": step.why,
        "gate": gate and vars(gate),
        "directory": str(step.directory),
        "fingerprint": step.fingerprint,
        "signed": there.manifest.fingerprint if there.manifest else None,
        "seconds": there.seconds,
        "finished": there.manifest.finished if there.manifest else None,
        "metrics": there.manifest.metrics if there.manifest else {},
        "progress": there.progress,
        "log": there.log.lines if ended else [],
        "remark": _remark(there, step.why),
    }


def _remark(there: StageDir, why: list[str]) -> str:
    """Return how far a stage is, what it came to, or why it must run."""
    if there.state == RUNNING:
        share = f"{there.share:.0%}" if there.share is not None else ""
        return ", ".join(filter(None, (share, there.how_far, there.progress["note"])))
    if there.state == DONE:
        if there.funnel:
            return f"kept {there.funnel['kept']:,} of {there.funnel['in']:,}"
        if there.results and there.results["models"]:
            best = max(there.results["models"], key=lambda model: model["strict"]["mean"])
            return f"best: {best['name']} {best['strict']['mean']:.1%}"
        return str(there.progress["note"])
    if there.state == FAILED:
        return f"after {there.how_far}" if there.how_far else ""
    if there.state == STALE:
        changed = [reason.partition(":")[0] for reason in why]
        return ", ".join(changed[:REASONS]) + (" …" if len(changed) > REASONS else "")
    return "; ".join(why)


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
    """Print the lineage, then failed gates, stale stages' reasons, ends of logs, who runs it."""
    described = rows(steps)
    console.print(_table(chain, runs, described))
    for row in described:
        if row["gate"] and row["gate"]["failed"]:
            console.print(Text(f"{row['name']}: gate not passed; --ignore-gates continues anyway"))
            _indented(console, row["gate"]["failed"])
    if stale := [row for row in described if row["state"] == STALE]:
        console.print("stale, and made again by the next run:")
        reasons = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        for row in stale:
            reasons.add_row(f"  {row['name']}", Text("\n".join(row["why"]), overflow="fold"))
        console.print(reasons, "")
    for row in described:
        if row["log"]:
            log = paths.short(Path(row["directory"]) / LOG)
            console.print(Text(f"{row['name']} {row['state']}; {log} ends:"))
            # A line that is very long, such as a prompt, is cut.
            lines = [line if len(line) <= 400 else f"{line[:400]} …" for line in row["log"]]
            _indented(console, lines[-LOG_LINES:])
    if holder := artifacts.holder(chain_directory(chain, runs)):
        console.print(f"{holder} is running this chain", markup=False)


def _indented(console: Console, lines: list[str]) -> None:
    console.print(Padding(Text("\n".join(lines), overflow="fold"), (0, 0, 1, 2)))


def _table(chain: Chain, runs: str | Path, described: list[dict[str, Any]]) -> Table:
    """Return the lineage as a table of at most 80 columns."""
    title = escape(f"{chain.name} in {chain_directory(chain, runs)}")
    lineage = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
                    title_justify="left", title_style="bold")  # fmt: skip
    lineage.add_column("stage", overflow="fold")
    lineage.add_column("recipe", overflow="fold")
    lineage.add_column("made from", overflow="fold", max_width=20)
    lineage.add_column("state", no_wrap=True)
    lineage.add_column("took", justify="right", no_wrap=True)
    lineage.add_column("", overflow="fold")
    for row in described:
        names = row["from"]
        lineage.add_row(
            row["name"],
            Path(row["recipe"]).stem,
            escape(f"{len(names)} models" if len(names) > 4 else ", ".join(names) or "-"),
            Text(row["state"], STYLES[row["state"]]),
            duration(row["seconds"]),
            escape("gate not passed" if row["gate"] and row["gate"]["failed"] else row["remark"]),
        )
    return lineage
