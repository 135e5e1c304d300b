"""Gather what the last evaluation of a chain says: models, gains, and the sentence on top."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from chainforge.core.records import Row
from chainforge.data.measures import compare
from chainforge.pipeline import wording
from chainforge.pipeline.reporting.evidence import ChainEvidence, StageEvidence
from chainforge.pipeline.reporting.rows import Entry, index
from chainforge.pipeline.reporting.transcripts import first_samples

CHANCE = 0.05  # from this p on, chance alone could explain a difference


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

    `reach` is the difference at the ends of the drawing of gains.
    """

    stage: StageEvidence
    models: list[dict[str, Any]]
    gains: list[Gain]
    reach: float
    before: str
    after: dict[str, Any]
    main: dict[str, Any] | None
    sentences: list[str]
    tasks: list[str]
    steps: list[int]


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
    reach = _reach(shown)
    return Evaluation(
        stage=stage,
        models=models,
        gains=[_gain(pair, reach) for pair in shown],
        reach=reach,
        before=before,
        after=named[after],
        main=main,
        sentences=[f"{text}." for text in (sentence, second) if text],
        tasks=sorted({task for model in models for task in model.get("tasks", {})}),
        steps=sorted({int(k) for model in models for k in model.get("pass_at_k", {})}),
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


def _reach(pairs: list[dict[str, Any]]) -> float:
    """Return the largest difference within the intervals, up to the next ten points."""
    most = max((abs(pair[key]) for pair in pairs for key in ("low", "high")), default=0)
    return min(1.0, max(0.1, math.ceil(10 * most - 1e-9) / 10))


def _gain(pair: dict[str, Any], reach: float) -> Gain:
    low, at, high = (
        round(min(100, max(0, 50 + 50 * pair[key] / reach)), 2)
        for key in ("low", "difference", "high")
    )
    kind = "chance" if pair["p"] >= CHANCE else "gain" if pair["difference"] > 0 else "loss"
    return Gain(pair, low, at, high, kind)
