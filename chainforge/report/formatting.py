"""Format numbers for people, with their intervals, and print what an evaluation measured."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from chainforge.core.run_dir import StageDir

MINUS = "\u2212"

Model = dict[str, Any]
Columns = dict[str, Callable[[Model], str]]
# What tables of an evaluation show, by the heads of their columns.
ACCURACY: Columns = {
    "strict %": lambda model: _interval(model["strict"]),
    "lenient %": lambda model: _interval(model["lenient"]),
    "format %": lambda model: _percent(model["format"]),
    "tokens": lambda model: count(model["tokens_mean"]),
}
LENGTHS: Columns = {
    "reasoning tokens": lambda model: count(model.get("reasoning_tokens_mean")),
    "tokens/solved": lambda model: count(model.get("tokens_per_solved")),
    "cut %": lambda model: _percent(model["truncated"]),
    "language %": lambda model: _percent(model.get("language")),
}
PAIRS: Columns = {
    "from": lambda pair: str(pair["from"]),
    "to": lambda pair: str(pair["to"]),
    "difference": lambda pair: points(pair["difference"]),
    "95 % interval": lambda pair: f"{points(pair['low'])} to {points(pair['high'])}",
    "p": lambda pair: p_value(pair["p"]),
}
# Of models that lack some stages, against the one that has all.
HOURLY: Columns = {name: write for name, write in PAIRS.items() if name != "to"} | {
    "took": lambda pair: duration(pair.get("seconds")),
    "points/hour": lambda pair: per_hour(pair),
}
REWARD_PAIRS: Columns = {
    "from": PAIRS["from"],
    "to": PAIRS["to"],
    "reward": lambda pair: str(pair["reward"]),
    "difference": lambda pair: _signed(pair["difference"]),
    "95 % interval": lambda pair: f"{_signed(pair['low'])} to {_signed(pair['high'])}",
    "p": PAIRS["p"],
}


def percent(share: float | None, digits: int = 1) -> str:
    """Format a share of 0.8723 as 87.2 %; a dash for None."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def number(value: float) -> str:
    """Format a number in at most four digits or so: 12,000, 0.25, −0.003, 2e-05."""
    text = f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
    return text.replace("-", MINUS)


def finite(value: Any) -> float | None:
    """Return a value as a number where it is one, and finite."""
    if not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None


def points(difference: float, sign: bool = True) -> str:
    """Format a difference of shares in percentage points: +25.2, −3.0."""
    return f"{100 * difference:{'+' if sign else ''}.1f}".replace("-", MINUS)


def per_hour(pair: Mapping[str, Any]) -> str:
    """Format points for an hour of what the stages took: +540 (+410 to +680); a dash for none."""
    hours = pair.get("seconds", 0) / 3600
    values = [_signed(100 * pair[key] / hours) for key in ("difference", "low", "high") if hours]
    return "{} ({} to {})".format(*values) if values else "–"


def p_value(p: float) -> str:
    """Format p as 0.63, 0.031 or < 0.0001."""
    return "< 0.0001" if p < 0.0001 else f"{p:.{4 if p < 0.001 else 3 if p < 0.1 else 2}f}"


def p_words(p: float) -> str:
    """Format p as in a sentence: p = 0.031."""
    return f"p {p_value(p)}" if p < 0.0001 else f"p = {p_value(p)}"


def count(value: float | None) -> str:
    """Format a count or a mean of counts: 12,345 or 83.4."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:,.1f}"


def money(value: float | None) -> str:
    """Format US dollars; None is an unknown price."""
    if value is None:
        return "price not known"
    return f"${value:,.{2 if value == 0 or value >= 0.1 else 4}f}"


def duration(seconds: float | None) -> str:
    """Format seconds as 9.5 s, 48 s, 3 min 05 s or 2 h 07 min."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def solved(model: Mapping[str, Any]) -> str:
    """Return one model's accuracy: `rl solves 87.2 % of 500 held-out problems (84.0 ...)`."""
    strict = model["strict"]
    if strict is None:
        form = f"{percent(model['format'])} of its completions are in the asked form"
        return f"{model['name']} answered {model['n']:,} prompts; {form}"
    return (
        f"{model['name']} solves {percent(strict['mean'])} of {model['n']:,} held-out problems "
        f"(95 % interval {100 * strict['low']:.1f} to {percent(strict['high'])})"
    )


def gained(pair: Mapping[str, Any]) -> str:
    """Return a paired difference: `25.2 points more than base (21.0 to 29.4, p < 0.0001)`."""
    more = "more" if pair["difference"] >= 0 else "fewer"
    text = (
        f"{points(abs(pair['difference']), sign=False)} points {more} than {pair['from']} "
        f"({points(pair['low'])} to {points(pair['high'])}, {p_words(pair['p'])})"
    )
    return text if pair["p"] < 0.05 else f"{text}; chance alone could explain that"


def sampled(settings: Mapping[str, Any]) -> str:
    """Return how completions were sampled: `temperature 1, top-p 1, up to 72 tokens, seed 42`."""
    sampling = settings.get("sampling") or {}
    words = {
        "temperature": "temperature {:g}",
        "top_p": "top-p {:g}",
        "top_k": "top-k {}",
        "max_new_tokens": "up to {:,} tokens",
        "num_samples": "{} per prompt",
    }
    said = [text.format(sampling[key]) for key, text in words.items() if sampling.get(key)]
    if sampling.get("temperature") == 0:
        said.insert(0, "greedy decoding")
    seeds = settings.get("seeds") or [settings.get("seed")]
    return ", ".join([*said, f"seed {', '.join(map(str, seeds))}"]) if said else ""


def source(name: str) -> str:
    """Explain a row's `source`, to be read after "rows"."""
    return {
        "offline": "were written by the built-in solver, not by a language model",
        "offline-fallback": "were written by the built-in solver, since the teacher did not answer",
        "policy": "were sampled from the model that the stage was given",
        "not recorded": "have no source recorded",
    }.get(name, "were written by the teacher")


def headline(stage: StageDir) -> str:
    """Return a stage's result in a few words, or its progress while it is unfinished."""
    if stage.funnel:
        return f"kept {stage.funnel['kept']:,} of {stage.funnel['in']:,} rows"
    if stage.results and stage.results["models"]:
        measured = [model for model in stage.results["models"] if model["strict"]]
        if not measured:
            return f"{len(stage.results['models'])} models, without answers to check"
        best = max(measured, key=lambda model: model["strict"]["mean"])
        return f"best: {best['name']}, {percent(best['strict']['mean'])}"
    return ", ".join(filter(None, (stage.how_far, stage.progress["note"])))


def show_results(results: dict[str, Any], console: Console) -> None:
    """Print the tables of one results.json."""
    models, pairs = results["models"], results["pairs"]
    if models:
        for title, columns in _tables(models).items():
            named: Columns = {"model": lambda model: model["name"]}
            console.print(_table(title, named | columns, models))
    if pairs:
        columns = HOURLY if "seconds" in pairs[0] else PAIRS
        console.print(_table("paired differences in strict accuracy, in points", columns, pairs))
    for name, why in results.get("failed", {}).items():
        console.print(f"{name}: {why}", markup=False)
    if others := results.get("reward_pairs"):
        console.print(_table("paired differences in mean rewards", REWARD_PAIRS, others))
    if how := sampled(results.get("settings") or {}):
        console.print(f"sampled with {how}", markup=False)


def _tables(models: list[Model]) -> dict[str, Columns]:
    """Return the columns of the tables of models, by title."""
    rows = sorted({model["n"] for model in models})
    seeds = len((models[0]["strict"] or {}).get("seeds") or {})
    count_of = " to ".join(f"{n:,}" for n in rows)
    title = f"accuracy on {count_of} held-out rows (95 % interval)"
    title += f", mean of {seeds} seeds" if seeds else ""
    accuracy = ACCURACY
    if not any(model["strict"] for model in models):
        title = f"completions of {count_of} prompts without answers"
        accuracy = {name: ACCURACY[name] for name in ("format %", "tokens")}
    tables = {title: accuracy, "length and language of the first sample": LENGTHS}
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
    if any("general" in model for model in models):
        names = ("format %", "tokens", "language %")
        tables["prompts without an answer"] = {n: _general((ACCURACY | LENGTHS)[n]) for n in names}
    if rewards := rewards_of(models):
        tables["mean rewards (95 % interval)"] = {name: _of_reward(name) for name in rewards}
    return tables


def rewards_of(models: list[Model]) -> list[str]:
    """Return the names of the rewards that were measured."""
    return list(dict.fromkeys(name for model in models for name in model.get("rewards") or {}))


def _general(write: Callable[[Model], str]) -> Callable[[Model], str]:
    return lambda model: write(model["general"]) if "general" in model else "–"


def _of_reward(name: str) -> Callable[[Model], str]:
    return lambda model: scaled((model.get("rewards") or {}).get(name))


def scaled(value: Mapping[str, float] | None) -> str:
    """Format a mean of any scale with its interval: 0.62 (0.58 to 0.66)."""
    if value is None:
        return "–"
    mean, low, high = (number(value[key]) for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def change(pair: Mapping[str, Any]) -> str:
    """Format the difference of a mean reward: +0.12 (+0.08 to +0.16, p = 0.031)."""
    interval = REWARD_PAIRS["95 % interval"](dict(pair))
    return f"{_signed(pair['difference'])} ({interval}, {p_words(pair['p'])})"


def _signed(value: float) -> str:
    return "+" * (value >= 0) + number(value)


def _table(title: str, columns: Columns, rows: list[Model]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for name in columns:
        side = "left" if name in ("model", "from", "to") else "right"
        table.add_column(name, justify=side, no_wrap=name == "mean", overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(write(row) for write in columns.values()))
    return table


def _of_task(task: str) -> Callable[[Model], str]:
    return lambda model: _percent(model["tasks"].get(task, {}).get("strict", {}).get("mean"))


def _broken(task: str) -> str:
    """Break a long name into lines after each `_` or `-`."""
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
