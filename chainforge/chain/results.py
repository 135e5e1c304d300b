"""Print what a chain was worth: each model's accuracy with its interval, then the differences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from chainforge.chain.chain import Chain
from chainforge.report.formatting import count, p_value, points, sampled
from chainforge.report.readings import results_of


def print_results(chain: Chain, directory: Path, console: Console) -> None:
    """Print the tables of every stage that measured models."""
    for stage in chain.stages:
        path = directory / stage.name / "results.json"
        if path.is_file():
            show_results(results_of(path), console)


def show_results(results: dict[str, Any], console: Console) -> None:
    """Print the tables of one results.json; of an earlier version's what there is of them."""
    models = results["models"]
    console.print(models_table(models))
    if all("language" in model for model in models):
        console.print(lengths_table(models))
    if any(len(model["pass_at_k"]) > 1 for model in models):
        console.print(samples_table(models))
    if any(len(model.get("tasks") or {}) > 1 for model in models):
        console.print(tasks_table(models))
    if results["pairs"]:
        console.print(pairs_table(results["pairs"]))
    if how := sampled(results.get("settings") or {}):
        console.print(f"sampled with {how}", markup=False)


def models_table(models: list[dict[str, Any]]) -> Table:
    """One row for each model."""
    rows = sorted({model["n"] for model in models})
    over = len(models[0]["strict"].get("seeds") or {}) if models else 0
    title = f"accuracy on {' to '.join(f'{n:,}' for n in rows)} held-out rows (95 % interval)"
    title += f", mean of {over} seeds" if over else ""
    table = _table(title, "strict %", "lenient %", "format %", "tokens")
    for model in models:
        table.add_row(
            model["name"],
            _with_interval(model["strict"]),
            _with_interval(model["lenient"]),
            f"{100 * model['format']:.1f}",
            count(model["tokens_mean"]),
        )
    return table


def lengths_table(models: list[dict[str, Any]]) -> Table:
    """One row for each model: how long its answers are, and what one that is right costs."""
    title = "length and language of the first sample"
    table = _table(title, "reasoning tokens", "tokens/solved", "cut %", "language %")
    for model in models:
        table.add_row(
            model["name"],
            count(model.get("reasoning_tokens_mean")),
            count(model["tokens_per_solved"]),
            _percent(model["truncated"]),
            _percent(model["language"]),
        )
    return table


def samples_table(models: list[dict[str, Any]]) -> Table:
    """One row for each model: what more samples of a prompt give."""
    most = max((max(model["pass_at_k"], key=int) for model in models), key=int)
    title = f"{most} samples of each prompt"
    table = _table(title, "pass@1 %", f"pass@{most} %", f"maj@{most} %")
    for model in models:
        once = model.get("pass_at_1")
        table.add_row(
            model["name"],
            _with_interval(once) if once else _percent(model["pass_at_k"]["1"]),
            _percent(model["pass_at_k"].get(most)),
            _percent(model["maj_at_k"].get(most)),
        )
    return table


def tasks_table(models: list[dict[str, Any]]) -> Table:
    """One row for each model, one column for each task; the mean of the tasks has an interval."""
    table = _table("strict accuracy by task, in %")
    tasks = list(dict.fromkeys(task for model in models for task in model["tasks"]))
    for task in tasks:
        table.add_column(_broken(task), justify="right", overflow="fold")
    table.add_column("mean", justify="right", no_wrap=True)
    for model in models:
        shares = [model["tasks"].get(task, {}).get("strict") for task in tasks]
        table.add_row(
            model["name"],
            *(_percent(share and share["mean"]) for share in shares),
            _with_interval(model["macro"]["strict"]) if "macro" in model else "–",
        )
    return table


def pairs_table(pairs: list[dict[str, Any]]) -> Table:
    """One row for each comparison of two models on the same rows."""
    title = "paired differences in strict accuracy, in points"
    table = _table(title, "difference", "95 % interval", "p", names=("from", "to"))
    for pair in pairs:
        table.add_row(
            pair["from"],
            pair["to"],
            points(pair["difference"]),
            f"{points(pair['low'])} to {points(pair['high'])}",
            p_value(pair["p"]),
        )
    return table


def _table(title: str, *numbers: str, names: Sequence[str] = ("model",)) -> Table:
    """Return a table without rows: columns of names, then columns of numbers."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for name in names:
        table.add_column(name, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right")
    return table


def _broken(name: str) -> str:
    """Break a long name into lines where it has a joint, lest a column's width does it anywhere."""
    return name if len(name) < 12 else re.sub(r"(?<=[_-])(?=.)", "\n", name)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _with_interval(share: dict[str, float]) -> str:
    """Write a share in percent with its interval, short enough for 80 columns."""
    texts = (f"{100 * share[key]:.1f}" for key in ("mean", "low", "high"))
    mean, low, high = ("100" if text == "100.0" else text for text in texts)
    return f"{mean} ({low} to {high})"
