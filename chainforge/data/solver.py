"""Write worked solutions from a task's own metadata, as an offline teacher would.

Real teachers differ in care: some write every step, some answer at once. Both styles end in the
right answer here; what differs is whether a small student can follow how it was reached.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from reasoning_gym.arithmetic.leg_counting import ANIMALS

STYLES = ("careful", "hasty")

_TOKEN = re.compile(r"\d+|[-+*()]")
_HASTY = ("I see it at once: {answer}.", "That is {answer}.", "It must be {answer}.")


def solve(
    task_name: str, entry: dict[str, Any], style: str, rng: random.Random
) -> tuple[str, str] | None:
    """Return (reasoning, answer) for a reasoning-gym entry, or None where there is no solver.

    Args:
        task_name: name of the reasoning-gym data set, such as `chain_sum`.
        entry: its item, with `question`, `answer` and `metadata`.
        style: `careful` (every step) or `hasty` (one short line).
        rng: chooses between the phrasings of a style.

    Raises:
        ValueError: for an unknown style, or if the worked result is not the data set's answer.
    """
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: choose one of {', '.join(STYLES)}")
    solver = _SOLVERS.get(task_name)
    if solver is None:
        return None
    gold = str(entry["answer"])
    if style == "hasty":
        return rng.choice(_HASTY).format(answer=gold), gold
    worked = solver(entry["metadata"], rng)
    if worked is None:
        return None
    reasoning, result = worked
    if result != gold and not _same_number(result, gold):
        raise ValueError(f"{task_name}: worked {result!r}, but the answer is {gold!r}: {entry}")
    return reasoning, gold


def reduce_expression(expression: str) -> tuple[list[str], int] | None:
    """Evaluate `+ - *` and brackets one operation at a time.

    Returns the equations in the order they are worked (innermost, leftmost bracket first) and the
    value, or None for anything that is not such an expression.
    """
    terms = _terms(expression)
    if terms is None:
        return None
    steps: list[str] = []
    while len(terms) > 1:
        close = terms.index(")") if ")" in terms else len(terms)
        opens = [i for i in range(close) if terms[i] == "("]
        start = opens[-1] + 1 if opens else 0
        value = _work_flat(terms[start:close], steps)
        if value is None or bool(opens) != (close < len(terms)):
            return None
        if start > 1 and terms[start - 2] == "negate":
            steps.append(f"0-{value}={-value}")
            terms[start - 2 : close + 1] = [-value]
        elif opens:
            terms[start - 1 : close + 1] = [value]
        else:
            terms = [value]
    return (steps, terms[0]) if terms and isinstance(terms[0], int) else None


def _terms(expression: str) -> list[int | str] | None:
    """Split into numbers, operators and brackets; a minus that cannot subtract is a sign."""
    if _TOKEN.sub("", expression).strip():
        return None
    terms: list[int | str] = []
    sign = False
    for token in _TOKEN.findall(expression):
        if token.isdigit():
            terms.append(-int(token) if sign else int(token))
            sign = False
        elif sign and token == "(":
            terms += ["negate", "("]
            sign = False
        elif sign:
            return None
        elif token == "-" and (not terms or terms[-1] in ("+", "-", "*", "(")):
            sign = True
        else:
            terms.append(token)
    return None if sign else terms


def _work_flat(terms: list[int | str], steps: list[str]) -> int | None:
    """Evaluate a bracket-free run, products first, appending each equation to `steps`."""
    while len(terms) > 1:
        at = terms.index("*") if "*" in terms else 1
        left, operator, right = terms[at - 1 : at + 2] if len(terms) > at + 1 else ("", "", "")
        if not (isinstance(left, int) and isinstance(right, int)):
            return None
        if operator == "+":
            value = left + right
        elif operator == "-":
            value = left - right
        elif operator == "*":
            value = left * right
        else:
            return None
        steps.append(f"{left}{operator}{right}={value}")
        terms[at - 1 : at + 2] = [value]
    return terms[0] if terms and isinstance(terms[0], int) else None


def _same_number(left: str, right: str) -> bool:
    """Compare as numbers: gsm_symbolic's own text may end in 87.0 where the answer is 87."""
    try:
        return float(left) == float(right)
    except ValueError:
        return False


def _phrase(steps: list[str], rng: random.Random) -> str:
    """Join equations in one of three wordings."""
    wording = rng.randrange(3)
    if wording == 0:
        return "\n".join(steps)
    if wording == 1:
        return "Step by step: " + ", ".join(steps) + "."
    return "First " + ", then ".join(steps) + "."


def _expression(metadata: dict[str, Any], rng: random.Random) -> tuple[str, str] | None:
    worked = reduce_expression(metadata["expression"])
    if worked is None:
        return None
    steps, value = worked
    return _phrase(steps or [f"{value}={value}"], rng), str(value)


def _legs(metadata: dict[str, Any], rng: random.Random) -> tuple[str, str] | None:
    """Count one animal after the other, keeping the running total."""
    steps: list[str] = []
    total: int | None = None
    for animal, count in metadata["animals"].items():
        legs = count * ANIMALS[animal]
        steps.append(f"{animal} {count}*{ANIMALS[animal]}={legs}")
        if total is not None:
            steps.append(f"{total}+{legs}={total + legs}")
        total = legs if total is None else total + legs
    return None if total is None else (_phrase(steps, rng), str(total))


def _gsm_symbolic(metadata: dict[str, Any], rng: random.Random) -> tuple[str, str] | None:
    """Use the data set's own solution; its last line `#### 288` is the answer."""
    reasoning, mark, answer = str(metadata["answer_cot"]).rpartition("####")
    return (reasoning.strip(), answer.strip()) if mark and reasoning.strip() else None


_Solver = Callable[[dict[str, Any], random.Random], tuple[str, str] | None]
_SOLVERS: dict[str, _Solver] = {
    "basic_arithmetic": _expression,
    "chain_sum": _expression,
    "gsm_symbolic": _gsm_symbolic,
    "leg_counting": _legs,
}
