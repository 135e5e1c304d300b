"""Read the questions that evaluations ask, so that no training row gives them away.

What to look out for is named as one evaluates on it: a configuration of `evaluate.py`, a task, a
file of JSON lines, a local folder, or a data set of the Hub.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from chainforge.core.config import read_settings
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, question, read_rows
from chainforge.core.yaml12 import yaml_value
from chainforge.data.sources import PRESETS
from chainforge.data.tasks import TaskArgs, load_examples

# Where published data sets keep their question.
NAMES = ("question", "problem", "prompt", "instruction", "input", "query", "text")


def evaluation_questions(entries: Sequence[Any], seed: int) -> list[tuple[str, str]]:
    """Return (source, question) of everything that `entries` name.

    An entry is a task ({fn, params, size, split}, or YAML text of it), the path of a YAML with
    `tasks`, of a .jsonl file or of a folder, or a Hub id as `owner/name`, `owner/name:config` or
    `owner/name:config:split`. Without a split its test rows count, or all where it has none.
    """
    found: list[tuple[str, str]] = []
    for number, entry in enumerate(entries):
        where = f"decontaminate[{number}]"
        try:
            questions = list(_questions(entry, seed))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if not questions:
            raise InputError(f"{where}: {entry} holds no question")
        found += questions
    return found


def _questions(entry: Any, seed: int) -> Iterable[tuple[str, str]]:
    if isinstance(entry, dict):
        return _asked([entry], seed, str(entry.get("name") or entry.get("fn")))
    if isinstance(entry, str) and entry.startswith("{"):
        return _questions(_task(entry), seed)
    if not isinstance(entry, str) or not entry:
        raise InputError(f"expected a task, a path or a Hub id, found {entry!r}")
    path = Path(entry)
    if path.suffix in (".yaml", ".yml"):
        settings = read_settings(path)
        if not settings.get("tasks"):
            raise InputError(f"{entry} has no `tasks`; name a configuration of evaluate.py")
        return _asked(settings["tasks"], seed, path.name)
    if path.suffix == ".jsonl":
        return ((path.name, _text(row, entry)) for row in read_rows(path))
    if entry in PRESETS:
        task = {"fn": "hub", "params": {"dataset": entry}, "split": "test"}
        return _asked([task], seed, entry)
    return ((entry, _text(row, entry)) for row in _published(entry))


def _task(text: str) -> dict[str, Any]:
    try:
        task = yaml_value(text)
    except InputError as error:
        raise InputError(f"{text}: {error}") from None
    if not isinstance(task, dict):
        raise InputError(f"{text}: expected a task, as {{fn: hub, params: {{dataset: gsm8k}}}}")
    return task


def _asked(tasks: list[dict[str, Any]], seed: int, source: str) -> list[tuple[str, str]]:
    rows = load_examples(TaskArgs(tasks=tasks, system_prompt=""), seed=seed)
    return [(source, question(row)) for row in rows]


def _text(row: Row, where: str) -> str:
    """Return the question of a row, whatever its column is called."""
    for name in NAMES:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, list) and value and isinstance(value[-1], dict):
            return question({"prompt": value})
    raise InputError(f"{where}: no column with a question ({', '.join(NAMES)}) in {list(row)}")


def _published(reference: str) -> Iterable[Row]:
    """Yield the rows of a folder's or the Hub's data set: the test rows, if it has such."""
    import datasets

    name, _, rest = reference.partition(":")
    config, _, split = rest.partition(":")
    if "/" not in name and not Path(name).exists():
        raise InputError(
            f"{reference!r} is neither a file nor a folder nor a Hub id (owner/name); "
            f"presets: {', '.join(PRESETS)}"
        )
    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # no network, no such id, gated, unknown config, unreadable files
        reason = str(error).strip()[:300]
        raise InputError(f"cannot load {reference!r}: {reason}") from error
    if split and split not in loaded:
        raise InputError(f"{name} has no split {split!r}; there are: {', '.join(loaded)}")
    chosen = [split] if split else ["test"] if "test" in loaded else list(loaded)
    for part in chosen:
        yield from loaded[part]
