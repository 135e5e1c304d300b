"""The offline teacher: true worked solutions, in two styles."""

import itertools
import random
import re

import pytest
import reasoning_gym

from chainforge.core.errors import InputError
from chainforge.core.transcript import read
from chainforge.data.sources import example
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate.offline import reduce_expression, solve
from chainforge.generate.settings import TeacherArgs
from chainforge.generate.teacher import collect


@pytest.fixture(scope="module")
def sums():
    params = {"dataset": "chain_sum", "max_digits": 1}
    return load_examples(TaskArgs([{"fn": "reasoning_gym", "params": params, "size": 30}]))


def test_offline_rows(sums, tmp_path):
    def made(name, seed=3, **settings):
        return collect(TeacherArgs(num_samples=4, **settings), sums, tmp_path / name, seed=seed)

    collected = made("a")
    assert collected.sources == {"offline": 120}
    assert all(read(row["completion"]).answer == row["answer"] for row in collected.rows)
    styles = [row["sampling"]["style"] for row in collected.rows]
    assert 30 < styles.count("careful") < 90
    assert made("b") == collected != made("c", seed=4)
    careful = made("d", styles={"careful": 1.0})
    assert {row["sampling"]["style"] for row in careful.rows} == {"careful"}
    (row,) = collect(TeacherArgs(), sums[:1], tmp_path / "e", transcript="think").rows
    assert row["completion"].startswith("<think>\n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no solver for the task 'riddles'"),
        ({"styles": {"carefull": 1.0}}, "did you mean 'careful'"),
        ({"styles": {"careful": 2, "hasty": -1}}, "expected shares"),
        ({"styles": {"careful": 0}}, "one above 0"),
    ],
)
def test_what_the_offline_teacher_refuses(sums, tmp_path, settings, message):
    riddle = example([{"role": "user", "content": "Why?"}], "Because", task="riddles")
    with pytest.raises(InputError, match=message):
        collect(TeacherArgs(**settings), [*sums, riddle], tmp_path / "out")
    assert not (tmp_path / "out").exists()


KINDS = {
    "chain_sum": {"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 5, "operators": ["+", "-", "*"]},
    "leg_counting": {"min_animals": 1, "max_animals": 4, "max_instances": 5},
    "gsm_symbolic": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_is_solved_with_true_equations_and_the_gold_answer(kind):
    rng = random.Random(0)
    lengths, texts = {"careful": 0, "hasty": 0}, set()
    data = reasoning_gym.create_dataset(kind, size=200, seed=3, **KINDS[kind])
    for entry, style in itertools.product(data, lengths):
        reasoning, answer = solve(kind, entry, style, rng)
        assert answer == str(entry["answer"])
        lengths[style] += len(reasoning)
        texts.add(re.sub(r"[-\d]+", "", reasoning))
        if kind != "gsm_symbolic":  # its scorer refuses negative answers, its own included
            assert data.score_answer(answer, entry) == 1.0
            equations = re.findall(r"(-?\d+)([-+*])(-?\d+)=(-?\d+)", reasoning)
            for left, operator, right, value in equations:
                x, y = int(left), int(right)
                assert {"+": x + y, "-": x - y, "*": x * y}[operator] == int(value)
            assert style == "hasty" or equations[-1][3] == answer
    assert lengths["careful"] > lengths["hasty"]
    assert len(texts) > 4  # several phrasings


def test_expressions_are_reduced_one_operation_at_a_time_and_no_wrong_answer_is_worked():
    for expression, steps, value in (
        ("( 2 + -8 ) + 4", ["2+-8=-6", "-6+4=-2"], -2),
        ("3 - ( 7 - 9 ) * 2", ["7-9=-2", "-2*2=-4", "3--4=7"], 7),
        ("8 - -( -4 + -8 )", ["-4+-8=-12", "0--12=12", "8-12=-4"], -4),
    ):
        assert reduce_expression(expression) == (steps, value)
    for wrong in ("", "1 +", "( 1 + 2", "8 / 2", "2 ** 3", "x"):
        assert reduce_expression(wrong) is None
    entry = {"question": "1 + 1 =", "answer": "3", "metadata": {"expression": "1 + 1"}}
    with pytest.raises(ValueError, match="worked '2'"):
        solve("chain_sum", entry, "careful", random.Random(0))
