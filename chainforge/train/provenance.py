"""What a card tells of a stage's past: its lineage, where the rows went, and on which terms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from chainforge.core.sharing import public
from chainforge.core.upload import HUB_ID
from chainforge.data.datasheet import code, funnel_table, section
from chainforge.data.sources import PRESETS
from chainforge.generate.card import OFFLINE, TERMS
from chainforge.train.lineage import Ancestor, Origin, base_of, roots

VERBS = {
    "collect": "collects reasoning traces",
    "sft": "supervised fine-tuning",
    "grpo": "reinforcement learning by GRPO",
    "reject": "rejection sampling",
    "distill": "on-policy distillation",
}


def named(origin: Origin) -> str:
    """Return a model's name, with a link to where it is on the Hub."""
    if origin.on_hub and HUB_ID.fullmatch(origin.name):
        return f"[{origin.name}](https://huggingface.co/{origin.name})"
    return f"`{code(public(origin.name))}`"


def story(stages: Sequence[Ancestor], funnels: Sequence[Ancestor]) -> list[str]:
    """Tell the lineage, and where the samples of the data stages among `funnels` went."""
    if not stages:
        return []
    lines = ["| stage | what it does | made from | result |", "|---|---|---|---|"]
    for stage in stages:
        verb = VERBS.get(stage.manifest.recipe, code(stage.manifest.recipe))
        cells = (f"`{code(stage.name)}`", verb, _took(stage), _result(stage))
        lines.append(f"| {' | '.join(cells)} |")
    parts = [section("How it was made", "\n".join(lines), _versions(stages[-1]))]
    for stage in funnels:
        funnel = stage.funnel()
        if funnel and funnel["dropped"]:
            title = f"Where the samples of `{code(stage.name)}` went"
            parts.append(section(title, funnel_table(funnel, "samples")))
    return parts


def _took(stage: Ancestor) -> str:
    """Return what a stage was made from: each role once, with all that had it."""
    by_role: dict[str, list[str]] = {}
    for role, origin in stage.took.items():
        by_role.setdefault(role.partition(".")[0], []).append(named(origin))
    for kind, model, _ in _teachers([stage]):
        by_role["teacher"] = [f"`{code(model or kind)}`"]
    return "; ".join(f"{code(role)}: {', '.join(names)}" for role, names in by_role.items())


def _result(stage: Ancestor) -> str:
    metrics = stage.manifest.metrics
    words = []
    if "kept" in metrics and "in" in metrics:
        words.append(f"{metrics['kept']:,} of {metrics['in']:,} samples kept")
    if "steps" in metrics:
        words.append(f"{metrics['steps']:,} step{'s' if metrics['steps'] != 1 else ''}")
    if "reward" in metrics:
        words.append(f"reward {metrics['reward']:.3g} at the end")
    elif "train_loss" in metrics:
        words.append(f"mean loss {metrics['train_loss']:.3g}")
    words.append(f"{_time(stage.manifest.seconds)} on {code(stage.manifest.device)}")
    return ", ".join(words)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def _versions(stage: Ancestor) -> str:
    versions = stage.manifest.versions
    told = ", ".join(f"{code(name)} {code(number)}" for name, number in versions.items())
    return f"Seed {stage.manifest.seed}. Versions: {told}."


def terms(stages: Sequence[Ancestor], what: str) -> str:
    """Return the terms on which others let their part be used: who wrote rows, and other models."""
    lines = []
    for kind, model, host in _teachers(stages):
        if kind == "offline":
            lines.append(f"- {OFFLINE}")
        else:
            who = f"`{code(model)}`" if model else f"the teacher `{code(kind)}`"
            says = TERMS.get(kind, "").format(hosts=f"`{code(host)}`" if host else "the server")
            lines.append(f"- Traces were written by {who}. {says}")
    if others := _others(stages, what):
        lines.append(
            f"- Rows were written, or targets given, by models that began as {', '.join(others)}. "
            "The licences of those may ask something of what learns from them."
        )
    if sets := data_sets(stages):
        linked = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in sets)
        lines.append(f"- The questions of {linked} have licences of their own.")
    return "\n".join(lines)


def _others(stages: Sequence[Ancestor], what: str) -> list[str]:
    """Return the models, beside the base of a model, that what was learnt is from."""
    base = None if what == "dataset" else base_of(list(stages))
    found = roots(list(stages))
    return [named(one) for one in found if base is None or one.fingerprint != base.fingerprint]


def data_sets(stages: Sequence[Ancestor]) -> list[str]:
    """Return the data sets of the Hub that questions came from, of which rows were trained on."""
    found: list[str] = []
    for task in _tasks(stages):
        params = task.get("params") or {}
        if task.get("fn") == "hub" and isinstance(params, dict):
            name = str(params.get("dataset") or params.get("preset") or "")
            if not Path(name).exists():  # a copy on disk says nothing of where it is from
                found.append(str(PRESETS.get(name, {}).get("dataset", name)))
    return sorted({name for name in found if HUB_ID.fullmatch(name)})


def _tasks(stages: Sequence[Ancestor]) -> Iterator[dict[str, Any]]:
    for stage in stages:
        if stage.manifest.recipe != "evaluate":
            yield from (task for task in stage.setting("tasks") or () if isinstance(task, dict))


def _teachers(stages: Sequence[Ancestor]) -> list[tuple[str, str, str]]:
    """Return who wrote the traces: kind of teacher, its model, and its server, each once."""
    found = []
    for stage in stages:
        if stage.manifest.recipe == "collect":
            kind = str(stage.setting("teacher", "offline"))
            address = str(stage.setting("base_url") or "")
            host = urlsplit(address).hostname or ""
            found.append((kind, public(str(stage.setting("model") or "")), host))
    return list(dict.fromkeys(found))
