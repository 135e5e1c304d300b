"""Write a chain's report: one HTML page that needs nothing else, also while the chain runs.

The page's security policy forbids every request, every style and every script but its own, whose
hashes it names. Model and user text only reaches it through the template's escaping.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from chainforge import __version__
from chainforge.core.disk import replacing
from chainforge.core.errors import Failed, InputError
from chainforge.core.run_dir import (
    CHAIN,
    DONE,
    FAILED,
    PENDING,
    RESUMABLE,
    RUNNING,
    STALE,
    RunDir,
    StageDir,
    read_run,
)
from chainforge.core.secrets import redact
from chainforge.report import formatting, plots, transcripts
from chainforge.report.gates import Verdict, judge, read_gates

HERE = Path(__file__).parent
FORMATS = ("percent", "points", "p_words", "count", "duration", "money", "source")
# What a model may have been measured by, and what then gets a column; older files have less.
OPTIONAL = ("language", "reasoning_tokens_mean", "tokens_per_solved", "unjudged")


def write_report(directory: Path) -> Path:
    """Write `report.html` into a chain's directory, from what its stages left; return its path.

    Raises `InputError` when there is no stage at all or a file is malformed. The same files give
    the same bytes.
    """
    return _write(directory, read_run(directory))


def watch(directory: Path, tell: Callable[[str], None], every: float = 5.0) -> None:
    """Write the report again every so many seconds, until the chain is done or its run has ended.

    `tell` is called with the chain's progress, and why a report could not be written.
    """
    seen_running, told = False, ""
    while True:
        run = None
        try:
            run = read_run(directory)
            _write(directory, run)
            words = _counted(run)
        except (InputError, Failed, OSError) as error:
            if not directory.is_dir():
                raise
            words = f"not written: {error}"  # a file is being replaced: the next time it is whole
        if words != told:
            tell(words)
            told = words
        elif run and not run.running and (seen_running or _done(run) == len(run.stages)):
            return
        seen_running = seen_running or bool(run and run.running)
        time.sleep(every)


def _done(run: RunDir) -> int:
    return sum(stage.state == DONE for stage in run.stages)


def _counted(run: RunDir) -> str:
    """Return how far a chain is: `4 of 9 stages done, rl_final running 12 of 40 steps`."""
    words = [f"{_done(run)} of {len(run.stages)} stages done"]
    for stage in run.stages:
        if stage.state in (RUNNING, FAILED):
            words.append(f"{stage.name} {stage.state} {stage.how_far}".rstrip())
    if not run.running and _done(run) < len(run.stages):
        words.append("not running")
    return ", ".join(words)


def _write(directory: Path, run: RunDir) -> Path:
    # A lone surrogate in a completion cannot be encoded; it must not cost the report.
    page = redact(_render(directory, run)).encode("utf-8", "replace")
    path = directory / "report.html"
    with replacing(path, durable=False) as temporary:
        temporary.write_bytes(page)
    return path


def _render(directory: Path, run: RunDir) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(formatting, name) for name in FORMATS}
    environment.filters |= {"code": _code, "brief": transcripts.brief, "headline": _headline}
    environment.filters["json"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    found = evaluation_of(run)
    ends = (found["before"], found["after"]["name"]) if found else ("", "")
    results = found["stage"] if found else None
    cases, kinds = transcripts.cases_of(run.stages, results, *ends)
    gates = {stage.name: _gate(directory, stage) for stage in run.stages}
    return environment.get_template("page.html.j2").render(
        **_own("css", "page.css"),
        **_own("js", "page.js"),
        version=__version__,
        run=run,
        done=_done(run),
        states=_states(run),
        seconds=sum(stage.seconds or 0 for stage in run.stages) or None,
        spending=_spending(run),
        gates={name: gate for name, gate in gates.items() if gate},
        evaluation=found and found | {"kinds": kinds},
        models={model["name"]: model for model in found["models"]} if found else {},
        training=_training(run, found),
        data=[_data_stage(stage) for stage in run.stages if stage.funnel],
        cases=cases,
        filters=transcripts.filters_of(cases, [stage.name for stage in run.stages]),
        notices=[text for stage in run.stages for text in _notices(stage)],
        versions=_versions(run),
        plot_size=(plots.WIDTH, plots.HEIGHT),
    )


def _own(name: str, file: str) -> dict[str, Any]:
    """Return a file of our own, not to be escaped, and its hash for the security policy."""
    text = (HERE / file).read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).digest()
    return {name: Markup(text), f"{name}_hash": base64.b64encode(digest).decode()}


def _code(text: str) -> Markup:
    """Set what is between backticks as code; everything is escaped."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else part
        for number, part in enumerate(parts)
    )


def evaluation_of(run: RunDir) -> dict[str, Any] | None:
    """Return what the last evaluation found; None where nothing has been measured.

    `before` and `after` are the first SFT and the last RL stage, or else the first and the last
    model that was measured.
    """
    stage = run.last_results()
    if stage is None or not stage.results or not stage.results["models"]:
        return None
    models, pairs = stage.results["models"], stage.results["pairs"]
    named = {model["name"]: model for model in models}
    sft, rl = ([s.name for s in run.stages if s.recipe == recipe and s.name in named]
               for recipe in ("sft", "grpo"))  # fmt: skip
    names = list(named)
    before, after = (sft or names)[0], (rl or names)[-1]
    before = names[0] if before == after else before
    to_after = [pair for pair in pairs if pair["to"] == after]
    main = next((p for p in to_after if p["from"] == before), to_after[-1] if to_after else None)
    last = next((pair for pair in pairs if pair["to"] == names[-1] != after), None)
    told = [(named[after], main)] + ([(named[names[-1]], last)] if last else [])
    ends = [abs(pair[key]) for pair in pairs for key in ("low", "high")]
    return {
        "stage": stage,
        "models": models,
        "pairs": pairs,
        "reach": min(1.0, math.ceil(10 * max(ends, default=0.1) - 1e-9) / 10) or 0.1,
        "before": before,
        "after": named[after],
        "main": main,
        "sentences": [
            formatting.solved(model) + (f", {formatting.gained(pair)}." if pair else ".")
            for model, pair in told
        ],
        "tasks": sorted({task for model in models for task in model.get("tasks", {})}),
        "steps": sorted({int(k) for model in models for k in model.get("pass_at_k", {})}),
        "has": {key: any(model.get(key) for model in models) for key in OPTIONAL},
        "seeds": (stage.results.get("settings") or {}).get("seeds") or [],
        "language": (stage.results.get("settings") or {}).get("language", "en"),
        "asked": _asked(stage.results.get("settings") or {}),
    }


def _asked(settings: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Return how the models were measured: label, text, and whether to set it as code."""
    if not settings:
        return []
    engine = f"{(settings.get('sampling') or {}).get('engine', '')}, dtype {settings.get('dtype')}"
    told = [("Sampling", formatting.sampled(settings), False), ("Engine", engine, False)]
    for task in settings.get("tasks") or []:
        told.append(("Task", json.dumps(task, ensure_ascii=False), True))
    told.append(("Transcript", f"{settings.get('transcript')}", False))
    prompt = settings.get("system_prompt")
    told.append(("System prompt", prompt or "none", bool(prompt)))
    for key in ("extra_body", "engine_options"):
        if settings.get(key):
            told.append((key, json.dumps(settings[key], ensure_ascii=False), True))
    return told


def _gate(directory: Path, stage: StageDir) -> Verdict | None:
    """Judge the quality gates that chain.json has of a finished stage."""
    if stage.state != DONE or not stage.gate:
        return None
    models = [role.removeprefix("models.") for role in stage.inputs if role.startswith("models.")]
    try:
        return judge(read_gates(stage.gate, models), stage.directory)
    except InputError as error:
        raise InputError(f"{directory / CHAIN}: stage {stage.name}: {error}") from None


def _headline(stage: StageDir) -> str:
    """Return in a few words what a stage did."""
    if stage.funnel:
        return f"kept {stage.funnel['kept']:,} of {stage.funnel['in']:,} rows"
    if stage.results and stage.results["models"]:
        best = max(stage.results["models"], key=lambda model: model["strict"]["mean"])
        share = formatting.percent(best["strict"]["mean"])
        return f"measured {len(stage.results['models'])} models, best: {best['name']}, {share}"
    for key in ("reward", "loss"):
        if ends := plots.course(stage.metrics, key):
            return f"{key} {ends[0]:.2f} → {ends[1]:.2f}".replace("-", formatting.MINUS)
    return ""


def _states(run: RunDir) -> str:
    """Count what is not done: `1 failed, 3 pending`."""
    counts = Counter(stage.state for stage in run.stages if stage.state != DONE)
    return ", ".join(f"{number} {state}" for state, number in counts.items())


def _spending(run: RunDir) -> dict[str, Any] | None:
    """Sum up what teachers cost; money is None where some price is not known."""
    spent = [stage.spending for stage in run.stages if stage.spending]
    if not spent:
        return None
    prices = [one["usd"] for one in spent]
    total = {key: sum(one[key] for one in spent) for key in ("requests", "tokens")}
    return total | {"usd": None if None in prices else sum(prices)}


def _notices(stage: StageDir) -> Iterator[str]:
    """Yield what a reader must know before believing the numbers."""
    name = stage.name
    if stage.manifest and stage.manifest.config.get("random_rewards"):
        yield f"{name} was trained on random rewards: it is a control."
    if stage.state == STALE:
        yield f"{name} is stale: {stage.note}."
    if stage.state in (RESUMABLE, PENDING):
        why = f", stopped: {stage.log.message}" if stage.log.outcome == RESUMABLE else ""
        yield f"Not finished yet: {name}{why}."
    if stage.health:
        warnings = "1 warning" if len(stage.health) == 1 else f"{len(stage.health)} warnings"
        yield f"{name}: {warnings} of RL's health, below."
    found = transcripts.sources(stage.samples) if stage.funnel else []
    rows = sum(row["rows"] for row in found)
    for row in found:
        if row["source"] in ("offline", "offline-fallback"):
            yield f"{name}: {row['rows']:,} of {rows:,} rows {formatting.source(row['source'])}."


def _training(run: RunDir, evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the curves of every stage that trained, with what its health rules found."""
    models = {model["name"]: model for model in evaluation["models"]} if evaluation else {}
    shown = []
    for stage in run.stages:
        alarms = plots.alarms_of(stage.health)
        start, end = models.get(stage.inputs.get("model", "")), models.get(stage.name)
        ends = (start["strict"]["mean"], end["strict"]["mean"]) if start and end else None
        drawn = plots.training_plots(stage.metrics, alarms, ends)
        if drawn or alarms:
            shown.append({"stage": stage, "plots": drawn, "alarms": alarms})
    return shown


def _data_stage(stage: StageDir) -> dict[str, Any]:
    """Return where a data stage's rows came from and went; each loss starts where the next ends."""
    funnel = stage.funnel or {}
    left, dropped = funnel["in"], []
    for reason, number in funnel["dropped"].items():  # in the order of the filters
        left -= number
        dropped.append((reason, number, max(0, left)))
    return {
        "stage": stage,
        "in": funnel["in"],
        "kept": funnel["kept"],
        "dropped": dropped,
        "missing": left - funnel["kept"],
        "prompts": funnel.get("prompts"),
        "screened": funnel.get("decontamination"),
        "sources": transcripts.sources(stage.samples),
        "browse": stage.name if stage.samples.is_file() else "",
    }


def _versions(run: RunDir) -> list[tuple[str, str]]:
    """List each package's version; several where stages ran with different ones."""
    found: dict[str, set[str]] = {}
    for stage in run.stages:
        for package, version in (stage.manifest.versions if stage.manifest else {}).items():
            found.setdefault(package, set()).add(str(version))
    return [(package, ", ".join(sorted(found[package]))) for package in sorted(found)]
