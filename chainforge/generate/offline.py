"""The offline teacher: worked solutions from the metadata of reasoning-gym's problems."""

from __future__ import annotations

import ast
import json
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

from chainforge.core.errors import InputError, refuse_unknown
from chainforge.core.jsonl import Row
from chainforge.core.transcript import write
from chainforge.data.sft_dataset import FALLBACK
from chainforge.generate.settings import Draw, Take, digest

AT_ONCE = 64
# Some teachers write every step, some answer at once.
STYLES = ("careful", "hasty")


class OfflineTeacher:
    """Write solutions from the data set's own metadata, in several styles, as real teachers do.

    All are right; what differs is whether a small student can follow how the answer was reached.
    """

    def __init__(self, styles: dict[str, float], seed: int, transcript: str) -> None:
        refuse_unknown(styles, STYLES, "styles: ")
        if not sum(styles.values()) > 0 or min(styles.values()) < 0:
            raise InputError(f"styles: expected shares of at least 0, one above 0, found {styles}")
        self.styles, self.seed, self.transcript = styles, seed, transcript

    def check(self, examples: list[Row]) -> None:
        """Raise `InputError` for a task without a solver, before any work."""
        for task, row in {row["task"]: row for row in reversed(examples)}.items():
            for style, share in self.styles.items():
                if share and self._solve(row, style, random.Random(0)) is None:
                    raise InputError(
                        f"the offline teacher has no solver for the task {task!r}; take a task "
                        "that it knows (chain_sum, gsm_symbolic, ...) or another teacher"
                    )

    def spending(self) -> Row:
        """Return an empty summary: the solutions cost nothing."""
        return {}

    def key(self, draw: Draw) -> str:
        """Return a hash of what decides the solution."""
        content = [draw.row["id"], self.styles, self.seed, self.transcript, draw.sample]
        return digest(["offline", *content])

    def sample(self, draws: Sequence[Draw], take: Take) -> None:
        """Write every solution."""
        for start in range(0, len(draws), AT_ONCE):
            part = draws[start : start + AT_ONCE]
            take([(draw, self.answer(draw) | {"request": self.key(draw)}) for draw in part])

    def answer(self, draw: Draw) -> Row:
        """Write a worked solution; the style is drawn by seed, row and sample."""
        rng = random.Random(f"{self.seed}/{draw.row['id']}/{draw.sample}")
        style = rng.choices(list(self.styles), list(self.styles.values()))[0]
        solved = self._solve(draw.row, style, rng)
        if solved is None:
            raise InputError(f"the offline teacher cannot solve row {draw.row['id']}")
        same = dict.fromkeys(("source", "teacher", "model"), "offline")
        return same | {
            "completion": write(*solved, self.transcript),
            "sampling": {"style": style},
            "finish_reason": "stop",
            "tokens": None,
        }

    def replace(self, draw: Draw) -> Row:
        """Write a solution in place of a failed request, labelled as such."""
        return self.answer(draw) | {"source": FALLBACK}

    def _solve(self, row: Row, style: str, rng: random.Random) -> tuple[str, str] | None:
        if "entry" not in row:
            return None
        entry = json.loads(row["entry"])
        return solve(entry["metadata"]["source_dataset"], entry, style, rng)


_HASTY = ("I see it at once: {answer}.", "That is {answer}.", "It must be {answer}.")
_OPERATORS: dict[type[ast.operator], tuple[str, Callable[[int, int], int]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
}


def solve(
    task_name: str, entry: dict[str, Any], style: str, rng: random.Random
) -> tuple[str, str] | None:
    """Return (reasoning, answer) for a reasoning-gym entry, or None where there is no solver.

    `task_name` is the data set's name, such as `chain_sum`; `entry` its item, with `question`,
    `answer` and `metadata`; `style` is `careful` (every step) or `hasty` (one short line); `rng`
    chooses between the phrasings of a style. Raises `ValueError` if the worked result is not
    the data set's answer.
    """
    solver, gold = _SOLVERS.get(task_name), str(entry["answer"])
    if solver is None:
        return None
    if style == "hasty":
        return rng.choice(_HASTY).format(answer=gold), gold
    worked = solver(entry["metadata"], rng)
    if worked is None:
        return None
    reasoning, result = worked
    # gsm_symbolic's own text may end in 87.0 where the answer is 87.
    if result.removesuffix(".0") != gold.removesuffix(".0"):
        raise ValueError(f"{task_name}: worked {result!r}, but the answer is {gold!r}: {entry}")
    return reasoning, gold


def reduce_expression(expression: str) -> tuple[list[str], int] | None:
    """Evaluate `+ - *` and brackets one operation at a time, from left to right.

    Returns the equations in the order they are worked and the value, or None for anything that is
    not such an expression.
    """
    steps: list[str] = []
    try:
        return steps, _reduce(ast.parse(expression.strip(), mode="eval").body, steps)
    except (SyntaxError, ValueError):
        return None


def _reduce(node: ast.expr, steps: list[str]) -> int:
    """Return the value of a tree, appending each equation to `steps`; raise `ValueError`."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _reduce(node.operand, steps)
        if not isinstance(node.operand, ast.Constant):
            steps.append(f"0-{value}={-value}")
        return -value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        sign, apply = _OPERATORS[type(node.op)]
        left, right = _reduce(node.left, steps), _reduce(node.right, steps)
        value = apply(left, right)
        steps.append(f"{left}{sign}{right}={value}")
        return value
    raise ValueError("not an expression of + - * and brackets")


def _phrase(steps: list[str], rng: random.Random) -> str:
    """Join equations in one of three wordings."""
    wordings = (
        "\n".join(steps),
        "Step by step: " + ", ".join(steps) + ".",
        "First " + ", then ".join(steps) + ".",
    )
    return wordings[rng.randrange(3)]


def _expression(metadata: dict[str, Any], rng: random.Random) -> tuple[str, str] | None:
    worked = reduce_expression(metadata["expression"])
    if worked is None:
        return None
    steps, value = worked
    return _phrase(steps or [f"{value}={value}"], rng), str(value)


def _legs(metadata: dict[str, Any], rng: random.Random) -> tuple[str, str] | None:
    """Count one animal after the other, keeping the running total."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    steps: list[str] = []
    total = 0
    for animal, count in metadata["animals"].items():
        legs = count * ANIMALS[animal]
        steps.append(f"{animal} {count}*{ANIMALS[animal]}={legs}")
        if len(steps) > 1:
            steps.append(f"{total}+{legs}={total + legs}")
        total += legs
    return (_phrase(steps, rng), str(total)) if steps else None


def _gsm_symbolic(metadata: dict[str, Any], rng: random.Random) -> tuple[str, str] | None:
    """Return the data set's own solution; its last line `#### 288` is the answer."""
    reasoning, mark, answer = str(metadata["answer_cot"]).rpartition("####")
    return (reasoning.strip(), answer.strip()) if mark and reasoning.strip() else None


_Solver = Callable[[dict[str, Any], random.Random], tuple[str, str] | None]
_SOLVERS: dict[str, _Solver] = {
    "basic_arithmetic": _expression,
    "chain_sum": _expression,
    "gsm_symbolic": _gsm_symbolic,
    "leg_counting": _legs,
}
