"""Print what an evaluation measured: each model's accuracy with its interval, then differences."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from chainforge.report.formatting import count, p_value, points, sampled

Model = dict[str, Any]
Columns = dict[str, Callable[[Model], str]]


def show_results(results: dict[str, Any], console: Console) -> None:
    """Print the tables of one results.json."""
    models: list[Model] = results["models"]
    rows = sorted({model["n"] for model in models})
    seeds = len(models[0]["strict"].get("seeds") or {}) if models else 0
    title = f"accuracy on {' to '.join(f'{n:,}' for n in rows)} held-out rows (95 % interval)"
    title += f", mean of {seeds} seeds" if seeds else ""
    tables: dict[str, Columns] = {
        title: {
            "strict %": lambda model: _interval(model["strict"]),
            "lenient %": lambda model: _interval(model["lenient"]),
            "format %": lambda model: _percent(model["format"]),
            "tokens": lambda model: count(model["tokens_mean"]),
        },
        "length and language of the first sample": {
            "reasoning tokens": lambda model: count(model.get("reasoning_tokens_mean")),
            "tokens/solved": lambda model: count(model.get("tokens_per_solved")),
            "cut %": lambda model: _percent(model["truncated"]),
            "language %": lambda model: _percent(model.get("language")),
        },
    }
    most = max((int(k) for model in models for k in model.get("pass_at_k") or {}), default=1)
    if most > 1:
        tables[f"{most} samples of each prompt"] = {
            "pass@1 %": lambda model: _interval(model.get("pass_at_1")),
            f"pass@{most} %": lambda model: _percent(model["pass_at_k"].get(str(most))),
            f"maj@{most} %": lambda model: _percent(model["maj_at_k"].get(str(most))),
        }
    tasks = list(dict.fromkeys(task for model in models for task in model.get("tasks") or {}))
    if len(tasks) > 1:
        by_task: Columns = {_broken(task): _of_task(task) for task in tasks}
        mean: Columns = {"mean": lambda model: _interval(model.get("macro", {}).get("strict"))}
        tables["strict accuracy by task, in %"] = by_task | mean
    for title, columns in tables.items():
        console.print(_table(title, {"model": lambda model: model["name"]}, columns, models))
    if pairs := results["pairs"]:
        ends: Columns = {"from": lambda pair: pair["from"], "to": lambda pair: pair["to"]}
        numbers: Columns = {
            "difference": lambda pair: points(pair["difference"]),
            "95 % interval": lambda pair: f"{points(pair['low'])} to {points(pair['high'])}",
            "p": lambda pair: p_value(pair["p"]),
        }
        title = "paired differences in strict accuracy, in points"
        console.print(_table(title, ends, numbers, pairs))
    if how := sampled(results.get("settings") or {}):
        console.print(f"sampled with {how}", markup=False)


def _table(title: str, names: Columns, numbers: Columns, rows: list[Model]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for name in names:
        table.add_column(name, overflow="fold")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=number == "mean")
    for row in rows:
        table.add_row(*(write(row) for write in (names | numbers).values()))
    return table


def _of_task(task: str) -> Callable[[Model], str]:
    return lambda model: _percent(model["tasks"].get(task, {}).get("strict", {}).get("mean"))


def _broken(task: str) -> str:
    """Break a long name where it has a joint."""
    return task if len(task) < 12 else re.sub(r"(?<=[_-])(?=.)", "\n", task)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _interval(share: dict[str, float] | None) -> str:
    """Format a share in percent with its interval, short enough for 80 columns."""
    if share is None:
        return "–"
    texts = (f"{100 * share[key]:.1f}" for key in ("mean", "low", "high"))
    mean, low, high = ("100" if text == "100.0" else text for text in texts)
    return f"{mean} ({low} to {high})"
