"""Turn judged samples into the numbers of `results.json`.

Accuracy with its interval counts one completion a prompt (the first sample), because Wilson and
McNemar need independent rows; pass@k and maj@k use all samples of each prompt. With several,
`pass_at_1` has an interval that knows which samples share a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, has_answer
from chainforge.core.statistics import (
    macro,
    maj_at_k,
    paired_difference,
    pass_at_k,
    wilson,
    wilson_over_prompts,
)
from chainforge.core.transcript import DEFAULT, read
from chainforge.rewards.language import share

# What an accuracy is called, and the column of a Sample that it counts.
ACCURACIES = {"strict": "correct", "lenient": "lenient_correct"}


def summarize(
    models: Mapping[str, list[Row]],
    pairs: Iterable[tuple[str, str]] | None = None,
    seed: int = 0,
    language: str = "en",
    transcript: str = DEFAULT,
) -> dict[str, Any]:
    """Return `{"models": [...], "pairs": [...]}`, what `results.json` holds.

    `models` maps names to rows; `pairs` says who is compared with whom, by default each model
    with the one before it. `language` and `transcript` say what the reasoning should be written
    in, and where it stands.
    """
    return {
        "models": [measure(name, rows, language, transcript) for name, rows in models.items()],
        "pairs": [compare(a, models[a], b, models[b], seed) for a, b in pairs or pairwise(models)],
    }


def measure(
    name: str, rows: list[Row], language: str = "en", transcript: str = DEFAULT
) -> dict[str, Any]:
    """Return one model's numbers from its Sample rows, k of them per example id.

    All rows together, then `tasks` with the same numbers by task, and `macro`, the mean over the
    tasks. A row without a verdict counts as wrong and in `unjudged`; a prompt without an answer is
    left out, and counted in `without_answer`.
    """
    every = _by_prompt(name, rows)
    prompts = _answered(every)
    if not prompts:
        raise InputError(f"model {name}: no row has an answer, so there is no accuracy to measure")
    by_task: dict[str, dict[str, list[Row]]] = {}
    for key, samples in prompts.items():
        by_task.setdefault(str(samples[0].get("task", "")), {})[key] = samples
    read_as = (language, transcript)
    tasks = {task: _numbers(part, *read_as) for task, part in sorted(by_task.items())}
    return {
        "name": name,
        **_numbers(prompts, *read_as),
        **({"without_answer": len(every) - len(prompts)} if len(every) > len(prompts) else {}),
        "samples_per_prompt": min(len(samples) for samples in prompts.values()),
        "tasks": tasks,
        "macro": {kind: _macro(list(by_task.values()), key) for kind, key in ACCURACIES.items()},
    }


def _numbers(prompts: Mapping[str, list[Row]], language: str, transcript: str) -> dict[str, Any]:
    """Return the numbers of some prompts; see the README of `recipes/evals` for each.

    `strict`, `lenient` and `pass_at_1` (of all samples) are {"mean", "low", "high"}; `format`,
    `truncated` and `language` are shares, `tokens_mean` and `reasoning_tokens_mean` counts, over
    the n first samples (None when no row has them); `tokens_per_solved` is what a right answer
    costs, wrong ones included (None when there is none).
    """
    first = [samples[0] for samples in prompts.values()]
    strict = _accuracy(first, "correct")
    tokens = _mean([row.get("tokens") for row in first])
    least = min(len(samples) for samples in prompts.values())
    steps = steps_to(least)
    once = [_pass(samples, 1) for samples in prompts.values()]
    result = {
        "n": len(first),
        "strict": strict,
        "lenient": _accuracy(first, "lenient_correct"),
        "format": _share([bool(row.get("formatted")) for row in first]),
        "language": _mean([_consistency(row, language, transcript) for row in first]),
        "tokens_mean": tokens,
        "tokens_per_solved": tokens / strict["mean"] if tokens and strict["mean"] else None,
        "truncated": _share([row.get("finish_reason") == "length" for row in first]),
        "unjudged": sum(row.get("correct") is None for row in first),
        "pass_at_1": dict(
            zip(("mean", "low", "high"), wilson_over_prompts(once, least), strict=True)
        ),
        "pass_at_k": {str(k): _share([_pass(s, k) for s in prompts.values()]) for k in steps},
        "maj_at_k": {str(k): _share([_vote(s, k) for s in prompts.values()]) for k in steps},
    }
    if any("reasoning_tokens" in row for row in first):
        result["reasoning_tokens_mean"] = _mean([row.get("reasoning_tokens") for row in first])
    return result


def _consistency(row: Row, language: str, transcript: str) -> float | None:
    """Return the share of a reasoning's words in the language's script; None without any."""
    parts = read(str(row.get("completion", "")), transcript)
    return share(parts.reasoning, language) if parts else None


def _macro(parts: list[dict[str, list[Row]]], key: str) -> dict[str, float]:
    """Average an accuracy over tasks, each counting alike."""
    firsts = [[samples[0] for samples in part.values()] for part in parts]
    mean, low, high = macro([(sum(bool(r.get(key)) for r in rows), len(rows)) for rows in firsts])
    return {"mean": mean, "low": low, "high": high}


def compare(
    name_a: str, rows_a: list[Row], name_b: str, rows_b: list[Row], seed: int = 0
) -> dict[str, Any]:
    """Return how much more of the same prompts b gets right than a, strictly.

    Returns {"from", "to", "difference", "low", "high", "p"}, first samples paired by id; raises
    `InputError` when the two did not answer the same prompts.
    """
    a, b = (_answered(_by_prompt(*named)) for named in ((name_a, rows_a), (name_b, rows_b)))
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise InputError(
            f"{name_a} and {name_b} did not answer the same prompts ({len(odd)} differ, "
            f"such as {odd[0]!r}): evaluate both on the same rows to compare them"
        )
    difference, low, high, p = paired_difference(
        [bool(a[key][0].get("correct")) for key in a],
        [bool(b[key][0].get("correct")) for key in a],
        seed=seed,
    )
    return {
        "from": name_a,
        "to": name_b,
        "difference": difference,
        "low": low,
        "high": high,
        "p": p,
    }


def _by_prompt(name: str, rows: list[Row]) -> dict[str, list[Row]]:
    """Group rows by id, samples in order."""
    if not rows:
        raise InputError(f"model {name}: no rows to measure")
    prompts: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (str(row["id"]), row.get("sample") or 0)):
        prompts.setdefault(str(row["id"]), []).append(row)
    return prompts


def _answered(prompts: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Return the prompts that have a gold answer."""
    return {key: samples for key, samples in prompts.items() if has_answer(samples[0])}


def steps_to(most: int) -> list[int]:
    """Return the k of pass@k and maj@k: 1, 2, 4, ... and `most`, the samples of a prompt."""
    powers = [2**i for i in range(most.bit_length())]
    return powers if powers[-1] == most else [*powers, most]


def _accuracy(rows: list[Row], key: str) -> dict[str, float]:
    right = sum(bool(row.get(key)) for row in rows)
    low, high = wilson(right, len(rows))
    return {"mean": right / len(rows), "low": low, "high": high}


def _pass(samples: list[Row], k: int) -> float:
    return pass_at_k(len(samples), sum(bool(row.get("correct")) for row in samples), k)


def _vote(samples: list[Row], k: int) -> bool:
    # Strict, like pass@k: only a well-formed sample votes. So equal answers have equal verdicts.
    answers = [row.get("extracted") if row.get("formatted") else None for row in samples]
    return maj_at_k(answers, [bool(row.get("correct")) for row in samples], k)


def _share(values: list[bool] | list[float]) -> float:
    return sum(values) / len(values)


def _mean(values: list[Any]) -> float | None:
    numbers = [float(value) for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
