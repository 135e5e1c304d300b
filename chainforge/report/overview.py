"""Return the top of the report: the chain's picture, what each stage came to, warnings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from chainforge.report import formatting as wording
from chainforge.report import plots
from chainforge.report.accuracy import Evaluation
from chainforge.report.evidence import ChainEvidence, StageEvidence
from chainforge.report.lineage import lay_out


def picture(
    chain: ChainEvidence, stages: list[dict[str, Any]], evaluation: Evaluation | None
) -> dict[str, Any]:
    """Return the rows of the chain's picture, and the width of its rails."""
    nodes, width = lay_out(chain.stages)
    shown = {stage["name"]: stage for stage in stages}
    models = {model["name"]: model for model in evaluation.models} if evaluation else {}
    rows = [
        {
            "name": node.name,
            "x": node.x,
            "rails": node.rails,
            "stage": shown[node.name] if node.stage else None,
            "model": models.get(node.name),
        }
        for node in nodes
    ]
    return {"rows": rows, "rails": width}


def stage_view(stage: StageEvidence) -> dict[str, Any]:
    """Return what the picture and the configuration section show of one stage."""
    manifest = stage.manifest
    return {
        "name": stage.name,
        "recipe": stage.recipe,
        "state": stage.state,
        "note": stage.note or stage.how_far,
        "inputs": stage.inputs,
        "seconds": stage.seconds,
        "spending": stage.spending,
        "headline": _headline(stage),
        "manifest": manifest,
        "given": json.dumps(manifest.given, indent=2, ensure_ascii=False) if manifest else "",
        "config": stage.config,
        "log": stage.log,
        "share": stage.share if stage.state == "running" else None,
        "before": stage.log.lines[: -1 - stage.log.message.count("\n")],
        "gate": stage.gate,
    }


def _headline(stage: StageEvidence) -> str:
    """Return in a few words what a stage did."""
    if stage.funnel:
        return f"kept {stage.funnel['kept']:,} of {stage.funnel['in']:,} rows"
    if stage.results and stage.results["models"]:
        best = max(stage.results["models"], key=lambda model: model["strict"]["mean"])
        share = wording.percent(best["strict"]["mean"])
        return f"measured {len(stage.results['models'])} models, best: {best['name']}, {share}"
    for key in ("reward", "loss"):
        if ends := plots.course(stage.metrics, key):
            return f"{key} {ends[0]:.2f} → {ends[1]:.2f}".replace("-", wording.MINUS)
    return ""


def states(chain: ChainEvidence) -> str:
    """Count what is not done: `1 failed, 3 not started`."""
    counts = Counter(stage.state for stage in chain.stages if stage.state != "done")
    return ", ".join(f"{number} {state}" for state, number in counts.items())


def progress(chain: ChainEvidence) -> str:
    """Return how the stage at work, or the one that failed, comes along; empty without one."""
    for stage in chain.stages:
        if stage.state in ("running", "failed"):
            words = ("is at work", ", ") if stage.state == "running" else ("failed", " after ")
            return f"{stage.name} {words[0]}{words[1] + stage.how_far if stage.how_far else ''}. "
    return ""


def paid(chain: ChainEvidence) -> dict[str, Any] | None:
    """Sum up what teachers cost; money is None where some price is not known."""
    spent = [stage.spending for stage in chain.stages if stage.spending]
    if not spent:
        return None
    prices = [one["usd"] for one in spent]
    return {
        "usd": None if None in prices else sum(prices),
        "requests": sum(one["requests"] for one in spent),
        "tokens": sum(one["tokens"] for one in spent),
    }


def unpaid(chain: ChainEvidence) -> bool:
    """Whether every row that was collected is the built-in solver's, which costs nothing."""
    collected = [stage for stage in chain.stages if stage.recipe == "collect" and stage.funnel]
    writers = {row["source"] for stage in collected for row in stage.sources}
    return writers == {"offline"}


def notices(chain: ChainEvidence) -> list[str]:
    """Return what a reader must know before believing the numbers."""
    found = [text for stage in chain.stages for text in _notices(stage)]
    waiting = [stage.name for stage in chain.stages if stage.state in ("unfinished", "not started")]
    if waiting:
        found.append(f"Not finished yet: {', '.join(waiting)}.")
    return found


def _notices(stage: StageEvidence) -> Iterator[str]:
    name = stage.name
    if stage.manifest and stage.manifest.config.get("random_rewards"):
        yield f"{name} was trained on random rewards: it is a control."
    if stage.state == "stale":
        yield f"{name} is stale: {stage.note or 'its settings changed'}."
    if stage.state == "stopped":
        yield f"{name} stopped: {stage.log.message}"
    if stage.health:
        warnings = "1 warning" if len(stage.health) == 1 else f"{len(stage.health)} warnings"
        yield f"{name}: {warnings} of RL's health, below."
    if not stage.funnel:
        return
    rows = sum(row["rows"] for row in stage.sources)
    for row in stage.sources:
        if row["source"] in ("offline", "offline-fallback"):
            yield f"{name}: {row['rows']:,} of {rows:,} rows {wording.source(row['source'])}."


def gates_shut(chain: ChainEvidence) -> list[dict[str, Any]]:
    """Return each stage whose gate is shut, what it found, and which stages it holds."""
    return [
        {
            "name": stage.name,
            "opened": stage.gate.opened,
            "shut": stage.gate.shut,
            "held": [other.name for other in chain.stages if other.held_by == stage.name],
        }
        for stage in chain.stages
        if stage.gate and not stage.gate.passed
    ]
