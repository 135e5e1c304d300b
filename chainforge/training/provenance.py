"""What a card tells of a stage's past and worth: lineage, funnels, results, terms of teachers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from chainforge.core.upload import HUB_ID
from chainforge.data.collection.card import OFFLINE, TERMS
from chainforge.data.selection.datasheet import code, funnel_table, section
from chainforge.training.lineage import Ancestor, data_sets, results_of, teachers

VERBS = {
    "collect": "collects reasoning traces",
    "sft": "supervised fine-tuning",
    "grpo": "reinforcement learning by GRPO",
    "reject": "rejection sampling",
    "distill": "on-policy distillation",
}


def linked(name: str) -> str:
    """Return a model's name, with a link to where it is on the Hub."""
    known = HUB_ID.fullmatch(name)
    return f"[{name}](https://huggingface.co/{name})" if known else f"`{code(public(name))}`"


def public(name: str) -> str:
    """Return a path without what it tells of this machine."""
    return name if HUB_ID.fullmatch(name) or not os.path.isabs(name) else os.path.basename(name)


def story(stages: Sequence[Ancestor], funnels: Sequence[Ancestor]) -> list[str]:
    """Tell the lineage, and where the samples of the data stages among `funnels` went."""
    if not stages:
        return []
    lines = ["| stage | what it does | from | result |", "|---|---|---|---|"]
    for stage in stages:
        took = "; ".join(
            f"{code(role.partition('.')[0])}: `{code(public(name))}`"
            for role, name in stage.took.items()
        )
        verb = VERBS.get(stage.manifest.recipe, code(stage.manifest.recipe))
        lines.append(f"| `{code(stage.name)}` | {verb} | {took} | {_result(stage)} |")
    parts = [section("How it was made", "\n".join(lines), _versions(stages[-1]))]
    for stage in funnels:
        funnel = stage.funnel()
        if funnel and funnel["dropped"]:
            title = f"Where the samples of {code(stage.name)} went"
            parts.append(section(title, funnel_table(funnel, "samples")))
    return parts


def _result(stage: Ancestor) -> str:
    metrics = stage.manifest.metrics
    words = []
    if "kept" in metrics and "in" in metrics:
        words.append(f"{metrics['kept']:,} of {metrics['in']:,} samples kept")
    if "steps" in metrics:
        words.append(f"{metrics['steps']:,} steps")
    if "reward" in metrics:
        words.append(f"reward {metrics['reward']:.3g} at the end")
    elif "train_loss" in metrics:
        words.append(f"mean loss {metrics['train_loss']:.3g}")
    words.append(f"{stage.manifest.seconds:,.0f} s on {code(stage.manifest.device)}")
    return ", ".join(words)


def _versions(stage: Ancestor) -> str:
    named = ", ".join(f"{name} {code(number)}" for name, number in stage.manifest.versions.items())
    return f"Seed {stage.manifest.seed}. Versions: {named}."


def results(stage: Ancestor) -> list[str]:
    """Show what evaluations beside the stage measured, or say that there was none."""
    parts = []
    for name, row, pairs in results_of(stage):
        lines = [
            "| held-out rows | strict % | lenient % | well formed % | tokens an answer |",
            "|--:|--:|--:|--:|--:|",
            f"| {row['n']:,} | {_interval(row['strict'])} | {_interval(row['lenient'])} "
            f"| {100 * row['format']:.1f} | {row['tokens_mean']:.1f} |",
        ]
        parts.append(f"Stage `{code(name)}`, with 95 % (Wilson) intervals:\n\n" + "\n".join(lines))
        if pairs:
            parts.append("\n".join(_difference(pair) for pair in pairs))
    return parts or ["Nothing was measured: no evaluation of this run names it."]


def _interval(share: Mapping[str, float]) -> str:
    mean, low, high = (100 * share[key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _difference(pair: Mapping[str, Any]) -> str:
    points, low, high = (100 * pair[key] for key in ("difference", "low", "high"))
    return (
        f"- from `{code(pair['from'])}` to `{code(pair['to'])}`: {points:+.1f} points of strict "
        f"accuracy ({low:+.1f} to {high:+.1f}), McNemar's p = {pair['p']:.2g}"
    )


def terms(stages: Sequence[Ancestor]) -> str:
    """Say on which terms those who wrote the traces let them be trained on."""
    lines = []
    for kind, model, host in teachers(list(stages)):
        if kind == "offline":
            lines.append(f"- {OFFLINE}")
        else:
            who = f"`{code(model)}`" if model else f"the teacher `{code(kind)}`"
            says = TERMS.get(kind, "").format(hosts=f"`{code(host)}`" if host else "the server")
            lines.append(f"- Traces were written by {who}. {says}")
    if sets := data_sets(list(stages)):
        named = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in sets)
        lines.append(f"- The questions of {named} have licences of their own.")
    return "\n".join(lines)
