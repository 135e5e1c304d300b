"""Gates: what a stage that measures models must find, or the chain stops there.

`gate: {metric: accuracy, min: 0.2}` asks for a number, `gate: {beats: cold, p: 0.05}` for a paired
difference that chance does not explain. A list of both kinds asks for all of them. The model is
the last of the stage's `models` unless `model` names another. A gate decides nothing of what a
stage makes: changing one makes no stage stale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError, hint, refuse_unknown
from chainforge.core.jsonl import Row, read_rows
from chainforge.report.formatting import p_words, points
from chainforge.report.readings import results_of

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
_KEYS = ("metric", "min", "max", "beats", "p", "model")
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Gate:
    """One demand on one model: a metric between bounds, or better than another model."""

    model: str
    metric: str | None = None
    low: float | None = None
    high: float | None = None
    beats: str | None = None
    p: float = SIGNIFICANT

    def __str__(self) -> str:
        """Return what it asks, as in a plan."""
        if self.beats is not None:
            return f"{self.model} beats {self.beats} (p < {self.p:g})"
        least = f"at least {self.low:g}" if self.low is not None else ""
        most = f"at most {self.high:g}" if self.high is not None else ""
        return f"{self.metric} of {self.model} {' and '.join(filter(None, (least, most)))}"

    def as_given(self) -> dict[str, Any]:
        """Return it as a chain's YAML would say it, for `read_gates`."""
        if self.beats is not None:
            return {"model": self.model, "beats": self.beats, "p": self.p}
        bounds = {"min": self.low, "max": self.high}
        said = {key: value for key, value in bounds.items() if value is not None}
        return {"model": self.model, "metric": self.metric, **said}


def read_gates(given: Any, models: Sequence[str]) -> tuple[Gate, ...]:
    """Read a stage's key `gate`; raise `InputError` for what cannot be asked of its models."""
    entries = given if isinstance(given, list) else [] if given is None else [given]
    if entries and not models:
        raise InputError(
            "key 'gate': only a stage that measures models has one; give it to the evaluate stage "
            "that comes before what must not start"
        )
    return tuple(_read(entry, models) for entry in entries)


def _read(entry: Any, models: Sequence[str]) -> Gate:
    if not isinstance(entry, dict):
        raise InputError(
            f"key 'gate': expected {{metric: accuracy, min: 0.2}} or {{beats: cold}}, not {entry!r}"
        )
    refuse_unknown(entry, _KEYS, "key 'gate': ")
    if ("metric" in entry) == ("beats" in entry):
        raise InputError("key 'gate': needs `metric` or `beats`, and not both; a list holds more")
    for key in ("model", "beats"):
        if key in entry and entry[key] not in models:
            raise InputError(
                f"key 'gate': {key}: the stage measures no model {entry[key]!r}; "
                f"{hint(str(entry[key]), models)}"
            )
    model = entry.get("model", models[-1])
    if "beats" in entry:
        return _comparison(entry, model)
    _check_metric(entry["metric"])
    low, high = (_number(entry, key) for key in ("min", "max"))
    if low is None and high is None:
        raise InputError("key 'gate': `metric` needs a `min`, a `max` or both")
    if "p" in entry:
        raise InputError("key 'gate': `p` goes with `beats`")
    if low is not None and high is not None and low > high:
        raise InputError(f"key 'gate': nothing lies between min {low:g} and max {high:g}")
    return Gate(model, metric=entry["metric"], low=low, high=high)


def _comparison(entry: dict[str, Any], model: str) -> Gate:
    if {"min", "max"} & entry.keys():
        raise InputError("key 'gate': `min` and `max` go with `metric`, `p` goes with `beats`")
    if entry["beats"] == model:
        raise InputError(f"key 'gate': {model} cannot beat itself; name another as `model`")
    p = _number(entry, "p")
    if p is not None and not 0 < p <= 1:
        raise InputError(f"key 'gate': p is {p:g}; need a share above 0 and up to 1, like 0.05")
    return Gate(model, beats=entry["beats"], p=SIGNIFICANT if p is None else p)


def _check_metric(metric: Any) -> None:
    if not isinstance(metric, str) or not (metric in METRICS or _AT_K.fullmatch(metric)):
        known = [*METRICS, "pass@4", "maj@4"]
        raise InputError(f"key 'gate': no metric {metric!r}; {hint(str(metric), known)}")


def _number(entry: dict[str, Any], key: str) -> float | None:
    value = entry.get(key)
    if value is None or (type(value) in (int, float) and math.isfinite(value)):
        return value
    raise InputError(f"key 'gate': {key} must be a number, not {value!r}")


def check_samples(gates: Sequence[Gate], settings: Mapping[str, Any]) -> None:
    """Refuse pass@k and maj@k that a stage's samples of a prompt, by its settings, do not give."""
    from chainforge.data.metrics import steps_to
    from chainforge.generate.settings import SamplingArgs

    try:
        num_samples = int(settings.get("num_samples", SamplingArgs.num_samples))
    except (TypeError, ValueError):
        return  # the recipe itself will refuse it, by name
    for gate in gates:
        found = _AT_K.fullmatch(gate.metric or "")
        if found and int(found[2]) not in steps_to(num_samples):
            known = ", ".join(f"{found[1]}@{k}" for k in steps_to(num_samples))
            raise InputError(
                f"key 'gate': {num_samples} samples of a prompt give no {gate.metric}, but {known}"
            )


@dataclass(frozen=True)
class Verdict:
    """What the gates of a finished stage found, a sentence for each."""

    opened: list[str]
    shut: list[str]

    @property
    def passed(self) -> bool:
        """Whether all of them are open."""
        return not self.shut


def judge(gates: Sequence[Gate], directory: Path) -> Verdict:
    """Return what was found for each gate of a finished stage."""
    results = results_of(directory / "results.json")
    found = Verdict([], [])
    for gate in gates:
        judged = _judge_pair if gate.beats is not None else _judge_metric
        passed, words = judged(gate, results, directory)
        (found.opened if passed else found.shut).append(words)
    return found


def verdict(gates: Sequence[Gate], directory: Path) -> Verdict | None:
    """Judge the gates of a finished stage for who only looks; None where there are none.

    What cannot be judged is shut, and says why: a run would stop there, too.
    """
    if not gates:
        return None
    try:
        return judge(gates, directory)
    except InputError as error:
        return Verdict([], [f"it cannot be judged: {error}"])


def _judge_metric(gate: Gate, results: dict[str, Any], directory: Path) -> tuple[bool, str]:
    measured = next((m for m in results["models"] if m["name"] == gate.model), None)
    if measured is None:
        raise InputError(f"{directory / 'results.json'} has no model {gate.model!r}")
    found = _AT_K.fullmatch(str(gate.metric))
    value: Any = measured
    for key in (f"{found[1]}_at_k", found[2]) if found else METRICS[str(gate.metric)]:
        value = value.get(key) if isinstance(value, dict) else None
    what = f"{gate.metric} of {gate.model}"
    if value is None:  # nothing was solved, or nothing was readable: no bound is kept
        return False, f"{what} has no value, and must be {str(gate).removeprefix(what).strip()}"
    digits = f"{value:.3f}" if abs(value) <= 1 else f"{value:.1f}"
    if gate.low is not None and value < gate.low:
        return False, f"{what} is {digits}, below the {gate.low:g} that it must reach"
    if gate.high is not None and value > gate.high:
        return False, f"{what} is {digits}, above the {gate.high:g} that it may be"
    return True, f"{what} is {digits}"


def _judge_pair(gate: Gate, results: dict[str, Any], directory: Path) -> tuple[bool, str]:
    pair = next(
        (p for p in results["pairs"] if (p["from"], p["to"]) == (gate.beats, gate.model)), None
    ) or _compared(gate, directory)
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
