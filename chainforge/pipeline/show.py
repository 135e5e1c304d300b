"""Show what a chain has made so far: each stage, what it was made from, and whether it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from chainforge.core import artifacts
from chainforge.core.errors import InputError
from chainforge.pipeline.chain import Chain
from chainforge.pipeline.display import read_progress, seconds_in_words
from chainforge.pipeline.plan import DONE, STALE, Step, chain_directory

STYLES = {"done": "green", "stale": "yellow", "resumable": "cyan", "to run": "dim"}


def rows(steps: list[Step]) -> list[dict[str, Any]]:
    """Describe each stage by its state, its lineage and what it left."""
    described = []
    for step in steps:
        manifest = artifacts.read_manifest(step.directory)
        described.append(
            {
                "name": step.stage.name,
                "recipe": step.stage.recipe,
                "from": list(dict.fromkeys(item.name for item in step.inputs.values())),
                "state": step.state,
                "why": step.why,
                "directory": str(step.directory),
                "fingerprint": step.fingerprint,
                "signed": manifest.fingerprint if manifest else None,
                "seconds": manifest.seconds if manifest else None,
                "finished": manifest.finished if manifest else None,
                "metrics": manifest.metrics if manifest else {},
                "progress": read_progress(step.directory),
            }
        )
    return described


def to_json(chain: Chain, runs: str | Path, steps: list[Step]) -> dict[str, Any]:
    """Return the chain's state for a machine to read."""
    directory = chain_directory(chain, runs)
    return {
        "name": chain.name,
        "file": str(chain.file),
        "directory": str(directory),
        "models": chain.models,
        "running": holder(directory),
        "stages": rows(steps),
    }


def holder(directory: Path) -> str | None:
    """Say who is running the chain just now, if anybody is."""
    if not (directory / ".lock").is_file():
        return None
    try:
        with artifacts.lock(directory):
            return None
    except InputError as error:
        return str(error)


def table(chain: Chain, runs: str | Path, steps: list[Step]) -> Table:
    """Return the lineage as a table of at most 80 columns."""
    lineage = Table(
        title=f"{chain.name} in {chain_directory(chain, runs)}",
        box=SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
    )
    lineage.add_column("stage", overflow="fold", no_wrap=False)
    lineage.add_column("recipe", overflow="fold")
    lineage.add_column("made from", overflow="fold", max_width=24)
    lineage.add_column("state")
    lineage.add_column("took", justify="right", no_wrap=True)
    lineage.add_column("", overflow="fold")
    for row in rows(steps):
        style = STYLES[row["state"]]
        lineage.add_row(
            row["name"],
            Path(row["recipe"]).stem,
            ", ".join(row["from"]) or "-",
            f"[{style}]{row['state']}[/{style}]",
            seconds_in_words(row["seconds"]) if row["seconds"] is not None else "-",
            _remark(row),
        )
    return lineage


def _remark(row: dict[str, Any]) -> str:
    """Say why a stage must run again, or what it ended with."""
    from rich.markup import escape

    if row["state"] == DONE:
        return escape(str(row["progress"]["note"]))
    if row["state"] == STALE and len(row["why"]) > 1:
        return escape(f"{row['why'][0]} (+{len(row['why']) - 1})")
    return escape("; ".join(row["why"]))
