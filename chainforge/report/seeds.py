"""Merge the results of the same evaluation over several seeds into one, in the same form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.paths import short
from chainforge.core.run_dir import changes, read_results, read_run
from chainforge.core.statistics import over_seeds

RESULTS = "results.json"


def merge_results(places: Iterable[Path]) -> dict[str, Any]:
    """Merge results of different seeds: means over the seeds, with intervals for rows and seeds.

    An accuracy and a paired difference get the interval of `over_seeds`, the spread over the seeds
    as `sd`, and each seed's own value under `seeds`; every other number becomes its mean. Raises
    `InputError` for results that differ in anything but the seed.
    """
    found = dict(_results(place) for place in places)
    if len(found) < 2:
        raise InputError("merge: give the results of at least two seeds, each of its own run")
    seeds: list[int] = []
    (one, first), *_ = found.items()
    for file, results in found.items():
        settings = dict(results.get("settings") or {})
        if (seed := settings.pop("seed", None)) is None or seed in seeds:
            raise InputError(f"{file}: its seed is {seed}; each needs a seed of its own")
        seeds.append(seed)
        same = {key: value for key, value in first["settings"].items() if key != "seed"}
        if unlike := changes(same | _names(first), settings | _names(results)):
            raise InputError(f"{one} and {file} differ in more than the seed: {'; '.join(unlike)}")
    merged = {
        key: [_merge(parts, seeds) for parts in zip(*every, strict=True)]
        for key in ("models", "pairs", "reward_pairs")
        if (every := [results.get(key, []) for results in found.values()])
    }
    failed = {k: v for results in found.values() for k, v in results.get("failed", {}).items()}
    return {**merged, "settings": same | {"seeds": seeds}} | ({"failed": failed} if failed else {})


def _results(place: Path) -> tuple[str, dict[str, Any]]:
    """Return the path and content of a results.json, given as a file, a stage or a chain."""
    file = place if place.is_file() else place / RESULTS
    if not file.is_file():
        last = read_run(place).last_results()
        if last is None:
            raise InputError(f"{place}: no stage of this run has a {RESULTS}; evaluate first")
        file = last.directory / RESULTS
    return short(file.resolve()), read_results(file)


def _names(found: Mapping[str, Any]) -> dict[str, str]:
    """Return which models and pairs there are, as if they were settings."""
    pairs = [f"{pair['from']} to {pair['to']}" for pair in found["pairs"]]
    names = ", ".join(model["name"] for model in found["models"])
    return {"model names": names, "compared pairs": ", ".join(pairs)}


def _merge(parts: Sequence[Any], seeds: Sequence[int]) -> Any:
    """Merge the same entry of each result: numbers, mappings of them, or names."""
    if isinstance(parts[0], Mapping):
        if {"low", "high"} <= parts[0].keys():
            return _estimate(parts, seeds)
        shared = [key for key in parts[0] if all(key in part for part in parts)]
        return {key: _merge([part[key] for part in parts], seeds) for key in shared}
    if any(isinstance(part, str) for part in parts):
        return parts[0]
    if any(part is None for part in parts):
        return None  # a mean over some of the seeds would compare with nothing
    return parts[0] if len(set(parts)) == 1 else sum(parts) / len(parts)


def _estimate(parts: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Merge an accuracy (`mean`) or a paired difference (`difference`) with its interval."""
    key = "mean" if "mean" in parts[0] else "difference"
    estimates = [(float(part[key]), float(part["low"]), float(part["high"])) for part in parts]
    mean, low, high, p, sd = over_seeds(estimates)
    if "n" not in parts[0]:  # a share; a reward may have any scale
        low, high = max(0.0 if key == "mean" else -1.0, low), min(1.0, high)
    merged = dict(parts[0]) | {key: mean, "low": low, "high": high}
    if "p" in parts[0]:
        merged["p"] = p
    if "seconds" in parts[0]:
        merged["seconds"] = sum(part["seconds"] for part in parts) / len(parts)
    each = {str(seed): value for seed, (value, _, _) in zip(seeds, estimates, strict=True)}
    return merged | {"sd": sd, "seeds": each}
