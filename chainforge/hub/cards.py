"""Write the card of an exported model, adapter or data set: its origin, results and terms.

Everything in it is from the manifests, funnels and results of the run. No path of this machine
goes into it, and no setting that is called a key or a token. The text is in `card.md.jinja`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from jinja2 import Template

from chainforge import __version__
from chainforge.core.transcript import DEFAULT, tags_of
from chainforge.data.sources import PRESETS
from chainforge.generate.build import code, funnel_table, public, public_settings
from chainforge.hub.lineage import Ancestor, Origin, base_of, finished_in, roots
from chainforge.hub.upload import HUB_ID

TEMPLATE = str(Path(__file__).with_name("card.md.jinja"))
VERBS = {
    "collect": "collects reasoning traces",
    "sft": "supervised fine-tuning",
    "dpo": "preference optimization by DPO",
    "grpo": "reinforcement learning by GRPO",
    "reject": "rejection sampling",
    "distill": "on-policy distillation",
}
RESULTS = {
    "kept": "{kept:,} of {in:,} samples kept",
    "steps": "{steps:,} steps",
    "reward": "reward {reward:.3g} at the end",
    "train_loss": "mean loss {train_loss:.3g}",
}


@dataclass(frozen=True)
class Measurement:
    """An evaluation of a model: its name, its names for the model, and its results.

    `row` is that of the model; `rows` has those of its ancestors, too, as in the results file.
    """

    name: str
    own: set[str]
    row: dict[str, Any]
    rows: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    sampling: dict[str, Any]
    stage: Ancestor


def measurements(
    stages: Sequence[Ancestor], computed: Mapping[str, dict[str, Any]] | None = None
) -> list[Measurement]:
    """Return the evaluations, of this run or next to it, that measured the last of some stages.

    A model is identified by its fingerprint, whatever name it was given. An evaluation that is
    older than the stage measured another model. `computed` has results to use instead of those of
    an evaluation, by its fingerprint.
    """
    stage = stages[-1]
    known = {one.manifest.fingerprint for one in stages}
    known |= {origin.fingerprint for one in stages for origin in one.took.values()}
    found = []
    for one in (one for n in (0, 1) for one in finished_in(stage.directory.parents[n])):
        prints = one.measured
        own = {name for name, mine in prints.items() if mine == stage.manifest.fingerprint}
        results = own and (
            (computed or {}).get(one.manifest.fingerprint) or one.signed("results.json")
        )
        if not results or one.manifest.finished < stage.manifest.finished:
            continue
        rows = [row for row in results["models"] if prints.get(row["name"]) in known]
        pairs = [pair for pair in results["pairs"] if own & {pair["from"], pair["to"]}]
        row = next(row for row in rows if row["name"] in own)
        sampling = (results.get("settings") or {}).get("sampling") or {}
        found.append(Measurement(one.name, own, row, rows, pairs, sampling, one))
    return found


def model_card(
    what: str,
    title: str,
    base: Origin | None,
    stages: Sequence[Ancestor],
    licence: Mapping[str, str],
) -> str:
    """Return the card of an adapter or a model.

    `title` is what it is loaded by; `base` what the adapter belongs to or the model started from;
    `stages` its lineage, oldest first; `licence` the base's, as in the Hub's cards.
    """
    from huggingface_hub import ModelCardData

    adapter = what == "adapter"
    on_hub = base is not None and base.on_hub
    head = ModelCardData(
        **dict(licence),  # type: ignore[arg-type]
        base_model=base.name if base and on_hub else None,
        base_model_relation=("adapter" if adapter else "finetune") if on_hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        datasets=data_sets(stages) or None,
        tags=["chainforge", "trl", "reasoning", *(["lora"] if adapter else [])],
    )
    values = _prompt(stages) | {"adapter": adapter, "title": title, "base": base}
    values["licence"] = licence.get("license_name") or licence.get("license")
    values["results"] = results_section(measurements(stages)) if stages else ""
    values["settings"] = _settings(stages[-1]) if stages else ""
    values["terms"] = terms(stages, base_of(stages))
    return _filled(head, stages, stages, **values)


def results_section(found: Sequence[Measurement]) -> str:
    """Return the card's section with the results of some evaluations, without its title."""
    template = Template(Path(__file__).with_name("results.md.jinja").read_text(encoding="utf-8"))
    return str(template.render(measurements=found, code=code)).strip()


def data_card(own: str, stages: Sequence[Ancestor], licence: Mapping[str, str]) -> str:
    """Return a data set's own card with its lineage and terms added, and `licence` if given."""
    from huggingface_hub import DatasetCardData

    head, text = head_of(own)
    values: dict[str, Any] = {"own": text.strip(), "base": None, "licence": None, "settings": ""}
    # The card of collected traces has its terms already, as each data card has its own funnel.
    values["terms"] = [] if "## Terms" in own else terms(stages)
    return _filled(DatasetCardData(**head | dict(licence)), stages, stages[:-1], **values)


def _filled(
    head: Any, stages: Sequence[Ancestor], with_funnels: Sequence[Ancestor], **values: Any
) -> str:
    """Return the template with the lineage, the funnels and further values."""
    from huggingface_hub import ModelCard

    found = {stage.name: stage.signed("funnel.json") for stage in with_funnels}
    funnels = {name: funnel_table(one) for name, one in found.items() if one and one["dropped"]}
    values |= {"stages": stages, "funnels": funnels, "version": __version__, "verbs": VERBS}
    values |= {"code": code, "linked": linked, "public": public, "quoted": _quoted}
    values |= {"inputs": _inputs, "result": _result}
    return f"{ModelCard.from_template(head, TEMPLATE, **values).content.rstrip()}\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def head_of(card: str) -> tuple[dict[str, Any], str]:
    """Return the YAML at the start of a card, and the rest; no YAML if it cannot be read."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", card, re.DOTALL)
    if found is None:
        return {}, card
    try:
        head = yaml.safe_load(found[1])
    except yaml.YAMLError:
        head = None
    return (head if isinstance(head, dict) else {}), card[found.end() :]


def linked(origin: Origin) -> str:
    """Return a model's name, with a link if it is on the Hub."""
    if origin.on_hub and HUB_ID.fullmatch(origin.name):
        return f"[{origin.name}](https://huggingface.co/{origin.name})"
    return f"`{code(public(origin.name))}`"


def terms(stages: Sequence[Ancestor], base: Origin | None = None) -> list[str]:
    """Return the terms of all that the stages were made with: teachers, models and data sets."""
    from chainforge.generate.teacher import OFFLINE, TERMS

    lines = []
    for kind, model, host in _teachers(stages):
        text = TERMS.get(kind, "").format(hosts=f"`{code(host)}`" if host else "the server")
        offline = kind == "offline"
        lines.append(OFFLINE if offline else f"Traces were written by `{code(model)}`. {text}")
    own = base.fingerprint if base else None
    if others := [linked(one) for one in roots(stages) if one.fingerprint != own]:
        lines.append(
            f"Rows were written, or targets given, by models that began as {', '.join(others)}. "
            "Their licences may restrict what is trained on them."
        )
    if sets := data_sets(stages):
        links = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in sets)
        lines.append(f"The questions of {links} have licences of their own.")
    return lines


def data_sets(stages: Sequence[Ancestor]) -> list[str]:
    """Return the Hub's data sets whose questions were trained on."""
    params = [
        task.get("params") or {}
        for stage in stages
        for task in stage.setting("tasks") or ()
        if isinstance(task, dict) and task.get("fn") == "hub"
    ]
    given = [str(one.get("dataset") or one.get("preset")) for one in params]
    names = {str(PRESETS.get(name, {}).get("dataset", name)) for name in given}
    return sorted(name for name in names if HUB_ID.fullmatch(name) and not Path(name).exists())


def _prompt(stages: Sequence[Ancestor]) -> dict[str, Any]:
    """Return the tags, the system turn and the length of answers that were set last."""
    preset, system, longest = DEFAULT, "", 1024
    for stage in stages:
        preset = str(stage.setting("transcript", preset))
        longest = stage.setting("max_completion_length", stage.setting("max_new_tokens", longest))
        if stage.setting("tasks"):
            own = stage.setting("system_prompt")
            system = tags_of(preset).system_prompt if own is None else str(own)
    return {"tags": tags_of(preset), "system": system, "max_new_tokens": int(longest)}


def _settings(stage: Ancestor) -> str:
    """Return the stage's settings as they were given: its YAML and the overrides."""
    given = {k: v for k, v in stage.manifest.given.items() if not k.startswith("hub_")}
    return yaml.safe_dump(public_settings(given), sort_keys=False, allow_unicode=True).rstrip("\n")


def _inputs(stage: Ancestor) -> str:
    """Return a stage's inputs: each role once, with all inputs of that role."""
    by_role: dict[str, list[str]] = {}
    for role, origin in stage.took.items():
        by_role.setdefault(role.partition(".")[0], []).append(linked(origin))
    for _, model, _ in _teachers([stage]):
        by_role["teacher"] = [f"`{code(model)}`"]
    return "; ".join(f"{code(role)}: {', '.join(names)}" for role, names in by_role.items())


def _result(stage: Ancestor) -> str:
    """Return a stage's main results and its duration."""
    metrics = stage.manifest.metrics
    skipped = "train_loss" if "reward" in metrics else ""  # of GRPO, where it says nothing
    shown = [
        words.format_map(metrics)
        for key, words in RESULTS.items()
        if key in metrics and key != skipped
    ]
    return ", ".join([*shown, f"{stage.manifest.seconds:,.0f} s on {code(stage.manifest.device)}"])


def _teachers(stages: Sequence[Ancestor]) -> list[tuple[str, str, str]]:
    """Return each teacher of the traces once: its kind, its model or kind, and its server."""
    found: dict[tuple[str, str, str], None] = {}
    for stage in stages:
        if stage.manifest.recipe == "collect":
            kind = str(stage.setting("teacher", "offline"))
            host = urlsplit(str(stage.setting("base_url") or "")).hostname or ""
            found[kind, public(str(stage.setting("model") or kind)), host] = None
    return list(found)
