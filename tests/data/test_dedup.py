"""Tokens, runs and sketches: the quick way must be the slow way, in every process."""

import subprocess
import sys
import unicodedata

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chainforge.data import dedup
from chainforge.data.dedup import PERMUTATIONS, hashed, runs, sketches, tokens

SOLUTION = "First, 12*(3+4) = 84.\nThen 84/2 - 1_000: it's x^2 < 5%, isn't it? _ __ $3,5 [0]"


@given(st.text(st.characters(max_codepoint=127), max_size=80))
def test_ascii_is_cut_as_any_other_text(text: str) -> None:
    found = dedup._TOKENS.findall(unicodedata.normalize("NFKC", text).lower())
    assert tokens(text) == [token for token in found if token != "_"]


def test_words_numbers_and_operators_are_tokens() -> None:
    assert tokens("12 / (3+4) < 2.0") == ["12", "/", "3", "+", "4", "<", "2", "0"]
    assert tokens("**Ça va?** 2·数字") == ["ça", "va", "2", "·", "数", "字"]
    assert tokens("half \ud83d a character") == ["half", "a", "character"]


@given(st.lists(st.sampled_from(["a", "b", "7", "+"]), max_size=40), st.integers(1, 20))
def test_runs_are_equal_where_their_tokens_are(words: list[str], size: int) -> None:
    plain = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    marks = runs(hashed(words), size).tolist()
    assert len(marks) == len(plain)
    assert len(set(zip(marks, plain, strict=True))) == len(set(marks)) == len(set(plain))


def test_a_short_text_is_one_shingle_and_an_empty_one_has_none() -> None:
    two = dedup.shingles(hashed(["one", "two"]))
    assert len(two) == 1
    assert two[0] == runs(hashed(["zero", "one", "two"]), 2)[1]
    assert len(dedup.shingles(hashed([]))) == 0
    assert sketches([two[:0], two]).shape == (2, PERMUTATIONS)
    assert sketches([]).shape == (0, PERMUTATIONS)


def test_another_process_sketches_a_text_alike() -> None:
    code = (
        "from chainforge.data.dedup import *\n"
        f"print(sketches([shingles(hashed(tokens({SOLUTION!r})))]).tolist())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = sketches([dedup.shingles(hashed(tokens(SOLUTION)))])
    assert found.stdout.strip() == str(own.tolist())


def test_sketches_estimate_what_sets_have_in_common() -> None:
    one = np.arange(1_000, dtype=np.uint64) * np.uint64(2**40 + 1)
    first, second = sketches([one[:800], one[200:]])
    assert abs((first == second).mean() - 0.6) < 0.15  # 600 of 1,000; the standard error is 0.04
