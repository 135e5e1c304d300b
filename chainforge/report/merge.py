"""Merge the results of the same evaluation over several seeds into one, in the same form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import changes
from chainforge.core.errors import InputError
from chainforge.core.paths import short
from chainforge.core.statistics import over_seeds
from chainforge.report.evidence import read_chain
from chainforge.report.readings import results_of

RESULTS = "results.json"


def find_results(place: Path) -> Path:
    """Return a results.json by its path, its stage's folder, or its chain's (the last one)."""
    if place.is_file():
        return place
    if (place / RESULTS).is_file():
        return place / RESULTS
    stage = read_chain(place).last_results()
    if stage is None:
        raise InputError(f"{place}: no stage of this run has a {RESULTS}; evaluate first")
    directory: Path = stage.directory
    return directory / RESULTS


def merge_results(places: Iterable[Path]) -> dict[str, Any]:
    """Merge results of different seeds; means over the seeds, with intervals that know of both.

    An accuracy and a paired difference get the interval of `over_seeds`, the spread over the seeds
    as `sd`, and each seed's own value under `seeds`; every other number becomes its mean. Raises
    `InputError` for results that differ in anything but the seed.
    """
    files = list(dict.fromkeys(find_results(place).resolve() for place in places))
    if len(files) < 2:
        raise InputError("merge: give the results of at least two seeds, each of its own run")
    results = [results_of(file) for file in files]
    for file, found in zip(files, results, strict=True):
        if "seed" not in (found.get("settings") or {}):
            raise InputError(
                f"{short(file)} does not say how it was sampled, with one seed: evaluate once more"
            )
        _same(short(files[0]), results[0], short(file), found)
    seeds = [found["settings"]["seed"] for found in results]
    for number, seed in enumerate(seeds):
        if seed in seeds[:number]:
            one, two = short(files[seeds.index(seed)]), short(files[number])
            raise InputError(f"{one} and {two} have the same seed, {seed}: this counts nothing new")
    merged = {
        key: [_merge(parts, seeds) for parts in zip(*(r[key] for r in results), strict=True)]
        for key in ("models", "pairs")
    }
    settings = {key: value for key, value in results[0]["settings"].items() if key != "seed"}
    return {**merged, "settings": settings | {"seeds": seeds}}


def _same(one: str, first: Mapping[str, Any], two: str, other: Mapping[str, Any]) -> None:
    """Refuse results of other models, or of other sampling, tasks or prompts."""
    for key, names in (("models", ("name",)), ("pairs", ("from", "to"))):
        mine, theirs = (
            [tuple(entry[name] for name in names) for entry in found[key]]
            for found in (first, other)
        )
        if mine != theirs:
            words = [", ".join(":".join(name) for name in found) for found in (mine, theirs)]
            raise InputError(f"{one} and {two} have other {key}: {words[0]} and {words[1]}")
    unlike = changes(_but_seed(first), _but_seed(other))
    if unlike:
        raise InputError(f"{one} and {two} differ in more than the seed: {'; '.join(unlike)}")


def _but_seed(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found["settings"].items() if key != "seed"}


def _merge(parts: Sequence[Any], seeds: Sequence[int]) -> Any:
    """Merge what stands at one place of each result: numbers, mappings of them, or names."""
    if isinstance(parts[0], Mapping):
        if {"low", "high"} <= parts[0].keys():
            return _estimate(parts, seeds)
        shared = [key for key in parts[0] if all(key in part for part in parts)]
        return {key: _merge([part[key] for part in parts], seeds) for key in shared}
    if any(isinstance(part, str) for part in parts):
        return parts[0]
    numbers = [part for part in parts if part is not None]
    if not numbers or len(numbers) < len(parts):
        return None  # a mean over some of the seeds would compare with nothing
    mean = sum(numbers) / len(numbers)
    return int(mean) if all(number == mean for number in numbers) and mean == int(mean) else mean


def _estimate(parts: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Merge an accuracy (`mean`) or a paired difference (`difference`) with its interval."""
    key = "mean" if "mean" in parts[0] else "difference"
    estimates = [(float(part[key]), float(part["low"]), float(part["high"])) for part in parts]
    mean, low, high, p, sd = over_seeds(estimates)
    least = 0.0 if key == "mean" else -1.0
    merged = dict(parts[0]) | {key: mean, "low": max(least, low), "high": min(1.0, high)}
    if "p" in parts[0]:
        merged["p"] = p
    each = {str(seed): value for seed, (value, _, _) in zip(seeds, estimates, strict=True)}
    return merged | {"sd": sd, "seeds": each}
