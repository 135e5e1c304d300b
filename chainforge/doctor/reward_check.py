"""Audit a reward or a verifier before it trains anything.

Gold answers must beat every other answer, in any order of scoring, at a known speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from chainforge.chain.spec import load_chain
from chainforge.core.config import read_settings
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.core.transcript import DEFAULT
from chainforge.data.sources import question

if TYPE_CHECKING:
    from chainforge.rewards.audit import Attempt, Audit

# So much of a completion that fools the reward is shown; some are 100,000 characters long.
SHOWN_CHARACTERS, SAVED_CHARACTERS, SHOWN = 50, 1000, 5
MANY = 100  # rows on which constant answers are tried


def check_reward(reward: str, task: str | None = None, rows: int = 16) -> Audit:
    """Audit a reward, named as in a configuration, or a verifier, on the first rows of each task.

    `reward` may be a recipe's YAML: then all its rewards are audited together, as they will train,
    on its own tasks unless `task` names others. `task` is a YAML with `tasks:` (a recipe's
    configuration serves) or a .jsonl. Raises `InputError` for anything that cannot be read.
    """
    from chainforge.core.plugins import resolve
    from chainforge.data.tasks import TaskArgs, load_examples
    from chainforge.rewards.audit import audit
    from chainforge.rewards.functions import BUILTINS
    from chainforge.rewards.reward import RewardArgs, check_bound, load_rewards
    from chainforge.rewards.verify import VERIFIERS

    whole, verifier = reward.endswith((".yaml", ".yml")), reward in VERIFIERS
    if task is None and not whole:
        if Path(reward).is_dir():
            raise InputError(f"{reward} is a folder; name a YAML of it, such as {reward}/rl.yaml")
        if not verifier:
            resolve(reward, BUILTINS)  # a misspelt name is the first thing to say
        raise InputError("give --task FILE: rows to try it on, a YAML with `tasks:` or a .jsonl")
    settings = _tasks(task or reward)
    transcript = settings.get("transcript", DEFAULT)
    rewarding = RewardArgs(transcript=transcript)
    if whole:
        rewarding.rewards = read_settings(reward).get("rewards") or rewarding.rewards
    else:
        rewarding.rewards = [{"fn": "accuracy_reward" if verifier else reward}]
    for item in settings.setdefault("tasks", []):
        if isinstance(item, dict) and isinstance(item.get("size"), int):
            item["size"] = min(item["size"], max(rows, MANY))
    args = TaskArgs(settings["tasks"], settings.get("prompts", []), settings.get("system_prompt"))
    examples = first_rows(load_examples(args, transcript), max(rows, MANY))
    if verifier:
        examples = [row | {"verifier": reward} for row in examples]
    rewards = load_rewards(rewarding, set().union(*examples))
    check_bound(rewards, examples)
    return audit(rewards, first_rows(examples, rows), transcript, examples)


def first_rows(rows: Iterable[Row], each: int) -> list[Row]:
    """Return the first rows of each task."""
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    return [row for some in by_task.values() for row in some[:each]]


def _tasks(task: str) -> dict[str, Any]:
    """Return the settings of a file, with a list of `tasks` or `prompts`, or its chain's."""
    if task.endswith(".jsonl"):
        return {"tasks": [{"fn": "jsonl", "params": {"path": task}, "split": "all"}]}
    settings, chain = read_settings(task), Path(task).with_name("chain.yaml")
    if not _asks(settings) and chain.is_file():
        of = load_chain(chain)
        form = settings.get("transcript") or of.transcript or DEFAULT
        settings |= {"tasks": [*of.tasks], "prompts": [*of.prompts], "transcript": form}
    if not _asks(settings):
        raise InputError(f"{task}: no task in it; give a list `tasks`, or --task FILE")
    return settings


def _asks(settings: dict[str, Any]) -> bool:
    return any(
        settings.get(key) and isinstance(settings[key], list) for key in ("tasks", "prompts")
    )


def print_audit(audit: Audit, console: Console) -> None:
    """Print the mean score of each kind of answer, and what beat the gold answer."""
    table = Table(
        title=f"mean reward over {audit.scored} rows", box=SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("answer")
    for column in ("reward", "as good as gold", "ms each"):
        table.add_column(column, justify="right")
    for kind, mean in audit.means.items():
        fooled = sum(attempt.kind == kind for attempt in audit.failures)
        beaten = "" if kind == "gold" else f"{fooled} times" if fooled else "never"
        took = f"{audit.milliseconds[kind]:.2f}" if kind in audit.milliseconds else "-"
        table.add_row(kind, "-" if mean is None else f"{mean:.3f}", beaten, took)
    console.print(table)
    # One example of each kind says more than many of the first.
    lines = [
        f"{attempt.kind}: {attempt.total:g}, gold: {attempt.gold:g}  {_end(attempt)}"
        for attempt in {one.kind: one for one in audit.failures}.values()
    ]
    lines += [*map(str, audit.constants[:SHOWN]), *audit.errors]
    for line in [*lines, f"{'passed' if audit.passed else 'failed'}: {verdict(audit)}"]:
        console.print(line, markup=False, soft_wrap=True)


def verdict(audit: Audit) -> str:
    """Return the result of the audit in a sentence."""
    if audit.errors:
        return "the reward itself failed"
    if not audit.scored:
        return "the reward scored none of the gold answers"
    if audit.failures:
        rows = len({id(one.row) for one in audit.failures})
        return f"on {rows} of {audit.scored} rows something beat or equalled the gold answer"
    if audit.constants:
        return f"{len(audit.constants)} constant answers earn a reward on rows that have another"
    return "gold beats every other answer on every row"


def to_json(audit: Audit) -> dict[str, Any]:
    """Return the audit for a machine to read."""
    return {
        "passed": audit.passed,
        "verdict": verdict(audit),
        "rows": audit.rows,
        "means": audit.means,
        "errors": audit.errors,
        "milliseconds": audit.milliseconds,
        "constants": [dataclasses.asdict(constant) for constant in audit.constants],
        "failures": [
            {
                "row": one.row.get("id"),
                "question": question(one.row) if one.row.get("prompt") else "",
                "answer": one.row.get("answer"),
                "kind": one.kind,
                "completion": one.completion[:SAVED_CHARACTERS],
                "reward": one.total,
                "gold": one.gold,
            }
            for one in audit.failures
        ],
    }


def _end(attempt: Attempt) -> str:
    """Return the end of a completion, where its answer is, escaped and on one line."""
    text = ascii(attempt.completion)[1:-1]
    return text if len(text) <= SHOWN_CHARACTERS else f"...{text[3 - SHOWN_CHARACTERS :]}"
