"""Read a stage's files of numbers, with an `InputError` that names what is wrong in which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chainforge.core.artifacts import MANIFEST, Manifest, read_shaped
from chainforge.core.jsonl import Row, read_rows
from chainforge.core.shapes import Bill, Funnel, Results, Spending, shaped
from chainforge.report.rows import rows_of


def spending_of(directory: Path, manifest: Manifest | None) -> dict[str, Any]:
    """Return what a teacher cost: as signed, or as the account of an unfinished stage has it."""
    if manifest:
        spending = manifest.metrics.get("spending") or {}
        if spending:
            shaped(spending, Spending, directory / MANIFEST, "a manifest: its spending")
        return dict(spending)
    account = directory / "requests.jsonl"
    if not account.is_file():
        return {}
    sent, told = 0, []
    for _, line in rows_of(account):
        shaped(line, Bill, account, "a teacher's account")
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
    """Read what an evaluation measured."""
    return dict(read_shaped(path, Results, "an evaluation's results"))


def funnel_of(path: Path) -> dict[str, Any]:
    """Read where the rows of a data stage went."""
    return dict(read_shaped(path, Funnel, "a data stage's funnel"))


def lines_of(path: Path) -> list[Row]:
    """Read a file of JSON lines; a last line that is just being written is left out."""
    return read_rows(path, torn_tail=True) if path.is_file() else []
