"""The offline teacher's solutions are right, in every style, for every kind it knows."""

from __future__ import annotations

import random
import re

import pytest
import reasoning_gym

from chainforge.data.solver import reduce_expression, solve

KINDS = {
    "chain_sum": {"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 5, "operators": ["+", "-", "*"]},
    "leg_counting": {"min_animals": 1, "max_animals": 4, "max_instances": 5},
    "gsm_symbolic": {},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", ["careful", "hasty"])
def test_every_entry_is_solved_with_the_gold_answer(kind: str, style: str) -> None:
    rng = random.Random(0)
    data = reasoning_gym.create_dataset(kind, size=200, seed=3, **KINDS[kind])
    for entry in data:
        worked = solve(kind, entry, style, rng)
        assert worked is not None
        reasoning, answer = worked
        assert reasoning.strip()
        assert answer == str(entry["answer"])
        if kind != "gsm_symbolic":  # its scorer refuses negative answers, its own included
            assert data.score_answer(answer, entry) == 1.0


@pytest.mark.parametrize("kind", ["chain_sum", "basic_arithmetic", "leg_counting"])
def test_every_written_equation_holds_and_the_last_one_is_the_answer(kind: str) -> None:
    rng = random.Random(1)
    for entry in reasoning_gym.create_dataset(kind, size=200, seed=5, **KINDS[kind]):
        worked = solve(kind, entry, "careful", rng)
        assert worked is not None
        equations = re.findall(r"(-?\d+)([-+*])(-?\d+)=(-?\d+)", worked[0])
        for left, operator, right, value in equations:
            x, y = int(left), int(right)
            assert {"+": x + y, "-": x - y, "*": x * y}[operator] == int(value)
        assert equations[-1][3] == worked[1]


def test_styles_differ_in_length_and_come_in_several_phrasings() -> None:
    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=0, min_terms=4, max_terms=4)[0]
    rng = random.Random(2)
    careful = {solve("chain_sum", entry, "careful", rng) for _ in range(40)}
    hasty = {solve("chain_sum", entry, "hasty", rng) for _ in range(40)}
    assert len(careful) > 1
    assert len(hasty) > 1
    assert min(len(s[0]) for s in careful if s) > max(len(s[0]) for s in hasty if s)


@pytest.mark.parametrize(
    ("expression", "steps", "value"),
    [
        ("4 - 1 - 7", ["4-1=3", "3-7=-4"], -4),
        ("( 2 + -8 ) + 4", ["2+-8=-6", "-6+4=-2"], -2),
        ("3 - ( 7 - 9 ) * 2", ["7-9=-2", "-2*2=-4", "3--4=7"], 7),
        ("8 - -( -4 + -8 )", ["-4+-8=-12", "0--12=12", "8-12=-4"], -4),
        ("-( 5 )", [], -5),
        ("7", [], 7),
    ],
)
def test_expressions_are_reduced_one_operation_at_a_time(
    expression: str, steps: list[str], value: int
) -> None:
    assert reduce_expression(expression) == (steps, value)
    for wrong in ("", "1 +", "( 1 + 2", "8 / 2", "2 ** 3", "x"):
        assert reduce_expression(wrong) is None


def test_what_has_no_solver_and_what_is_an_error() -> None:
    rng = random.Random(0)
    entry = {"question": "1 + 1 =", "answer": "3", "metadata": {"expression": "1 + 1"}}
    assert solve("sudoku", entry, "careful", rng) is None
    with pytest.raises(ValueError, match="style"):
        solve("chain_sum", entry, "sloppy", rng)
    with pytest.raises(ValueError, match="worked '2'"):
        solve("chain_sum", entry, "careful", rng)
