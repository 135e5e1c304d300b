"""Show a chain's state: each stage, what it was made from, and whether it is up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from chainforge.chain.plan import Step, chain_directory
from chainforge.chain.spec import Chain
from chainforge.core.run_dir import (
    DONE,
    FAILED,
    PENDING,
    RESUMABLE,
    RUNNING,
    STALE,
    StageDir,
    holder,
)
from chainforge.report.formatting import duration, headline
from chainforge.report.gates import judge

STYLES = {DONE: "green", STALE: "yellow", RUNNING: "cyan", FAILED: "red", RESUMABLE: "cyan",
          PENDING: "dim"}  # fmt: skip
LOG_LINES, LINE_CHARACTERS = 8, 400  # of a log's end


def to_json(chain: Chain, runs: str | Path, steps: list[Step]) -> dict[str, Any]:
    """Return the chain's state for a machine to read.

    `log` is the end of the log of a stage that failed or was stopped. `gate` is what a done stage's
    quality gates found.
    """
    directory = chain_directory(chain, runs)
    return {
        "name": chain.name,
        "file": chain.file,
        "directory": str(directory),
        "models": chain.models,
        "running": holder(directory),
        "stages": [_row(step) for step in steps],
    }


def _row(step: Step) -> dict[str, Any]:
    there = StageDir(step.directory, state=step.state)
    gated = step.stage.gates and step.state == DONE
    signed = there.manifest
    return {
        "name": step.stage.name,
        "recipe": step.stage.recipe,
        "from": list(dict.fromkeys(item.name for item in step.inputs.values())),
        "state": step.state,
        "why": step.why,
        "gate": vars(judge(step.stage.gates, step.directory)) if gated else None,
        "directory": str(step.directory),
        "fingerprint": step.fingerprint,
        "signed": signed.fingerprint if signed else None,
        "seconds": there.seconds,
        "finished": signed.finished if signed else None,
        "metrics": signed.metrics if signed else {},
        "progress": there.progress,
        "log": there.log.lines if step.state in (FAILED, RESUMABLE) and there.log.outcome else [],
        "remark": headline(there),
    }


def print_chain(chain: Chain, runs: str | Path, steps: list[Step], console: Console) -> None:
    """Print the lineage, then why stages must run or failed, and who runs the chain."""
    shown = to_json(chain, runs, steps)
    table = Table(title=escape(f"{chain.name} in {shown['directory']}"), box=SIMPLE_HEAD,
                  pad_edge=False, collapse_padding=True, title_justify="left")  # fmt: skip
    for column in ("stage", "recipe", "made from", "state", "took", ""):
        table.add_column(column, overflow="fold", no_wrap=column in ("state", "took"))
    for row in shown["stages"]:
        names = row["from"]
        made_from = f"{len(names)} models" if len(names) > 4 else ", ".join(names)
        failed = row["gate"] and row["gate"]["failed"]
        cells = (row["name"], Path(row["recipe"]).stem, made_from or "-")
        remark = escape("gate not passed" if failed else row["remark"])
        state = Text(row["state"], STYLES[row["state"]])
        table.add_row(*map(escape, cells), state, duration(row["seconds"]), remark)
    console.print(table)
    for row in shown["stages"]:
        lines = [line[:LINE_CHARACTERS] for line in row["log"][-LOG_LINES:]] or row["why"]
        lines = [*lines, *(row["gate"]["failed"] if row["gate"] else [])]
        if lines:
            console.print(f"{row['name']} {row['state']}:", markup=False)
            console.print(Text("\n".join(f"  {line}" for line in lines), overflow="fold"), "")
    if shown["running"]:
        console.print(f"{shown['running']} is running this chain", markup=False)
