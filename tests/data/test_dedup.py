"""Tokens, runs and near duplicates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainforge.data.dedup import (
    most_different,
    near_duplicates,
    runs,
    shingles,
    similarity,
    text_key,
    tokens,
)


def test_words_numbers_and_operators_are_tokens() -> None:
    assert tokens("12 / (3+4) < 2.0") == ["12", "/", "3", "+", "4", "<", "2", "0"]
    assert tokens("**Ça va?** 2·数字") == ["ça", "va", "2", "·", "数", "字"]
    assert tokens("it's _ a_b $3,5 [0]") == ["it", "s", "a", "b", "3", "5", "0"]


@given(st.lists(st.sampled_from(["a", "b", "7", "+"]), max_size=40), st.integers(1, 20))
def test_runs_are_all_words_that_follow_one_another(words: list[str], size: int) -> None:
    assert runs(words, size) == [
        tuple(words[start : start + size]) for start in range(len(words) - size + 1)
    ]


def test_a_short_text_is_one_run_and_an_empty_one_has_none() -> None:
    assert shingles("One, two!") == {("one", "two")}
    assert shingles("...") == set()
    assert similarity(shingles(""), shingles("?")) == 1.0
    assert similarity(shingles(""), shingles("one")) == 0.0


def test_near_duplicates_and_what_differs_most() -> None:
    long = " ".join(f"word{i}" for i in range(60))
    sets = [shingles(text) for text in (long, long.replace("word30", "x"), "a b c d e f", long)]
    assert near_duplicates(sets, 0.8) == {1: pytest.approx(51 / 61), 3: 1.0}
    assert near_duplicates(sets, 0.9) == {3: 1.0}
    assert most_different(sets, 0, 3) == [0, 2, 1]
    assert most_different(sets[:1], 0, 3) == [0]


def test_the_key_is_that_of_a_text_but_for_case_and_white_space() -> None:
    assert text_key("Count  on.\n") == text_key("count on.") != text_key("count on")
    assert text_key("half \ud83d a character") >= 0
