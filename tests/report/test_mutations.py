"""A stage's file that is torn, or holds something else, is named; it raises nothing else."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chains import answered, question, rows, tiny

from chainforge.core.artifacts import write_json
from chainforge.core.errors import InputError
from chainforge.generate.sampling import sample
from chainforge.report.html import write_report

VALUES: list[Any] = [None, [], {}, "x", "", True, -1, 0, 1.5, 1e308, 10**400, float("nan"), [[]],
                     {"a": {}}, ["x", None], "\x00\ud800"]  # fmt: skip
DEEP = "[" * 50_000


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list) else ()  # fmt: skip
    for key, item in items:
        yield from places(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """Return a JSON value with another one at a place."""
    if not path:
        return change(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], change)
    return copy


def mutate(text: str, lines: bool, rng: random.Random) -> str:
    """Tear a text, or put something else at one place in its JSON."""
    if rng.random() < 0.1:
        return rng.choice([text[: rng.randrange(len(text) + 1)], DEEP, "", "\x00", "NaN\n"])
    parts = text.splitlines() if lines else [text]
    number = rng.randrange(len(parts))
    value = json.loads(parts[number])
    path = rng.choice(list(places(value)))
    if path and isinstance(path[-1], str) and rng.random() < 0.2:
        value = changed(value, path[:-1], lambda old: {k: v for k, v in old.items()
                                                       if k != path[-1]})  # fmt: skip
    else:
        other = rng.choice(VALUES)
        value = changed(value, path, lambda old: other)
    parts[number] = json.dumps(value)
    return "\n".join(parts) + "\n"


def whole(root: Path) -> dict[str, bool]:
    """Write a chain with a file of each kind; return the files, and which are of lines."""
    tiny(root)
    chain = json.loads((root / "chain.json").read_text())
    chain["stages"][-1]["gate"] = [{"metric": "accuracy", "min": 0.2},
                                   {"beats": "cold_start", "p": 0.5}]  # fmt: skip
    models = {f"models.{name}": name for name in ("base", "cold_start", "rl", "rl_final")}
    chain["stages"][-1]["inputs"] = models
    chain["stages"].append({"name": "more", "recipe": "collect", "inputs": {"model": "rl_final"}})
    write_json(root / "chain.json", chain)
    more = root / "more"
    write_json(more / "stage.json", {"recipe": "collect", "fingerprint": "ab", "given": {},
                                     "inputs": {"model": "cd"}})  # fmt: skip
    write_json(more / "progress.json", {"done": 1, "total": 3, "unit": "rows", "note": "a"})
    bill = [{"id": 1}, {"id": 1, "outcome": "ok", "told": True, "tokens": 5, "usd": 0.1}]
    rows(more, "requests.jsonl", bill)
    alarms = [{"step": 3, "rule": "kl", "action": "warn", "seen": "kl 3", "means": "m"}]
    rows(root / "rl_final", "health.jsonl", alarms)
    rolled = [
        answered(question(1), "rl_final", True, i, step=step, reward=0.5) for step in (1, 2)
        for i in range(2)
    ]  # fmt: skip
    rows(root / "rl_final", "rollouts.jsonl", rolled)
    teacher = sample(question(3), "x", 0, source="teacher", drop=None, correct=None, reward=1.0)
    rows(more, "samples.jsonl", [teacher])
    files = [path for path in root.rglob("*.json*") if path.is_file()]
    return {str(path.relative_to(root)): path.suffix == ".jsonl" for path in sorted(files)}


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_in_a_file_the_report_is_written_or_the_file_named(tmp_path, seed):
    rng = random.Random(seed)
    files = whole(tmp_path / "tiny")
    write_report(tmp_path / "tiny")
    for name, lines in files.items():
        file = tmp_path / "tiny" / name
        before = file.read_bytes()
        file.write_text(mutate(before.decode(), lines, rng), encoding="utf-8", errors="replace")
        with contextlib.suppress(InputError):
            write_report(tmp_path / "tiny")
        file.write_bytes(before)


@pytest.mark.parametrize("name", ["samples.jsonl", "rollouts.jsonl", "metrics.jsonl"])
def test_a_file_that_is_being_written_or_is_gone_does_not_cost_the_report(chain, name):
    stage = chain / ("eval" if name == "samples.jsonl" else "rl_final")
    rows(stage, name, [answered(question(i), "rl_final", True, step=1) for i in range(4)])
    with open(stage / name, "ab") as file:
        file.write(b'{"id": "torn')
    assert b"torn" not in write_report(chain).read_bytes()
    (stage / name).unlink()
    write_report(chain)
