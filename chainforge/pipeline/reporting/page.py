"""Make the report's page of what a chain left: everything in it, nothing from elsewhere.

The page's security policy forbids every request, every style and every script but its own, whose
hashes it names. Model and user text only reaches it through the template's escaping.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from chainforge import __version__
from chainforge.pipeline import wording
from chainforge.pipeline.reporting import axes, browser, plots
from chainforge.pipeline.reporting.accuracy import Evaluation, evaluation_of
from chainforge.pipeline.reporting.evidence import ChainEvidence, StageEvidence
from chainforge.pipeline.reporting.lineage import NODE, lay_out
from chainforge.pipeline.reporting.transcripts import sources

HERE = Path(__file__).parent
WORDS = ("percent", "points", "p_words", "count", "duration", "money", "source")


def render(chain: ChainEvidence) -> str:
    """Return the page."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(wording, name) for name in WORDS}
    environment.filters["code"] = _code
    environment.globals |= {"axes": axes, "node_y": NODE}
    evaluation = evaluation_of(chain)
    cases, kinds = browser.cases_of(chain, evaluation)
    stages = [_stage(stage) for stage in chain.stages]
    return environment.get_template("page.html.j2").render(
        **_own("css", "page.css"),
        **_own("js", "page.js"),
        **_picture(chain, stages, evaluation),
        version=__version__,
        name=chain.name,
        running=chain.running,
        seconds=sum(stage.seconds or 0 for stage in chain.stages),
        done=sum(stage.state == "done" for stage in chain.stages),
        states=_states(chain),
        stages=stages,
        failures=[stage for stage in stages if stage["state"] == "failed"],
        paid=_paid(chain),
        evaluation=evaluation and vars(evaluation) | {"kinds": kinds},
        training=_training(chain),
        data=[_data_stage(stage) for stage in chain.stages if stage.funnel],
        cases=cases,
        filters=browser.filters_of(cases, [stage.name for stage in chain.stages]),
        notices=_notices(chain),
        versions=_versions(chain),
    )


def _own(name: str, file: str) -> dict[str, Any]:
    """Return a file of our own, not to be escaped, and its hash for the security policy."""
    text = (HERE / file).read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).digest()
    return {name: Markup(text), f"{name}_hash": base64.b64encode(digest).decode()}


def _code(text: str) -> Markup:
    """Set what stands between backticks as code; everything is escaped."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else part
        for number, part in enumerate(parts)
    )


def _picture(
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


def _stage(stage: StageEvidence) -> dict[str, Any]:
    """Say of one stage what the picture and the configuration section show."""
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
    }


def _headline(stage: StageEvidence) -> str:
    """Say in a few words what a stage did."""
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


def _states(chain: ChainEvidence) -> str:
    """Count what is not done: `1 failed, 3 not started`."""
    counts = Counter(stage.state for stage in chain.stages if stage.state != "done")
    return ", ".join(f"{number} {state}" for state, number in counts.items())


def _paid(chain: ChainEvidence) -> dict[str, Any] | None:
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


def _training(chain: ChainEvidence) -> list[dict[str, Any]]:
    """Return the curves of every stage that trained, with what its health rules found."""
    shown = []
    for stage in chain.stages:
        alarms = plots.alarms_of(stage.health)
        drawn = plots.training_plots(stage.metrics, alarms)
        if drawn or alarms:
            names = {"name": stage.name, "recipe": stage.recipe}
            shown.append(names | {"plots": drawn, "alarms": alarms})
    return shown


def _data_stage(stage: StageEvidence) -> dict[str, Any]:
    """Say where a data stage's rows came from and went; each loss starts where the next ends."""
    funnel = stage.funnel or {}
    left, dropped = funnel["in"], []
    for reason, number in sorted(funnel["dropped"].items(), key=lambda item: -item[1]):
        left -= number
        dropped.append((reason, number, max(0, left)))
    return {
        "name": stage.name,
        "recipe": stage.recipe,
        "in": funnel["in"],
        "kept": funnel["kept"],
        "dropped": dropped,
        "missing": left - funnel["kept"],
        "spending": stage.spending,
        "sources": sources(stage.samples),
        "browse": stage.name if stage.samples.is_file() else "",
    }


def _notices(chain: ChainEvidence) -> list[str]:
    """Say what a reader must know before believing the numbers."""
    notices = []
    for stage in chain.stages:
        if stage.manifest and stage.manifest.config.get("random_rewards"):
            notices.append(f"{stage.name} was trained on random rewards: it is a control.")
        if stage.state == "stale":
            notices.append(f"{stage.name} is stale: {stage.note or 'its settings changed'}.")
        if stage.state == "stopped":
            notices.append(f"{stage.name} stopped: {stage.log.message}")
        if stage.health:
            notices.append(f"{stage.name}: {len(stage.health)} warnings of RL's health, below.")
        found = sources(stage.samples) if stage.funnel else []
        rows = sum(row["rows"] for row in found)
        notices += [
            f"{stage.name}: {row['rows']:,} of {rows:,} rows {wording.source(row['source'])}."
            for row in found
            if row["source"] in ("offline", "offline-fallback")
        ]
    waiting = [stage.name for stage in chain.stages if stage.state in ("unfinished", "not started")]
    if waiting:
        notices.append(f"Not finished yet: {', '.join(waiting)}.")
    return notices


def _versions(chain: ChainEvidence) -> list[tuple[str, str]]:
    """List each package's version; several where stages ran with different ones."""
    found: dict[str, set[str]] = {}
    for stage in chain.stages:
        for package, version in (stage.manifest.versions if stage.manifest else {}).items():
            found.setdefault(package, set()).add(str(version))
    return [(package, ", ".join(sorted(found[package]))) for package in sorted(found)]
