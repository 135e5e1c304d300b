"""Answers to reasoning-gym's tasks: the right ones in their other forms, no wrong one, no code."""

import json
from types import CodeType, FunctionType

import reasoning_gym
from reasoning_gym.factory import DATASETS

from chainforge.rewards import scorers
from chainforge.rewards.scorers import is_right
from chainforge.rewards.verify import Claim, verify_all

ANSWERS = ["3", "03", "+3.0", "-3", "1e3", "1e999999999", "3 apples", "", "three", "1,000", "NaN"]


def test_our_own_scorers_say_what_the_data_set_says():
    for name in ("chain_sum", "basic_arithmetic", "leg_counting", "gcd", "caesar_cipher"):
        entry = reasoning_gym.create_dataset(name, size=1, seed=3)[0]
        own = reasoning_gym.get_score_answer_fn(name)
        for answer in [*ANSWERS, entry["answer"], f"{entry['answer']} or so"]:
            assert is_right(answer, entry) == (own(answer, entry) >= 1), (name, answer)


def entry(dataset, answer, **metadata):
    metadata = {"source_dataset": dataset, "source_index": 0, **metadata}
    return json.dumps({"question": "?", "answer": answer, "metadata": metadata})


COUNTDOWN = entry("countdown", "8 * 3 + 5 - 5", numbers=[3, 5, 5, 8], target=24)
PUZZLE24 = entry("puzzle24", "1*9*3 - 3", numbers=[1, 9, 3, 3])
OTHER24 = entry("puzzle24", "(7 + 1)*3/1", numbers=[7, 1, 3, 1])
PRODUCT = entry("polynomial_multiplication", "x**2 + 3*x + 2", variables=["x"])
SIMPLE = entry("simple_integration", "x**3/2 - x + C", variable="x", integrand="3*x**2/2 - 1")
PARTS = entry(
    "intermediate_integration", "x*exp(x) - exp(x) + C", variable="x", integrand="x*exp(x)"
)
SORTED = entry("number_sorting", '["-1.5", "2.0", "10.0"]', direction="ascending")
QUEENS = entry("n_queens", "Q _\n_ Q", valid_answers=["Q _\n_ Q", "_ Q\nQ _"])
RARE = entry("coin_flip", "0.00048828125")
COMPLEX = entry("complex_arithmetic", "3.0 - 4.0i", result=[3, -4])
# Each entry with right answers and wrong ones.
VERDICTS = [
    (
        COUNTDOWN,
        "3*8 + (5-5) ¦ 3*8*5/5 ¦ -(-8)*3 + 5 - 5",
        "8 * 3 + 5 - 5 = 24 ¦ 8*3 ¦ 24 ¦ 8*5 - 5 - 3 ¦ 8*3 + 5//5 ¦ 8*3 + 0*55 ¦ 3*8/(5-5) ¦ 8**3**5**5",
    ),
    (PUZZLE24, "3*9 - 3*1 ¦ 9*3/1-3", "1*9*3 ¦ 8*3*1*1"),
    (OTHER24, "3*(7 + 1)*1", "1*9*3 - 3 ¦ 7*3 + 1 + 1 + 1"),
    (
        PRODUCT,
        "2 + 3*x + x**2 ¦ x*x + 3.0*x + 4/2",
        "(x+1)*(x+2) ¦ x**2 + 3*x + 3 ¦ expand((x+1)*(x+2)) ¦ x**9**9**9",
    ),
    (
        SIMPLE,
        "0.5*x**3 - x ¦ x*(x**2/2 - 1) + C + 7",
        "x**3/2 - x + C*x ¦ 3*x**2/2 - 1 ¦ Integral(3*x**2/2 - 1, x)",
    ),
    (PARTS, "(x - 1)*E**x + C ¦ exp(x)*(x-1)", "x*exp(x) + C ¦ integrate(x*exp(x), x)"),
    (
        SORTED,
        "[-1.5, 2, 10] ¦ ['-1.50', '2', '10']",
        "[-1.5, 2, 10.9] ¦ [10, 2, -1.5] ¦ [NaN, NaN, NaN] ¦ [-1.5, 2]",
    ),
    (QUEENS, "_ Q\nQ _", 'Q Q\n_ _ ¦ [["_", "Q"], ["Q", "_"]]'),
    (RARE, "1/2048 ¦ 0.000488 ¦ 4.88e-4", "0 ¦ 0.0005 ¦ 1e-9"),
    (COMPLEX, "3 - 4i ¦ (3-4.0j)", "-4i ¦ nan ¦ NaN - nani ¦ 3+4i"),
    (entry("complex_arithmetic", "-1.00i", result=[0, -1]), "-i", ""),
    (entry("complex_arithmetic", "5.00", result=[5, 0]), "5", "nan"),
    (entry("game_of_life_halting", "False"), "false", "True"),
    (entry("game_of_life_halting", "True"), "", "no idea"),
    (entry("figlet_font", "understanding"), "U N D E R S T A N D I N G", "understandung"),
    (entry("bitwise_arithmetic", "0x1f", problem="0x1e + 0x1"), "0x1F ¦ 31", "0x1e + 0x1"),
    (entry("binary_matrix", "0 1\n1 0"), "0 1\n1 0\n", "[[0, 1], [1, 0]]"),
    (entry("spiral_matrix", "1 2 3"), "", "[1, 2, 3]"),
    (entry("string_insertion", "ABC"), "", "['A', 'B', 'C']"),
    (entry("polynomial_equations", ""), '""', "banana"),
    (entry("polynomial_equations", "-0.5, 2.0"), "2, -0.5", "nan, nan"),
]


def test_right_answers_in_other_forms_and_no_wrong_ones():
    cases = [
        (own, answer, right)
        for own, good, bad in VERDICTS
        for answers, right in ((good, True), (bad, False))
        for answer in answers.split(" ¦ ")
        if answer
    ]
    said = verify_all([Claim("reasoning_gym", answer, None, own) for own, answer, _ in cases])
    assert [case for case, got in zip(cases, said, strict=True) if got is not case[2]] == []


def test_an_audited_scorer_of_this_reasoning_gym_evaluates_nothing():
    ours = {*scorers.HERE, *scorers.SYMBOLIC, "composite"}
    audited = set(scorers._AUDITED.split())
    assert not audited & ours
    for name, (kind, _) in DATASETS.items():
        assert name in audited | ours, f"{name} is new: read its scorer"
        if name not in ours:
            assert not reached(kind) & {"eval", "exec", "compile", "sympify", "parse_expr"}, name


def reached(kind):
    """Return the names that a scorer reaches outside reasoning-gym."""
    names, seen, todo = set(), set(), [kind.score_answer]
    while todo:
        function = todo.pop()
        if function in seen:
            continue
        seen.add(function)
        for name in names_of(function.__code__):
            known = function.__globals__.get(name, getattr(kind, name, None))
            inner = [*vars(known).values()] if isinstance(known, type) else [known]
            inner = [getattr(one, "__func__", one) for one in inner]
            inner = [one for one in inner if isinstance(one, FunctionType)
                     and one.__module__.startswith("reasoning_gym")]  # fmt: skip
            todo += inner
            names |= set() if inner else {name}
    return names


def names_of(code):
    inner = (names_of(one) for one in code.co_consts if isinstance(one, CodeType))
    return set(code.co_names).union(*inner)
