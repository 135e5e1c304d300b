"""Turn scored samples into the numbers of `results.json`.

Accuracy with its interval counts one completion a prompt (the first sample), because Wilson and
McNemar need independent rows; pass@k and maj@k use all samples of each prompt. With several,
`pass_at_1` has an interval that accounts for samples of the same prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from chainforge.core import statistics
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.core.transcript import DEFAULT, read
from chainforge.data.sources import has_answer
from chainforge.rewards.functions import scripts_of, share

# What an accuracy is called, and the column of a Sample that it counts.
ACCURACIES = {"strict": "correct", "lenient": "lenient_correct"}


def summarize(
    models: Mapping[str, list[Row]],
    pairs: Iterable[tuple[str, str]] | None = None,
    seed: int = 0,
    language: str = "en",
    transcript: str = DEFAULT,
) -> dict[str, Any]:
    """Return `{"models": [...], "pairs": [...]}`, the content of `results.json`.

    `models` maps names to rows; `pairs` are the names to compare, by default each model with the
    one before it. `language` and `transcript` are those of the reasoning. Where no row has an
    answer there are no `pairs`; `reward_pairs` compare the mean rewards.
    """
    pairs = [*(pairs or pairwise(models))]
    answered = any(has_answer(row) for rows in models.values() for row in rows)
    means = {name: _mean_rewards(_by_prompt(name, rows)) for name, rows in models.items()}
    return {
        "models": [measure(name, rows, language, transcript) for name, rows in models.items()],
        "pairs": [compare(a, models[a], b, models[b], seed) for a, b in pairs if answered],
        "reward_pairs": [one for a, b in pairs for one in _compare_rewards(a, b, means)],
    }


def measure(
    name: str, rows: list[Row], language: str = "en", transcript: str = DEFAULT
) -> dict[str, Any]:
    """Return one model's numbers from its Sample rows, k of them per example id.

    The numbers are over all rows, under `tasks` for each task, and `macro` is the mean over the
    tasks. A row without a verdict counts as wrong and in `unjudged`. Prompts without an answer are
    left out, and have their own numbers under `general`; where there are no others, the numbers are
    theirs, and accuracy is None. `rewards` are over all prompts that each reward applies to.
    """
    everything = _by_prompt(name, rows)
    prompts = _answered(everything) or everything
    by_task = defaultdict(list)
    for samples in prompts.values():
        by_task[str(samples[0].get("task", ""))].append(samples)
    result = {"name": name} | _numbers(list(prompts.values()), language, transcript)
    if general := [samples for key, samples in everything.items() if key not in prompts]:
        result["general"] = _numbers(general, language, transcript)
    if rewards := _mean_rewards(everything):
        result["rewards"] = {
            reward: _interval(statistics.student(list(means.values()))[:3]) | {"n": len(means)}
            for reward, means in rewards.items()
        }
    result["samples_per_prompt"] = min(map(len, prompts.values()))
    tasks = sorted(by_task.items())
    result["tasks"] = {task: _numbers(part, language, transcript) for task, part in tasks}
    if _has_answers(prompts.values()):
        result["macro"] = {
            kind: _interval(statistics.macro([_count(part, column) for part in by_task.values()]))
            for kind, column in ACCURACIES.items()
        }
    return result


def _numbers(prompts: list[list[Row]], language: str, transcript: str) -> dict[str, Any]:
    """Return the numbers of some prompts' samples; the README of `recipes/evals` explains each.

    `strict`, `lenient` and `pass_at_1` (of all samples) are {"mean", "low", "high"}; `format`,
    `truncated` and `language` are shares, `tokens_mean` and `reasoning_tokens_mean` counts, over
    the n first samples (None when no row has them); `tokens_per_solved` is what a right answer
    costs, wrong ones included (None when there is none). Of prompts without answers, all that is
    about right answers is None.
    """
    first, least = [samples[0] for samples in prompts], min(map(len, prompts))
    answered = _has_answers(prompts)
    tokens = _mean(row.get("tokens") for row in first)
    result: dict[str, Any] = {"n": len(first)}
    for kind, column in ACCURACIES.items():
        right, n = _count(prompts, column)
        share = (right / n, *statistics.wilson(right, n))
        result[kind] = _interval(share) if answered else None
    result |= {
        "format": _mean(bool(row.get("formatted")) for row in first),
        "language": _mean(_consistency(row, language, transcript) for row in first),
        "tokens_mean": tokens,
        "truncated": _mean(row.get("finish_reason") == "length" for row in first),
    }
    if answered:
        solved = result["strict"]["mean"]
        once = [_pass(samples, 1) for samples in prompts]
        result |= {
            "tokens_per_solved": tokens / solved if tokens and solved else None,
            "unjudged": sum(row.get("correct") is None for row in first),
            "pass_at_1": _interval(statistics.wilson_over_prompts(once, least)),
            "pass_at_k": {str(k): _mean(_pass(of, k) for of in prompts) for k in steps_to(least)},
            "maj_at_k": {str(k): _mean(_vote(of, k) for of in prompts) for k in steps_to(least)},
        }
    if any("reasoning_tokens" in row for row in first):
        result["reasoning_tokens_mean"] = _mean(row.get("reasoning_tokens") for row in first)
    return result


def compare(
    name_a: str, rows_a: list[Row], name_b: str, rows_b: list[Row], seed: int = 0
) -> dict[str, Any]:
    """Return the difference in strict accuracy, b minus a, on the prompts that both answered.

    Returns {"from", "to", "difference", "low", "high", "p"}, first samples paired by id; raises
    `InputError` when the two did not answer the same prompts.
    """
    a, b = (_answered(_by_prompt(*one)) for one in ((name_a, rows_a), (name_b, rows_b)))
    if not a:
        raise InputError(f"model {name_a}: no row has an answer, so accuracy is not known")
    if odd := sorted(a.keys() ^ b.keys()):
        raise InputError(
            f"{name_a} and {name_b} did not answer the same prompts ({len(odd)} differ, "
            f"such as {odd[0]!r}): evaluate both on the same rows to compare them"
        )
    first, second = ([bool(prompts[key][0].get("correct")) for key in a] for prompts in (a, b))
    numbers = statistics.paired_difference(first, second, seed=seed)
    named = dict(zip(("difference", "low", "high", "p"), numbers, strict=True))
    return {"from": name_a, "to": name_b} | named


def _compare_rewards(
    name_a: str, name_b: str, means: Mapping[str, dict[str, dict[str, float]]]
) -> Iterator[dict[str, Any]]:
    """Yield the difference of each mean reward, b minus a, on the prompts that both were given."""
    a, b = means[name_a], means[name_b]
    for reward in [name for name in a if name in b]:
        shared = [key for key in a[reward] if key in b[reward]]
        if shared:
            numbers = statistics.student([b[reward][key] - a[reward][key] for key in shared])
            named = dict(zip(("difference", "low", "high", "p"), numbers, strict=True))
            yield {"from": name_a, "to": name_b, "reward": reward, "n": len(shared)} | named


def steps_to(most: int) -> list[int]:
    """Return the k of pass@k and maj@k: 1, 2, 4, ... and `most`, the samples of a prompt."""
    return sorted({2**i for i in range(most.bit_length())} | {most})


def _by_prompt(name: str, rows: list[Row]) -> dict[str, list[Row]]:
    """Return the samples of each prompt, in order."""
    if not rows:
        raise InputError(f"model {name}: no rows to measure")
    prompts = defaultdict(list)
    for row in sorted(rows, key=lambda row: (str(row["id"]), row.get("sample") or 0)):
        prompts[str(row["id"])].append(row)
    return dict(prompts)


def _answered(prompts: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Return the prompts that have an answer."""
    return {key: samples for key, samples in prompts.items() if has_answer(samples[0])}


def _has_answers(prompts: Iterable[list[Row]]) -> bool:
    """Return whether prompts, of which all or none have one, have an answer."""
    return any(has_answer(samples[0]) for samples in prompts)


def _mean_rewards(prompts: Mapping[str, list[Row]]) -> dict[str, dict[str, float]]:
    """Return by reward the mean over the samples of each prompt that it applies to."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for key, samples in prompts.items():
        for reward in dict.fromkeys(name for row in samples for name in row.get("rewards") or ()):
            mean = _mean((row.get("rewards") or {}).get(reward) for row in samples)
            if mean is not None:
                found[reward][key] = mean
    return found


def _count(prompts: list[list[Row]], column: str) -> tuple[int, int]:
    """Return how many first samples are right, and how many there are."""
    return sum(bool(samples[0].get(column)) for samples in prompts), len(prompts)


def _interval(numbers: Iterable[float]) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), numbers, strict=True))


def _mean(values: Iterable[Any]) -> float | None:
    numbers = [float(value) for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _consistency(row: Row, language: str, transcript: str) -> float | None:
    """Return the share of a reasoning's words in the language's script; None without any."""
    parts = read(str(row.get("completion", "")), transcript)
    return share(parts.reasoning, scripts_of(language)) if parts else None


def _pass(samples: list[Row], k: int) -> float:
    right = sum(bool(row.get("correct")) for row in samples)
    return statistics.pass_at_k(len(samples), right, k)


def _vote(samples: list[Row], k: int) -> bool:
    # Strict, like pass@k: only a well-formed sample votes. So equal answers have equal verdicts.
    answers = [row.get("extracted") if row.get("formatted") else None for row in samples]
    return statistics.maj_at_k(answers, [bool(row.get("correct")) for row in samples], k)
