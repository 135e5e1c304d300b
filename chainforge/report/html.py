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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from chainforge import __version__
from chainforge.core.errors import Failed, InputError
from chainforge.core.jsonl import Row, replacing
from chainforge.core.run_dir import (
    ABLATION,
    CHAIN,
    DONE,
    PENDING,
    RESUMABLE,
    STALE,
    RunDir,
    StageDir,
    read_run,
)
from chainforge.core.secrets import redact
from chainforge.report import formatting, plots, transcripts
from chainforge.report.gates import Verdict, judge, read_gates

HERE = Path(__file__).parent
FORMATS = ("percent", "points", "p_words", "count", "duration", "money", "source", "headline",
           "scaled", "change", "per_hour")  # fmt: skip


def write_report(directory: Path) -> Path:
    """Write `report.html` into a chain's directory, from what its stages left; return its path.

    Raises `InputError` when there is no stage at all or a file is malformed. The same files give
    the same bytes.
    """
    return _write(directory, read_run(directory))


def watch(directory: Path, tell: Callable[[str], None], every: float = 5.0) -> None:
    """Write the report again every `every` seconds, until the chain is done or its run has ended.

    `tell` is called with the chain's progress, and why a report could not be written.
    """
    told, over = "", False
    while not over:
        try:
            run = read_run(directory)
            _write(directory, run)
            over = bool(told) and not run.running
            words = _states(run) + ("" if run.running else ", not running")
        except (InputError, Failed, OSError) as error:
            if not directory.is_dir():
                raise
            words = f"not written: {error}"  # a file is being replaced: the next time it is whole
        if words != told:
            tell(words)
            told = words
        time.sleep(0 if over else every)


def _states(run: RunDir) -> str:
    """Return how far a chain is: `4 of 9 stages done, rl_final running 12 of 40 steps`."""
    words = [f"{_done(run)} of {len(run.stages)} stages done"]
    for stage in run.stages:
        if stage.state not in (DONE, PENDING):
            words.append(f"{stage.name} {stage.state} {stage.how_far}".rstrip())
    return ", ".join(words)


def _done(run: RunDir) -> int:
    return sum(stage.state == DONE for stage in run.stages)


def _write(directory: Path, run: RunDir) -> Path:
    # A lone surrogate in a completion cannot be encoded; it must not cost the report.
    page = redact(_render(directory, run)).encode("utf-8", "replace")
    path = directory / "report.html"
    with replacing(path, durable=False) as temporary:
        temporary.write_bytes(page)
    return path


def _render(directory: Path, run: RunDir) -> str:
    found = evaluation_of(run)
    ends = (found["before"], found["after"]["name"]) if found else ("", "")
    measured = found["stage"] if found else None
    cases, kinds, written = transcripts.cases_of(run.stages, measured, *ends)
    gates = {stage.name: _gate(directory, stage) for stage in run.stages}
    data = [_data_stage(one, written.get(one.name, [])) for one in run.stages if one.funnel]
    template = _environment().get_template("page.html.j2")
    return template.render(
        **_own("css", "page.css"),
        **_own("js", "page.js"),
        version=__version__,
        run=run,
        done=_done(run),
        seconds=sum(stage.seconds or 0 for stage in run.stages) or None,
        spending=_spending(run),
        gates={name: gate for name, gate in gates.items() if gate.passed or gate.failed},
        evaluation=found and found | {"kinds": kinds},
        ablation=StageDir(Path(f"{directory.absolute()}{ABLATION}")).results,
        models={model["name"]: model for model in found["models"]} if found else {},
        training=list(_training(run)),
        data=data,
        cases=cases,
        filters=transcripts.filters_of(cases, [stage.name for stage in run.stages]),
        notices=[*(text for stage in run.stages for text in _notices(stage)), *_offline(data)],
        plot_size=(plots.WIDTH, plots.HEIGHT),
        verdicts=transcripts.VERDICTS,
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(formatting, name) for name in FORMATS}
    environment.filters |= {"code": _code, "brief": transcripts.brief}
    environment.filters["json"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    return environment


def _own(name: str, file: str) -> dict[str, Any]:
    """Return a file of our own, not to be escaped, and its hash for the security policy."""
    text = (HERE / file).read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).digest()
    return {name: Markup(text), f"{name}_hash": base64.b64encode(digest).decode()}


def _code(text: str) -> Markup:
    """Set what is between backticks as code; everything is escaped."""
    parts = enumerate(text.split("`"))
    return Markup("").join(Markup("<code>{}</code>").format(p) if n % 2 else p for n, p in parts)


def evaluation_of(run: RunDir) -> dict[str, Any] | None:
    """Return what the last evaluation found; None where nothing has been measured."""
    stage = run.last_results()
    if stage is None or not stage.results or not stage.results["models"]:
        return None
    models, pairs = stage.results["models"], stage.results["pairs"]
    named = {model["name"]: model for model in models}
    before, after = _compared(run, list(named))
    to_after = [pair for pair in pairs if pair["to"] == after]
    main = next((p for p in to_after if p["from"] == before), to_after[-1] if to_after else None)
    gain = f", {formatting.gained(main)}." if main else "."
    widest = max((abs(pair[key]) for pair in pairs for key in ("low", "high")), default=0.1)
    settings = stage.results.get("settings") or {}
    return {
        "stage": stage,
        "models": models,
        "pairs": pairs,
        "reach": min(1.0, max(0.1, math.ceil(10 * widest - 1e-9) / 10)),  # of the axis of pairs
        "before": before,
        "after": named[after],
        "main": main,
        "sentence": formatting.solved(named[after]) + gain,
        "tasks": sorted({task for model in models for task in model.get("tasks", {})}),
        "rewards": formatting.rewards_of(models),
        "reward_pairs": stage.results.get("reward_pairs", []),
        "steps": sorted({int(k) for model in models for k in model.get("pass_at_k", {})}),
        "seeds": settings.get("seeds") or [],
        "language": settings.get("language", "en"),
        "sampled": formatting.sampled(settings),
        "asked": {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()},
    }


def _compared(run: RunDir, names: list[str]) -> tuple[str, str]:
    """Return the first SFT and the last RL stage measured, or else the first and last name."""
    sft, rl = (
        [s.name for s in run.stages if s.recipe in kinds and s.name in names]
        for kinds in (("sft",), ("grpo", "dpo"))
    )
    before, after = (sft or names)[0], (rl or names)[-1]
    return (names[0] if before == after else before), after


def _gate(directory: Path, stage: StageDir) -> Verdict:
    """Judge the quality gates that chain.json has of a finished stage."""
    if stage.state != DONE:
        return Verdict()
    models = [role.removeprefix("models.") for role in stage.inputs if role.startswith("models.")]
    try:
        return judge(read_gates(stage.gate, models), stage.directory)
    except InputError as error:
        raise InputError(f"{directory / CHAIN}: stage {stage.name}: {error}") from None


def _spending(run: RunDir) -> dict[str, Any] | None:
    """Sum up what teachers cost; money is None where some price is not known."""
    spent = [stage.spending for stage in run.stages if stage.spending]
    prices = [one["usd"] for one in spent]
    total = {key: sum(one[key] for one in spent) for key in ("requests", "tokens")}
    return total | {"usd": None if None in prices else sum(prices)} if spent else None


def _notices(stage: StageDir) -> Iterator[str]:
    """Yield what a reader must know of a stage before believing the numbers."""
    name = stage.name
    if stage.manifest and stage.manifest.config.get("random_rewards"):
        yield f"{name} was trained on random rewards: it is a control."
    if stage.state == STALE:
        yield f"{name} is stale: {stage.note}."
    if stage.state in (RESUMABLE, PENDING):
        why = f", stopped: {stage.log.message}" if stage.log.outcome == RESUMABLE else ""
        yield f"Not finished yet: {name}{why}."
    if stage.health:
        yield f"{name}: warnings of RL's health ({len(stage.health)}), below."


def _offline(data: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a sentence for each source of rows that no language model wrote."""
    for entry in data:
        rows = sum(one["rows"] for one in entry["sources"])
        for one in entry["sources"]:
            if one["source"].startswith("offline"):
                words = f"{one['rows']:,} of {rows:,} rows {formatting.source(one['source'])}."
                yield f"{entry['stage'].name}: {words}"


def _training(run: RunDir) -> Iterator[dict[str, Any]]:
    """Yield the curves of every stage that trained, with what its health rules found."""
    for stage in run.stages:
        alarms = plots.alarms_of(stage.health)
        drawn = plots.training_plots(stage.metrics, alarms)
        if drawn or alarms:
            yield {"stage": stage, "plots": drawn, "alarms": alarms}


def _data_stage(stage: StageDir, sources: list[Row]) -> dict[str, Any]:
    """Return the sources of a data stage's rows, and how many each filter dropped and left."""
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
        "sources": sources,
        "browse": stage.name if stage.samples.is_file() else "",
    }
