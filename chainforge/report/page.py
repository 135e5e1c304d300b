"""Make the report's page of what a chain left: everything in it, nothing from elsewhere.

The page's security policy forbids every request, every style and every script but its own, whose
hashes it names. Model and user text only reaches it through the template's escaping.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from chainforge import __version__
from chainforge.report import axes, browser, overview, plots
from chainforge.report import formatting as wording
from chainforge.report.accuracy import Evaluation, evaluation_of
from chainforge.report.evidence import ChainEvidence, StageEvidence
from chainforge.report.lineage import NODE
from chainforge.report.texts import brief

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
    environment.filters |= {"code": _code, "brief": brief}
    environment.globals |= {"axes": axes, "node_y": NODE}
    evaluation = evaluation_of(chain)
    cases, kinds = browser.cases_of(chain, evaluation)
    stages = [overview.stage_view(stage) for stage in chain.stages]
    return environment.get_template("page.html.j2").render(
        **_own("css", "page.css"),
        **_own("js", "page.js"),
        **overview.picture(chain, stages, evaluation),
        version=__version__,
        name=chain.name,
        running=chain.running,
        seconds=sum(stage.seconds or 0 for stage in chain.stages) or None,
        done=sum(stage.state == "done" for stage in chain.stages),
        states=overview.states(chain),
        progress=overview.progress(chain),
        stages=stages,
        failures=[stage for stage in stages if stage["state"] == "failed"],
        paid=overview.paid(chain),
        unpaid=overview.unpaid(chain),
        shut=overview.gates_shut(chain),
        evaluation=evaluation and vars(evaluation) | {"kinds": kinds},
        training=_training(chain, evaluation),
        data=[_data_stage(stage) for stage in chain.stages if stage.funnel],
        cases=cases,
        filters=browser.filters_of(cases, [stage.name for stage in chain.stages]),
        notices=overview.notices(chain),
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


def _training(chain: ChainEvidence, evaluation: Evaluation | None) -> list[dict[str, Any]]:
    """Return the curves of every stage that trained, with what its health rules found."""
    models = {model["name"]: model for model in evaluation.models} if evaluation else {}
    shown = []
    for stage in chain.stages:
        alarms = plots.alarms_of(stage.health)
        start, end = models.get(stage.inputs.get("model", "")), models.get(stage.name)
        ends = (start["strict"]["mean"], end["strict"]["mean"]) if start and end else None
        drawn = plots.training_plots(stage.metrics, alarms, ends)
        if drawn or alarms:
            names = {"name": stage.name, "recipe": stage.recipe}
            shown.append(names | {"plots": drawn, "alarms": alarms})
    return shown


def _data_stage(stage: StageEvidence) -> dict[str, Any]:
    """Return where a data stage's rows came from and went; each loss starts where the next ends."""
    funnel = stage.funnel or {}
    left, dropped = funnel["in"], []
    for reason, number in funnel["dropped"].items():  # in the order of the filters
        left -= number
        dropped.append((reason, number, max(0, left)))
    return {
        "name": stage.name,
        "recipe": stage.recipe,
        "in": funnel["in"],
        "kept": funnel["kept"],
        "dropped": dropped,
        "missing": left - funnel["kept"],
        "prompts": funnel.get("prompts"),
        "screened": funnel.get("decontamination"),
        "spending": stage.spending,
        "sources": stage.sources,
        "browse": stage.name if stage.samples.is_file() else "",
    }


def _versions(chain: ChainEvidence) -> list[tuple[str, str]]:
    """List each package's version; several where stages ran with different ones."""
    found: dict[str, set[str]] = {}
    for stage in chain.stages:
        for package, version in (stage.manifest.versions if stage.manifest else {}).items():
            found.setdefault(package, set()).add(str(version))
    return [(package, ", ".join(sorted(found[package]))) for package in sorted(found)]
