"""Write a chain's report: one HTML page that needs nothing else and runs nothing.

The page has no script, and its security policy forbids every request and every style but its
own, whose hash it names. Model and user text only reaches it through the template's escaping.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from chainforge import __version__
from chainforge.data.measures import compare
from chainforge.pipeline import plots, wording
from chainforge.pipeline.evidence import ChainEvidence, StageEvidence, read_chain
from chainforge.pipeline.excerpts import (
    Case,
    first_samples,
    kept_and_dropped,
    side_by_side,
    sources,
)

HERE = Path(__file__).parent


def write_report(chain_dir: Path, stages: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """Write `<chain_dir>/report.html` from what the stages left, and return its path.

    `stages` lists `{"name", "recipe"}` in order, and may say `state` and `note`; without it
    chain.json does, or the folders themselves. Raises `InputError` when there is no stage at all
    or a file is malformed. The same files give the same bytes.
    """
    chain = read_chain(Path(chain_dir), stages)
    # A lone surrogate in a completion is no UTF-8; it must not cost the report.
    page = render(chain).encode("utf-8", "replace")
    path = Path(chain_dir) / "report.html"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(page)
    os.replace(temporary, path)
    return path


def render(chain: ChainEvidence) -> str:
    """Return the page."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": wording.percent,
        "points": wording.points,
        "p_value": wording.p_value,
        "p_words": wording.p_words,
        "count": wording.count,
        "duration": wording.duration,
        "source": wording.source,
    }
    environment.globals |= {
        "width": plots.WIDTH,
        "height": plots.HEIGHT,
        "left": plots.LEFT,
        "right": plots.RIGHT,
    }
    css = Markup((HERE / "report.css").read_text(encoding="utf-8"))  # our own file: not escaped
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    data = [_data_stage(stage) for stage in chain.stages if stage.funnel]
    return environment.get_template("report.html.j2").render(
        css=css,
        css_hash=digest,
        version=__version__,
        name=chain.name,
        seconds=sum(stage.manifest.seconds for stage in chain.stages if stage.manifest),
        stages=[_stage(stage, chain) for stage in chain.stages],
        evaluation=_evaluation(chain),
        training=[
            {"name": stage.name, "recipe": stage.recipe, "plots": drawn}
            for stage in chain.stages
            if (drawn := plots.training_plots(stage.metrics))
        ],
        data=data,
        notices=_notices(chain, data),
        versions=_versions(chain),
    )


def _stage(stage: StageEvidence, chain: ChainEvidence) -> dict[str, Any]:
    """Say of one stage what the table and the configuration section show."""
    scores = chain.last_results()
    models = (scores.results or {}).get("models", []) if scores else []
    manifest = stage.manifest
    return {
        "name": stage.name,
        "recipe": stage.recipe,
        "state": stage.state,
        "note": stage.note or _progress(stage),
        "seconds": manifest.seconds if manifest else None,
        "headline": _headline(stage),
        "model": next((model for model in models if model["name"] == stage.name), None),
        "manifest": manifest,
        "given": json.dumps(manifest.given, indent=2, ensure_ascii=False) if manifest else "",
        "config": stage.config,
        "log": "" if manifest else "\n".join(stage.log),
    }


def _progress(stage: StageEvidence) -> str:
    if stage.manifest or not stage.progress.get("total"):
        return ""
    return "{done:,} of {total:,} {unit}".format(**stage.progress)


def _headline(stage: StageEvidence) -> str:
    """Say in a few words what a stage did."""
    if stage.funnel:
        return f"kept {stage.funnel['kept']:,} of {stage.funnel['in']:,} rows"
    if stage.results and stage.results["models"]:
        best = max(stage.results["models"], key=lambda model: model["strict"]["mean"])
        return f"best: {best['name']}, {wording.percent(best['strict']['mean'])}"
    for key in ("reward", "loss"):
        if ends := plots.course(stage.metrics, key):
            return f"{key} {ends[0]:.2f} → {ends[1]:.2f}".replace("-", wording.MINUS)
    return ""


def _evaluation(chain: ChainEvidence) -> dict[str, Any] | None:
    """Gather the last evaluation: models, pairs, tasks, the headline, prompts side by side."""
    stage = chain.last_results()
    if stage is None or not stage.results or not stage.results["models"]:
        return None
    models, pairs = stage.results["models"], stage.results["pairs"]
    before, after = _ends(chain, [model["name"] for model in models])
    rows = first_samples(stage.samples())
    by_model = {m["name"]: rows[m["name"]] for m in models if m["name"] in rows}
    cases: list[Case] = []
    kinds: dict[str, int] = {}
    main = _pair(pairs, by_model, before, after)
    if before in by_model and after in by_model:
        cases, kinds = side_by_side(by_model, before, after)
    named = {model["name"]: model for model in models}
    sentence = wording.solved(named[after]) + (f", {wording.gained(main)}" if main else "")
    last = next((pair for pair in pairs if pair["to"] == models[-1]["name"] != after), None)
    second = wording.solved(models[-1]) + f", {wording.gained(last)}" if last else ""
    return {
        "stage": stage.name,
        "models": models,
        "pairs": pairs,
        "before": before,
        "after": named[after],
        "main": main,
        "sentences": [f"{text}." for text in (sentence, second) if text],
        "tasks": sorted({task for model in models for task in model.get("tasks", {})}),
        "steps": sorted({int(k) for model in models for k in model.get("pass_at_k", {})}),
        "cases": cases,
        "kinds": kinds,
    }


def _ends(chain: ChainEvidence, models: list[str]) -> tuple[str, str]:
    """Choose which two models tell the chain's story: the first SFT and the last RL stage.

    Where one is missing, the first or the last model that was measured stands for it.
    """
    cold = [s.name for s in chain.stages if s.recipe == "sft" and s.name in models]
    final = [s.name for s in chain.stages if s.recipe == "grpo" and s.name in models]
    before, after = (cold or models)[0], (final or models)[-1]
    return (models[0], after) if before == after else (before, after)


def _pair(
    pairs: list[dict[str, Any]], rows: dict[str, dict[str, Any]], before: str, after: str
) -> dict[str, Any] | None:
    """Return the comparison of two models: as it was written, or from the samples."""
    for pair in pairs:
        if (pair["from"], pair["to"]) == (before, after):
            return pair
    a, b = rows.get(before, {}), rows.get(after, {})
    if before == after or not a or a.keys() != b.keys():
        return None
    return compare(before, list(a.values()), after, list(b.values()))


def _data_stage(stage: StageEvidence) -> dict[str, Any]:
    """Gather where a data stage's rows came from and went, with examples."""
    funnel, rows = stage.funnel or {}, stage.samples()
    dropped = sorted(funnel["dropped"].items(), key=lambda item: -item[1])
    return {
        "name": stage.name,
        "recipe": stage.recipe,
        "in": funnel["in"],
        "kept": funnel["kept"],
        "dropped": dropped,
        "missing": funnel["in"] - funnel["kept"] - sum(number for _, number in dropped),
        "sources": sources(rows),
        "cases": kept_and_dropped(rows),
    }


def _notices(chain: ChainEvidence, data: list[dict[str, Any]]) -> list[str]:
    """Say what a reader must know before believing the numbers."""
    notices = []
    for stage in chain.stages:
        if stage.manifest and stage.manifest.config.get("random_rewards"):
            notices.append(f"{stage.name} was trained on random rewards: it is a control.")
        if stage.state == "failed":
            notices.append(f"{stage.name} failed; the end of its log is under Configuration.")
    for part in data:
        rows = sum(row["rows"] for row in part["sources"])
        notices += [
            f"{part['name']}: {row['rows']:,} of {rows:,} rows {wording.source(row['source'])}."
            for row in part["sources"]
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
