"""Score answers to the tasks of reasoning-gym, none of which is ever evaluated.

Most of its data sets have a scorer of their own. Those that hand the answer to `eval` or to
sympy's `parse_expr`, or that pay for a wrong one, are written again here on parsed data. The
others were read one by one and only compare text, numbers and JSON; a data set that is in neither
list gets an answer only if that answer could do nothing even in `eval`.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from chainforge.rewards.values import FOUR, number, work_out

Entry = Mapping[str, Any]

_EXPRESSION = re.compile(r"[0-9A-Za-z.+\-*/(), \t]*", re.ASCII)
_ATTACHED = re.compile(r"[0-9]\.?[A-Za-z]")  # `1if`, `1e9`, `0x1`: nothing that a task asks for
_HARMLESS = re.compile(r"[0-9A-Za-z+\-*/ ,:;\n]*", re.ASCII)
_MAX_EXPONENT = 1000


def _expression(text: str) -> ast.expr:
    """Parse arithmetic of numbers, names and calls; raise for other text.

    The tree is only read, never compiled: whoever reads it decides what a node may be.
    """
    if not _EXPRESSION.fullmatch(text) or _ATTACHED.search(text):
        raise ValueError("not arithmetic")
    return ast.parse(text.strip(), mode="eval").body


def _makes(target: int, answer: str, entry: Entry) -> bool:
    """Return whether the answer makes the target of exactly the numbers given, by `+ - * /`."""
    tree = _expression(answer)
    used = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    if {*map(type, used)} != {int} or Counter(used) != Counter(entry["metadata"]["numbers"]):
        return False
    return bool(work_out(tree, Fraction, FOUR) == target)


def _symbolic(text: str, names: Mapping[str, Any], functions: Mapping[str, Any]) -> Any:
    """Build sympy's expression out of numbers, these names and these functions of one argument."""
    import sympy

    def number(constant: Any) -> Any:
        if type(constant) not in (int, float):
            raise ValueError("not a number")
        return sympy.Rational(str(constant))

    def power(base: Any, exponent: Any) -> Any:
        if exponent.is_number and abs(exponent) > _MAX_EXPONENT:
            raise ValueError("a power beyond any that a task asks for")
        return base**exponent

    return work_out(_expression(text), number, {**FOUR, ast.Pow: power}, names, functions)


_FUNCTIONS = "sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log ln sqrt Abs"


def _integrates(answer: str, entry: Entry) -> bool:
    """Return whether the derivative of the answer is the integrand."""
    import sympy

    variable = str(entry["metadata"]["variable"])
    x = sympy.Symbol(variable)
    names = {"C": sympy.Symbol("C"), "E": sympy.E, "pi": sympy.pi, variable: x}
    functions = {name: getattr(sympy, name) for name in _FUNCTIONS.split()}
    found = sympy.diff(_symbolic(answer, names, functions), x)
    integrand = _symbolic(entry["metadata"]["integrand"], names, functions)
    return bool(sympy.simplify(found - integrand) == 0)


def _multiplies(answer: str, entry: Entry) -> bool:
    """Return whether the answer is the product, multiplied out: the question itself is not."""
    import sympy

    names = {name: sympy.Symbol(name) for name in entry["metadata"]["variables"]}
    found, product = (_symbolic(text, names, {}) for text in (answer, entry["answer"]))
    return bool(found == product)


def _same(answer: str, entry: Entry) -> bool:
    return answer.strip() == str(entry["answer"]).strip()


def _says(answer: str, entry: Entry) -> bool:
    return "".join(answer.split()).casefold() == str(entry["answer"]).casefold()


def _sorts(answer: str, entry: Entry) -> bool:
    """Return whether the answer is a JSON list of the sorted numbers, quoted or not."""
    found, gold = (
        json.loads(text.replace("'", '"'), parse_float=str, parse_int=str)
        for text in (answer, entry["answer"])
    )
    wanted = [number(str(one)) for one in gold]
    return isinstance(found, list) and [number(str(one)) for one in found] == wanted


def _near_chance(answer: str, entry: Entry) -> bool:
    """Return whether an answer is within 1/10,000 and 1 % of the chance: 0 is no small chance."""
    found, gold = number(answer), number(entry["answer"])
    if found is None or gold is None:
        return False
    return abs(found - gold) <= min(Fraction(1, 10_000), abs(gold) / 100)


_PART = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_COMPLEX = re.compile(rf"(?![+-]?$)(?:[+-]?{_PART}(?![ij.0-9]))?(?:[+-]?{_PART}?[ij])?")


def _is_complex(answer: str, entry: Entry) -> bool:
    text = "".join(answer.split()).lower()
    while text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    if not _COMPLEX.fullmatch(text):
        return False
    return complex(text.replace("i", "j")) == complex(*entry["metadata"]["result"])


def _is_decimal(answer: str, entry: Entry) -> bool:
    return Decimal(answer.replace(",", "")) == Decimal(str(entry["answer"]).replace(",", ""))


# Data sets whose only answer is the text of their entry.
_TEXTS = """
    acre aiw arc_1d base_conversion basic_arithmetic bf binary_alternation binary_matrix
    caesar_cipher count_bits count_primes course_schedule gcd isomorphic_strings largest_island lcm
    leg_counting letter_counting list_functions mahjong_puzzle maze modulo_grid number_filtering
    number_sequence ransom_note rotate_matrix rotten_oranges simple_equations simple_geometry
    spiral_matrix string_insertion string_manipulation string_splitting string_synthesis syllogism
    word_sequence_reversal
"""
# Read, with all that they call, in reasoning-gym 0.1.25: comparisons of text, numbers and JSON.
_AUDITED = """
    ab advanced_geometry arc_agi boxnet calendar_arithmetic circuit_logic codeio
    color_cube_rotation cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery
    family_relationships fraction_simplification futoshiki game_of_life graph_color
    group_anagrams gsm_symbolic jugs kakurasu knight_swap knights_knaves letter_jumble
    manipulate_matrix mini_sudoku needle_haystack number_format palindrome_generation
    palindrome_partitioning path_star polynomial_equations pool_matrix power_function
    prime_factorization propositional_logic quantum_lock rearc rectangle_count
    rubiks_cube rush_hour self_reference sentence_reordering shortest_path sokoban spell_backward
    sudoku survo time_intervals tower_of_hanoi tsumego word_ladder word_sorting zebra_puzzles
"""

HERE: dict[str, Callable[[str, Entry], bool]] = {
    **dict.fromkeys(_TEXTS.split(), _same),
    "bitwise_arithmetic": lambda answer, entry: int(answer, 0) == int(entry["answer"], 0),
    "chain_sum": _is_decimal,
    "coin_flip": _near_chance,
    "complex_arithmetic": _is_complex,
    "countdown": lambda answer, entry: _makes(entry["metadata"]["target"], answer, entry),
    "figlet_font": _says,
    "game_of_life_halting": _says,
    "n_queens": lambda answer, entry: answer in entry["metadata"]["valid_answers"],
    "number_sorting": _sorts,
    "products": _is_decimal,
    "puzzle24": lambda answer, entry: _makes(24, answer, entry),
}
"""Our own scorers that are quick on any text."""

SYMBOLIC: dict[str, Callable[[str, Entry], bool]] = {
    "intermediate_integration": _integrates,
    "polynomial_multiplication": _multiplies,
    "simple_integration": _integrates,
}
"""Our own scorers that take sympy's time, so they belong in the pool."""


def is_right(answer: str, entry: Entry) -> bool | None:
    """Score an answer here; None where only the pool may. An answer that makes it fail is wrong."""
    scorer = HERE.get(str(entry["metadata"]["source_dataset"]))
    try:
        return scorer and scorer(answer, entry)
    except Exception:
        return False


@lru_cache(maxsize=256)
def scorer_of(name: str) -> Callable[[str, dict[str, Any]], float]:
    """Return the scorer of a data set, for the pool; it may raise for a malformed answer."""
    if own := HERE.get(name) or SYMBOLIC.get(name):
        return own
    import reasoning_gym

    scorer: Callable[..., float] = reasoning_gym.get_score_answer_fn(name)
    if name in _AUDITED.split():
        return scorer
    return lambda answer, entry: scorer(answer, entry) if _HARMLESS.fullmatch(answer) else 0.0
