"""Quality gates: conditions on an evaluation's results; the chain stops where one is not met.

`gate: {metric: accuracy, min: 0.2}` asks for a number, `gate: {beats: base, p: 0.05}` for a paired
difference that chance does not explain. A list of both kinds asks for all of them. The model is
the last of the stage's `models` unless `model` names another. A gate is no part of what a stage
makes: changing one makes no stage stale.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from chainforge.core.errors import InputError, hint, refuse_unknown
from chainforge.core.jsonl import Row, read_rows
from chainforge.core.run_dir import Number, StageDir
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


class Gate(msgspec.Struct, frozen=True):
    """One condition on one model: a metric between bounds, or better than another model."""

    model: str
    metric: str | None = None
    min: Number | None = None
    max: Number | None = None
    beats: str | None = None
    p: Annotated[float, Meta(gt=0, le=1)] = 0.05

    def __str__(self) -> str:
        """Return the condition as `plan` prints it."""
        if self.beats is not None:
            return f"{self.model} beats {self.beats} (p < {self.p:g})"
        least = f"at least {self.min:g}" if self.min is not None else ""
        most = f"at most {self.max:g}" if self.max is not None else ""
        return f"{self.metric} of {self.model} {' and '.join(filter(None, (least, most)))}"


@dataclass(frozen=True)
class Verdict:
    """What the gates of a finished stage found, a sentence for each."""

    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def read_gates(given: Any, models: Sequence[str]) -> tuple[Gate, ...]:
    """Read a stage's key `gate`; raise `InputError` for what cannot be asked of its models."""
    entries = given if isinstance(given, list) else [] if given is None else [given]
    if entries and not models:
        raise InputError("key 'gate': only a stage that measures models may have one")
    try:
        return tuple(_read(entry, models) for entry in entries)
    except (InputError, msgspec.ValidationError) as error:
        raise InputError(f"key 'gate': {error}") from None


def _read(entry: Any, models: Sequence[str]) -> Gate:
    refuse_unknown(entry if isinstance(entry, dict) else (), Gate.__struct_fields__)
    gate = msgspec.convert(
        {"model": models[-1]} | entry if isinstance(entry, dict) else entry, Gate
    )
    bounded = gate.min is not None or gate.max is not None
    if (gate.metric is None) == (gate.beats is None) or bounded != (gate.metric is not None):
        raise InputError("give `metric` with `min`, `max` or both, or else `beats` with `p`")
    for name in filter(None, (gate.model, gate.beats)):
        if name not in models:
            raise InputError(f"the stage measures no model {name!r}; {hint(name, models)}")
    if gate.beats == gate.model:
        raise InputError(f"{gate.model} cannot beat itself; name another as `model`")
    if gate.metric and not (gate.metric in METRICS or _AT_K.fullmatch(gate.metric)):
        known = hint(gate.metric, [*METRICS, "pass@4", "maj@4"])
        raise InputError(f"no metric {gate.metric!r}; {known}")
    return gate


def judge(gates: Sequence[Gate], directory: Path) -> Verdict:
    """Return which gates of a finished stage passed; one that cannot be judged has failed."""
    found = Verdict()
    for gate in gates:
        try:
            results = StageDir(directory).results
            if results is None:
                raise InputError(f"{directory / 'results.json'}: no such file")
            judged = _judge_pair if gate.beats is not None else _judge_metric
            passed, words = judged(gate, results, directory)
        except InputError as error:
            passed, words = False, f"{gate}: cannot be judged: {error}"
        (found.passed if passed else found.failed).append(words)
    return found


def _judge_metric(gate: Gate, results: dict[str, Any], directory: Path) -> tuple[bool, str]:
    value: Any = next((m for m in results["models"] if m["name"] == gate.model), None)
    if value is None:
        raise InputError(f"{directory / 'results.json'} has no model {gate.model!r}")
    found = _AT_K.fullmatch(str(gate.metric))
    for key in (f"{found[1]}_at_k", found[2]) if found else METRICS[str(gate.metric)]:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:  # nothing was solved, nothing was readable, or too few samples for pass@k
        return False, f"{gate}: the metric has no value"
    what = f"{gate.metric} of {gate.model} is {value:.{3 if abs(value) <= 1 else 1}f}"
    if gate.min is not None and value < gate.min:
        return False, f"{what}, below the required {gate.min:g}"
    if gate.max is not None and value > gate.max:
        return False, f"{what}, above the allowed {gate.max:g}"
    return True, what


def _judge_pair(gate: Gate, results: dict[str, Any], directory: Path) -> tuple[bool, str]:
    pairs = (p for p in results["pairs"] if (p["from"], p["to"]) == (gate.beats, gate.model))
    pair = next(pairs, None) or _compared(gate, directory)
    difference, p = float(pair["difference"]), float(pair["p"])
    passed = difference > 0 and p < gate.p
    does = "beats" if passed else "does not beat"
    found = f"{points(difference)} points against {gate.beats}, {p_words(p)}"
    why = "" if passed else f"; it must be better, with p below {gate.p:g}"
    return passed, f"{gate.model} {does} {gate.beats}: {found}{why}"


def _compared(gate: Gate, directory: Path) -> Row:
    """Compare two models that the stage did not compare itself, by their samples."""
    from chainforge.data.metrics import compare

    rows = read_rows(directory / "samples.jsonl")
    first, second = (
        [row for row in rows if row.get("model") == name] for name in (gate.beats, gate.model)
    )
    return compare(str(gate.beats), first, gate.model, second)
