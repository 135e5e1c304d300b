"""Gather what the last evaluation of a chain says: models, gains, and the sentence on top."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chainforge.core.jsonl import Row
from chainforge.data.metrics import compare
from chainforge.report import formatting as wording
from chainforge.report.evidence import ChainEvidence, StageEvidence
from chainforge.report.rows import Entry, index
from chainforge.report.transcripts import first_samples

CHANCE = 0.05  # from this p on, chance alone could explain a difference
LABEL = 15  # percent of a drawing's width that a label needs, on a phone
# What a model may have been measured by, and what then gets a column; older files have less.
OPTIONAL = ("language", "reasoning_tokens_mean", "tokens_per_solved", "unjudged")


@dataclass(frozen=True)
class Gain:
    """A comparison of two models, and where in percent of the drawing's width it stands."""

    pair: dict[str, Any]
    low: float
    at: float
    high: float
    kind: str  # gain | loss | chance


@dataclass(frozen=True)
class Evaluation:
    """Models as `results.json` has them; `before` and `after` tell the chain's story.

    `axis` is what stands below the drawing of gains, and where; `has` says which columns there are;
    `asked` is how it was measured: label, text, and whether to set it as code.
    """

    stage: StageEvidence
    models: list[dict[str, Any]]
    gains: list[Gain]
    axis: list[tuple[float, str]]
    before: str
    after: dict[str, Any]
    main: dict[str, Any] | None
    sentences: list[str]
    tasks: list[str]
    steps: list[int]
    has: dict[str, bool]
    language: str
    seeds: int  # that were merged; 0 where there was one
    asked: list[tuple[str, str, bool]]


def evaluation_of(chain: ChainEvidence) -> Evaluation | None:
    """Return the last evaluation; None where nothing has been measured."""
    stage = chain.last_results()
    if stage is None or not stage.results or not stage.results["models"]:
        return None
    models, pairs = stage.results["models"], stage.results["pairs"]
    before, after = _ends(chain, [model["name"] for model in models])
    named = {model["name"]: model for model in models}
    main = _pair(stage, pairs, before, after)
    sentence = wording.solved(named[after]) + (f", {wording.gained(main)}" if main else "")
    last = next((pair for pair in pairs if pair["to"] == models[-1]["name"] != after), None)
    second = wording.solved(models[-1]) + f", {wording.gained(last)}" if last else ""
    shown = pairs if main is None or main in pairs else [*pairs, main]
    low, high = _span(shown)
    settings = stage.results.get("settings") or {}
    return Evaluation(
        stage=stage,
        models=models,
        gains=[_gain(pair, low, high) for pair in shown],
        axis=_axis(low, high),
        before=before,
        after=named[after],
        main=main,
        sentences=[f"{text}." for text in (sentence, second) if text],
        tasks=sorted({task for model in models for task in model.get("tasks", {})}),
        steps=sorted({int(k) for model in models for k in model.get("pass_at_k", {})}),
        has={key: any(model.get(key) for model in models) for key in OPTIONAL},
        language=str(settings.get("language", "en")),
        seeds=len(settings.get("seeds") or ()),
        asked=_asked(settings),
    )


def _ends(chain: ChainEvidence, models: list[str]) -> tuple[str, str]:
    """Choose which two models tell the chain's story: the first SFT and the last RL stage.

    Where one is missing, the first or the last model that was measured stands for it.
    """
    cold = [s.name for s in chain.stages if s.recipe == "sft" and s.name in models]
    final = [s.name for s in chain.stages if s.recipe == "grpo" and s.name in models]
    before, after = (cold or models)[0], (final or models)[-1]
    return (models[0], after) if before == after else (before, after)


def _pair(
    stage: StageEvidence, pairs: list[dict[str, Any]], before: str, after: str
) -> dict[str, Any] | None:
    """Return the comparison of two models: as it was written, or from the samples."""
    for pair in pairs:
        if (pair["from"], pair["to"]) == (before, after):
            return pair
    samples = first_samples(index(stage.samples))
    a, b = samples.get(before, {}), samples.get(after, {})
    if before == after or not a or a.keys() != b.keys():
        return None
    return compare(before, _rows(a), after, _rows(b))


def _rows(entries: dict[str, Entry]) -> list[Row]:
    return [{"id": entry.id, "correct": entry.correct} for entry in entries.values()]


def _span(pairs: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the ends of the drawing of gains: all intervals, and zero, to the next ten points."""
    low = min((pair["low"] for pair in pairs), default=0.0)
    high = max((pair["high"] for pair in pairs), default=0.0)
    low = max(-1.0, math.floor(10 * min(low, 0) + 1e-9) / 10)
    high = min(1.0, math.ceil(10 * max(high, 0) - 1e-9) / 10)
    return (low, high) if high > low else (-0.1, 0.1)


def _axis(low: float, high: float) -> list[tuple[float, str]]:
    """Return what stands below the drawing of gains; an end too near to zero has no label."""
    zero = _at(0, low, high)
    ends = [(_at(end, low, high), wording.points(end).removesuffix(".0")) for end in (low, high)]
    return sorted([(zero, "0"), *(end for end in ends if abs(end[0] - zero) > LABEL)])


def _at(value: float, low: float, high: float) -> float:
    """Return where a difference is, in percent of the drawing's width."""
    return round(min(100, max(0, 100 * (value - low) / (high - low))), 2)


def _gain(pair: dict[str, Any], low: float, high: float) -> Gain:
    left, at, right = (_at(pair[key], low, high) for key in ("low", "difference", "high"))
    kind = "chance" if pair["p"] >= CHANCE else "gain" if pair["difference"] > 0 else "loss"
    return Gain(pair, left, at, right, kind)


def _asked(settings: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Return how the models were measured, from what `results.json` tells of it."""
    if not settings:
        return []
    engine = f"{(settings.get('sampling') or {}).get('engine', '')}, dtype {settings.get('dtype')}"
    said = [("Sampling", wording.sampled(settings), False), ("Engine", engine, False)]
    for task in settings.get("tasks") or []:
        said.append(("Task", json.dumps(task, ensure_ascii=False), True))
    said.append(("Transcript", f"{settings.get('transcript')}", False))
    asked = settings.get("system_prompt")
    said.append(("System prompt", asked or "none", bool(asked)))
    for key in ("extra_body", "engine_options"):
        if settings.get(key):
            said.append((key, json.dumps(settings[key], ensure_ascii=False), True))
    return said
