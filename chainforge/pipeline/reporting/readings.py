"""Read a stage's files of numbers, with an `InputError` that names what is wrong in which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chainforge.core import artifacts
from chainforge.core.artifacts import Manifest
from chainforge.core.errors import InputError
from chainforge.core.records import Row, read_rows
from chainforge.pipeline.reporting.rows import rows_of

MODEL_KEYS = ("name", "n", "strict", "lenient", "format", "tokens_mean", "truncated")
PAIR_KEYS = ("from", "to", "difference", "low", "high", "p")


def spending_of(directory: Path, manifest: Manifest | None) -> dict[str, Any]:
    """Return what a teacher cost: as signed, or as the account of an unfinished stage has it."""
    if manifest:
        spending = manifest.metrics.get("spending")
        return spending if isinstance(spending, dict) else {}
    account = directory / "requests.jsonl"
    if not account.is_file():
        return {}
    sent, told = 0, []
    for _, line in rows_of(account):
        if "outcome" not in line:
            sent += 1
        elif line.get("told"):
            told.append(line)
    prices = [line.get("usd") for line in told]
    return {
        "requests": sent,
        "tokens": sum(line.get("tokens") or 0 for line in told),
        "usd": None if None in prices else sum(price for price in prices if price),
        "untold_requests": sent - len(told),
    }


def results_of(path: Path) -> dict[str, Any]:
    """Read an evaluation; a model or pair without its numbers is an `InputError`."""
    results = object_of(path, "models", "pairs")
    for kind, keys in (("models", MODEL_KEYS), ("pairs", PAIR_KEYS)):
        for number, entry in enumerate(results[kind]):
            if missing := [key for key in keys if key not in entry]:
                raise InputError(f"{path}: {kind}[{number}] has no {', '.join(missing)}")
    return results


def object_of(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object that has these keys."""
    value = artifacts.read_json(path)
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise InputError(f"{path}: need a JSON object with the keys {', '.join(keys)}")
    return value


def lines_of(path: Path) -> list[Row]:
    """Read a file of JSON lines; a last line that is just being written is left out."""
    return read_rows(path, torn_tail=True) if path.is_file() else []
