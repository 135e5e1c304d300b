"""Print what an evaluation measured: each model's accuracy with its interval, then differences."""

from __future__ import annotations

import re
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from chainforge.report.formatting import count, p_value, points, sampled

Models = list[dict[str, Any]]


def show_results(results: dict[str, Any], console: Console) -> None:
    """Print the tables of one results.json; of an earlier version's what there is of them."""
    models: Models = results["models"]
    console.print(_accuracy(models))
    if all("language" in model for model in models):
        console.print(_lengths(models))
    if any(len(model["pass_at_k"]) > 1 for model in models):
        console.print(_samples(models))
    if any(len(model.get("tasks") or {}) > 1 for model in models):
        console.print(_tasks(models))
    if results["pairs"]:
        console.print(_pairs(results["pairs"]))
    if how := sampled(results.get("settings") or {}):
        console.print(f"sampled with {how}", markup=False)


def _accuracy(models: Models) -> Table:
    rows = sorted({model["n"] for model in models})
    seeds = len(models[0]["strict"].get("seeds") or {}) if models else 0
    title = f"accuracy on {' to '.join(f'{n:,}' for n in rows)} held-out rows (95 % interval)"
    title += f", mean of {seeds} seeds" if seeds else ""
    table = _table(title, "strict %", "lenient %", "format %", "tokens")
    for model in models:
        table.add_row(model["name"], _interval(model["strict"]), _interval(model["lenient"]),
                      _percent(model["format"]), count(model["tokens_mean"]))  # fmt: skip
    return table


def _lengths(models: Models) -> Table:
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


def _samples(models: Models) -> Table:
    most = max((max(model["pass_at_k"], key=int) for model in models), key=int)
    title = f"{most} samples of each prompt"
    table = _table(title, "pass@1 %", f"pass@{most} %", f"maj@{most} %")
    for model in models:
        once = model.get("pass_at_1")
        table.add_row(
            model["name"],
            _interval(once) if once else _percent(model["pass_at_k"]["1"]),
            _percent(model["pass_at_k"].get(most)),
            _percent(model["maj_at_k"].get(most)),
        )
    return table


def _tasks(models: Models) -> Table:
    table = _table("strict accuracy by task, in %")
    tasks = list(dict.fromkeys(task for model in models for task in model["tasks"]))
    for task in tasks:  # a long name is broken where it has a joint
        name = task if len(task) < 12 else re.sub(r"(?<=[_-])(?=.)", "\n", task)
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("mean", justify="right", no_wrap=True)
    for model in models:
        shares = [model["tasks"].get(task, {}).get("strict") for task in tasks]
        cells = [_percent(share and share["mean"]) for share in shares]
        cells.append(_interval(model["macro"]["strict"]) if "macro" in model else "–")
        table.add_row(model["name"], *cells)
    return table


def _pairs(pairs: list[dict[str, Any]]) -> Table:
    table = _table("paired differences in strict accuracy, in points", names=("from", "to"))
    for title in ("difference", "95 % interval", "p"):
        table.add_column(title, justify="right")
    for pair in pairs:
        interval = f"{points(pair['low'])} to {points(pair['high'])}"
        difference, p = points(pair["difference"]), p_value(pair["p"])
        table.add_row(pair["from"], pair["to"], difference, interval, p)
    return table


def _table(title: str, *numbers: str, names: tuple[str, ...] = ("model",)) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for name in names:
        table.add_column(name, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right")
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _interval(share: dict[str, float]) -> str:
    """Format a share in percent with its interval, short enough for 80 columns."""
    texts = (f"{100 * share[key]:.1f}" for key in ("mean", "low", "high"))
    mean, low, high = ("100" if text == "100.0" else text for text in texts)
    return f"{mean} ({low} to {high})"
