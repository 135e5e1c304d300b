"""Quality gates: what an evaluation must find, or the chain stops there.

`gate: {metric: accuracy, min: 0.2}` asks for a number, `gate: {beats: base, p: 0.05}` for a paired
difference that chance does not explain. A list of both kinds asks for all of them. The model is
the last of the stage's `models` unless `model` names another. A gate is no part of what a stage
makes: changing one makes no stage stale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError, hint, refuse_unknown
from chainforge.core.jsonl import Row, read_rows
from chainforge.core.run_dir import StageDir
from chainforge.report.formatting import p_words, points

# What a gate may ask of a model, and where results.json has it.
METRICS = {
    "accuracy": ("strict", "mean"),
    "strict": ("strict", "mean"),
    "lenient": ("lenient", "mean"),
    "macro": ("macro", "strict", "mean"),
    "format": ("format",),
    "language": ("language",),
    "truncated": ("truncated",),
    "tokens": ("tokens_mean",),
    "tokens_per_solved": ("tokens_per_solved",),
}
_AT_K = re.compile(r"(pass|maj)@([1-9]\d*)")


@dataclass(frozen=True)
class Gate:
    """One demand on one model: a metric between bounds, or better than another model."""

    model: str
    metric: str | None = None
    low: float | None = None
    high: float | None = None
    beats: str | None = None
    p: float = 0.05

    def __str__(self) -> str:
        """Return what it asks, as in a plan."""
        if self.beats is not None:
            return f"{self.model} beats {self.beats} (p < {self.p:g})"
        return f"{self.metric} of {self.model} {self.bounds}"

    @property
    def bounds(self) -> str:
        """Return the bounds of its metric in words."""
        least = f"at least {self.low:g}" if self.low is not None else ""
        most = f"at most {self.high:g}" if self.high is not None else ""
        return " and ".join(filter(None, (least, most)))

    def as_given(self) -> dict[str, Any]:
        """Return it as a chain's YAML would have it, for `read_gates`."""
        given = {"model": self.model, "metric": self.metric, "min": self.low, "max": self.high,
                 "beats": self.beats, "p": self.p if self.beats else None}  # fmt: skip
        return {key: value for key, value in given.items() if value is not None}


@dataclass(frozen=True)
class Verdict:
    """What the gates of a finished stage found, a sentence for each."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def read_gates(given: Any, models: Sequence[str]) -> tuple[Gate, ...]:
    """Read a stage's key `gate`; raise `InputError` for what cannot be asked of its models."""
    entries = given if isinstance(given, list) else [] if given is None else [given]
    if entries and not models:
        raise InputError(
            "key 'gate': only a stage that measures models has one; give it to the evaluate stage "
            "that comes before what must not start"
        )
    try:
        return tuple(_read(entry, models) for entry in entries)
    except InputError as error:
        raise InputError(f"key 'gate': {error}") from None


def _read(entry: Any, models: Sequence[str]) -> Gate:
    if not isinstance(entry, dict):
        raise InputError(
            f"expected {{metric: accuracy, min: 0.2}} or {{beats: base}}, not {entry!r}"
        )
    refuse_unknown(entry, ("metric", "min", "max", "beats", "p", "model"))
    metric, beats, model = entry.get("metric"), entry.get("beats"), entry.get("model", models[-1])
    low, high, p = (_number(entry, key) for key in ("min", "max", "p"))
    if (metric is None) == (beats is None):
        raise InputError("needs `metric` or `beats`, and not both; a list holds more")
    for name in (model, *([beats] if beats else [])):
        if name not in models:
            raise InputError(f"the stage measures no model {name!r}; {hint(str(name), models)}")
    if beats is not None:
        if low is not None or high is not None:
            raise InputError("`min` and `max` go with `metric`, `p` goes with `beats`")
        if beats == model:
            raise InputError(f"{model} cannot beat itself; name another as `model`")
        if p is not None and not 0 < p <= 1:
            raise InputError(f"p is {p:g}; need a share above 0 and up to 1, like 0.05")
        return Gate(model, beats=beats, p=0.05 if p is None else p)
    if not isinstance(metric, str) or not (metric in METRICS or _AT_K.fullmatch(metric)):
        known = [*METRICS, "pass@4", "maj@4"]
        raise InputError(f"no metric {metric!r}; {hint(str(metric), known)}")
    if low is None and high is None:
        raise InputError("`metric` needs a `min`, a `max` or both")
    if p is not None:
        raise InputError("`p` goes with `beats`")
    if low is not None and high is not None and low > high:
        raise InputError(f"nothing is between min {low:g} and max {high:g}")
    return Gate(model, metric, low, high)


def _number(entry: dict[str, Any], key: str) -> float | None:
    value = entry.get(key)
    if value is None or (type(value) in (int, float) and math.isfinite(value)):
        return value
    raise InputError(f"{key} must be a number, not {value!r}")


def judge(gates: Sequence[Gate], directory: Path) -> Verdict:
    """Return what was found for each gate of a finished stage."""
    found = Verdict()
    results = StageDir(directory).results if gates else None
    if gates and results is None:
        raise InputError(f"{directory / 'results.json'}: no such file")
    for gate in gates:
        judged = _judge_pair if gate.beats is not None else _judge_metric
        passed, words = judged(gate, results or {}, directory)
        (found.passed if passed else found.failed).append(words)
    return found


def verdict(gates: Sequence[Gate], directory: Path) -> Verdict | None:
    """Judge the gates of a finished stage for a reader; None where there are no gates.

    What cannot be judged has failed, with the reason: a run would stop there, too.
    """
    try:
        return judge(gates, directory) if gates else None
    except InputError as error:
        return Verdict(failed=[f"it cannot be judged: {error}"])


def _judge_metric(gate: Gate, results: dict[str, Any], directory: Path) -> tuple[bool, str]:
    value: Any = next((m for m in results["models"] if m["name"] == gate.model), None)
    if value is None:
        raise InputError(f"{directory / 'results.json'} has no model {gate.model!r}")
    found = _AT_K.fullmatch(str(gate.metric))
    for key in (f"{found[1]}_at_k", found[2]) if found else METRICS[str(gate.metric)]:
        value = value.get(key) if isinstance(value, dict) else None
    what = f"{gate.metric} of {gate.model}"
    if value is None:  # nothing was solved, nothing was readable, or too few samples for pass@k
        return False, f"{what} has no value, and must be {gate.bounds}"
    digits = f"{value:.3f}" if abs(value) <= 1 else f"{value:.1f}"
    if gate.low is not None and value < gate.low:
        return False, f"{what} is {digits}, below the required {gate.low:g}"
    if gate.high is not None and value > gate.high:
        return False, f"{what} is {digits}, above the allowed {gate.high:g}"
    return True, f"{what} is {digits}"


def _judge_pair(gate: Gate, results: dict[str, Any], directory: Path) -> tuple[bool, str]:
    pairs = (p for p in results["pairs"] if (p["from"], p["to"]) == (gate.beats, gate.model))
    pair = next(pairs, None) or _compared(gate, directory)
    difference, p = float(pair["difference"]), float(pair["p"])
    found = f"{points(difference)} points against {gate.beats}, {p_words(p)}"
    if difference > 0 and p < gate.p:
        return True, f"{gate.model} beats {gate.beats}: {found}"
    why = f"p must be below {gate.p:g}" if difference > 0 else "it is not better"
    return False, f"{gate.model} does not beat {gate.beats}: {found}; {why}"


def _compared(gate: Gate, directory: Path) -> Row:
    """Compare two models that the stage did not compare itself, by their samples."""
    from chainforge.data.metrics import compare

    rows = read_rows(directory / "samples.jsonl")
    first, second = (
        [row for row in rows if row.get("model") == name] for name in (gate.beats, gate.model)
    )
    return compare(str(gate.beats), first, gate.model, second)
