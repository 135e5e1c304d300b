"""Put the transcripts together, and say by what they can be filtered."""

from __future__ import annotations

from collections.abc import Sequence

from chainforge.report.accuracy import Evaluation
from chainforge.report.evidence import ChainEvidence
from chainforge.report.texts import Case
from chainforge.report.transcripts import (
    ALONE,
    DATA,
    HELD_OUT,
    KINDS,
    ROLLOUTS,
    held_out,
    of_data,
    of_rollouts,
)

# Bytes of the page for each kind of prompt; together with all else it stays well under 5 MB.
BUDGET = {HELD_OUT: 1_200_000, DATA: 700_000, ROLLOUTS: 500_000}
VERDICTS = {
    "right": "right",
    "wrong": "wrong",
    "form": "right, wrong form",
    "unknown": "not judged",
}

Options = list[tuple[str, str]]  # value and word


def cases_of(
    chain: ChainEvidence, evaluation: Evaluation | None
) -> tuple[list[Case], dict[str, int]]:
    """Return the prompts that the report shows, and how many held-out ones there are by kind."""
    cases: list[Case] = []
    kinds: dict[str, int] = {}
    if evaluation:
        models = [model["name"] for model in evaluation.models]
        ends = evaluation.before, evaluation.after["name"]
        cases, kinds = held_out(evaluation.stage.samples, models, *ends, BUDGET[HELD_OUT])
    data = [
        (stage.name, stage.samples)
        for stage in chain.stages
        if not stage.results and stage.recipe != "evaluate" and stage.samples.is_file()
    ]
    cases += of_data(data, BUDGET[DATA])
    rolled = [(s.name, s.directory / "rollouts.jsonl") for s in chain.stages]
    rolled = [(name, path) for name, path in rolled if path.is_file()]
    for name, path in rolled:
        cases += of_rollouts(name, path, BUDGET[ROLLOUTS] // len(rolled))
    return cases, kinds


def filters_of(cases: Sequence[Case], stages: Sequence[str]) -> list[tuple[str, str, Options]]:
    """Return each filter's name, label and options; a filter with one option only is left out."""
    texts = [text for case in cases for text in case.texts]
    there = list(dict.fromkeys(text.stage for text in texts))
    order = [name for name in there if name not in stages] + [n for n in stages if n in there]
    verdicts = {text.verdict for text in texts}
    fates = sorted({text.fate for text in texts} - {""}, key=lambda fate: (fate != "kept", fate))
    if sum(fate.startswith("dropped") for fate in fates) > 1:
        fates.insert(fates.index("kept") + 1 if "kept" in fates else 0, "dropped")
    kinds = {case.kind for case in cases if case.where == HELD_OUT}
    found: list[tuple[str, str, Options]] = [
        ("where", "prompts", _same(dict.fromkeys(case.where for case in cases))),
        ("stage", "stage", _same(order)),
        ("verdict", "verdict", [(v, word) for v, word in VERDICTS.items() if v in verdicts]),
        ("fate", "kept or dropped", [(f, "dropped, any reason" if f == "dropped" else f)
                                     for f in fates]),
        ("kind", "change", _same(k for k in (*KINDS.values(), *ALONE.values()) if k in kinds)),
        ("task", "task", _same(sorted({case.task for case in cases} - {""}))),
    ]  # fmt: skip
    always = ("where", "stage")
    return [entry for entry in found if len(entry[2]) > 1 or entry[0] in always]


def _same(values: object) -> Options:
    return [(value, value) for value in values]  # type: ignore[attr-defined]
