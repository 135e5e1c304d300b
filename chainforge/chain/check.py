"""Audit a reward or a verifier before it trains anything.

Gold answers must beat every other answer, in any order of scoring, at a known speed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from chainforge.core.config import read_settings, yaml_value
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.core.transcript import DEFAULT

if TYPE_CHECKING:
    from chainforge.rewards.audit import Audit

# So much of a completion that fools the reward is shown; some are 100,000 characters long.
SHOWN_CHARACTERS, SHOWN_CHANGES, SHOWN_ANSWER = 50, 5, 40
MANY = 100  # rows on which constant answers are tried


def check_reward(
    reward: str, task: str | None = None, *, params: Iterable[str] = (), rows: int = 16
) -> Audit:
    """Audit a reward, named as in a configuration, or a verifier, on the first rows of a task.

    `reward` may be a recipe's YAML: then all its rewards are audited together, as they will train,
    on its own tasks unless `task` names others. `task` is a YAML with `tasks:` (a recipe's
    configuration serves), a .jsonl, or one task written as a YAML mapping. Raises `InputError` for
    anything that cannot be read.
    """
    from chainforge.data.tasks import TaskArgs, load_examples
    from chainforge.rewards.audit import audit
    from chainforge.rewards.reward import RewardArgs, load_rewards
    from chainforge.rewards.verify import VERIFIERS

    whole, values = reward.endswith((".yaml", ".yml")), _params(params)
    if task is None and not whole:
        raise InputError("give --task FILE, whose rows the reward is tried on")
    if whole and values:
        raise InputError(f"--params goes with one reward; those of {reward} have their own")
    settings = _tasks(task or reward)
    transcript = settings.get("transcript", DEFAULT)
    verifier = reward in VERIFIERS
    judges = RewardArgs(transcript=transcript)
    if whole:
        judges.rewards = read_settings(reward).get("rewards") or judges.rewards
    else:
        judges.rewards = [{"fn": "accuracy_reward" if verifier else reward, "params": values}]
    tasks = [at_most(item, max(rows, MANY)) for item in settings["tasks"]]
    args = TaskArgs(tasks=tasks, system_prompt=settings.get("system_prompt"))
    examples = load_examples(args, transcript)
    # The first rows of every task first, so that a few rows are some of each.
    by_task: dict[str, list[Row]] = {}
    for row in examples:
        by_task.setdefault(row["task"], []).append(row)
    turns = zip_longest(*by_task.values())
    examples = [row for turn in turns for row in turn if row is not None][: max(rows, MANY)]
    if verifier:
        examples = [row | {"verifier": reward} for row in examples]
    rewards = load_rewards(judges, set().union(*examples))
    return audit(rewards, examples[:rows], transcript, examples)


def _tasks(task: str) -> dict[str, Any]:
    """Return settings with a list of `tasks`, from a file or from a mapping written as YAML."""
    if task.lstrip().startswith("{"):
        try:
            return {"tasks": [yaml_value(task)]}
        except InputError as error:
            raise InputError(f"--task: {error}") from None
    if task.endswith((".jsonl", ".json")):
        return {"tasks": [{"fn": "jsonl", "params": {"path": task}, "split": "all"}]}
    settings = read_settings(task)
    if "fn" in settings:
        return {"tasks": [settings]}
    if not isinstance(settings.get("tasks"), list) or not settings["tasks"]:
        raise InputError(f"{task}: no task in it; give a list `tasks`, or one with `fn`")
    return settings


def _params(texts: Iterable[str]) -> dict[str, Any]:
    """Read `KEY=VALUE` texts; values are YAML."""
    params: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--params {text}: write it as KEY=VALUE, such as max_words=200")
        params[key] = value
        with contextlib.suppress(InputError):
            params[key] = yaml_value(value)
    return params


def at_most(task: Any, rows: int) -> Any:
    """Ask a task for no more rows than are tried; what is no task is left to be refused."""
    if isinstance(task, dict) and isinstance(task.get("size"), int):
        return task | {"size": min(task["size"], rows)}
    return task


def print_audit(audit: Audit, console: Console) -> None:
    """Print the mean score of each kind of answer, and what beat the gold answer."""
    judged = sum(not row.skipped for row in audit)
    table = Table(title=f"mean reward over {judged} rows", box=SIMPLE_HEAD, title_justify="left")
    table.add_column("answer")
    table.add_column("reward", justify="right")
    table.add_column("as good as gold", justify="right")
    table.add_column("ms each", justify="right")
    for kind, mean in audit.means.items():
        fooled = sum(attempt.kind == kind for _, attempt in audit.failures)
        beaten = "" if kind == "gold" else f"{fooled} times" if fooled else "never"
        took = f"{audit.milliseconds[kind]:.2f}" if kind in audit.milliseconds else "-"
        table.add_row(kind, "-" if mean is None else f"{mean:.3f}", beaten, took)
    console.print(table)
    # One example of each kind says more than many of the first.
    for row, attempt in {attempt.kind: (row, attempt) for row, attempt in audit.failures}.values():
        text = f"{attempt.kind}: {attempt.total:g}, gold: {row.gold:g}  {tail(attempt.completion)}"
        console.print(text, markup=False, soft_wrap=True)
    for name, attempt, second in audit.changed[:SHOWN_CHANGES]:
        text = f"row {name}, {attempt.kind}: {attempt.total}, then {second}"
        console.print(f"{text}  {tail(attempt.completion)}", markup=False, soft_wrap=True)
    for constant in audit.constants[:SHOWN_CHANGES]:
        console.print(str(constant), markup=False)
    for error in audit.errors:
        console.print(error, markup=False, soft_wrap=True)
    console.print(f"{'passed' if audit.passed else 'failed'}: {verdict(audit)}", markup=False)


def verdict(audit: Audit) -> str:
    """Return in a sentence what the audit found."""
    if audit.errors:
        return "the reward itself failed"
    if all(row.skipped for row in audit):
        return "the reward judged none of the gold answers"
    if audit.changed:
        return (
            f"{len(audit.changed)} completions got another reward when they were scored again in "
            "another order"
        )
    if audit.failures:
        rows = len({row.id for row, _ in audit.failures})
        said = f"on {rows} of {len(audit)} rows something beat or equalled the gold answer"
        unread = sum(row.unrewarded for row in audit)
        return said + (f"; on {unread} it earned no more than an empty one" if unread else "")
    if audit.constants:
        return f"{len(audit.constants)} constant answers are paid on rows that have another"
    return "gold beats every other answer on every row"


def to_json(audit: Audit) -> dict[str, Any]:
    """Return the audit for a machine to read."""
    return {
        "passed": audit.passed,
        "verdict": verdict(audit),
        "rows": len(audit),
        "means": audit.means,
        "errors": audit.errors,
        "milliseconds": audit.milliseconds,
        "constants": [dataclasses.asdict(constant) for constant in audit.constants],
        "changed": [
            {
                "row": name,
                "kind": attempt.kind,
                "completion": attempt.completion[:1000],
                "reward": attempt.total,
                "again": second,
            }
            for name, attempt, second in audit.changed
        ],
        "failures": [
            {
                "row": row.id,
                "question": row.question,
                "answer": row.answer,
                "kind": attempt.kind,
                "completion": attempt.completion[:1000],
                "reward": attempt.total,
                "gold": row.gold,
            }
            for row, attempt in audit.failures
        ],
    }


def shown(text: str) -> str:
    """Show a text on one line, whatever it holds."""
    line = ascii(text)
    return line if len(line) <= SHOWN_ANSWER else f"{line[: SHOWN_ANSWER - 3]}..."


def tail(completion: str) -> str:
    """Show the end of a completion, where its answer is, on one line, whatever it holds."""
    text = ascii(completion)[1:-1]
    return text if len(text) <= SHOWN_CHARACTERS else f"...{text[3 - SHOWN_CHARACTERS :]}"
