import random
from collections import Counter

import pytest

from chainforge.core.errors import InputError
from chainforge.data.selection import REASONS, SelectionArgs, select_rows


def scored(prompt="p", index=0, **columns):
    good = {
        "completion": f"completion {index}",
        "reward": 1.2,
        "correct": True,
        "formatted": True,
        "finish_reason": "stop",
        "tokens": 10,
    }
    return {"id": prompt, "sample": index} | good | columns


def why(rows, **settings):
    """Return the fate of each row, in order."""
    selected = select_rows(rows, SelectionArgs(**settings))
    fate = {id(row): row for row in rows}
    marked = {(row["id"], row["sample"]): row["drop"] for row in selected.kept + selected.dropped}
    return [marked[(row["id"], row["sample"])] for row in fate.values()]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({}, None),
        ({"finish_reason": None}, None),
        ({"finish_reason": "length", "formatted": False, "correct": False}, "truncated"),
        ({"formatted": False, "correct": False}, "format"),
        ({"formatted": None}, "format"),
        ({"correct": None}, "unverified"),
        ({"correct": False, "reward": 0.2}, "wrong"),
        ({"reward": 0.9}, "below_min_reward"),
        ({"reward": None}, "below_min_reward"),
        ({"completion": "completion 0"}, "duplicate"),
    ],
)
def test_why_a_sample_is_dropped(columns, reason):
    rows = [scored(), scored(index=1, **columns)]
    assert why(rows, keep=2, min_reward=1.0) == [None, reason]


def test_filters_can_be_off():
    rows = [
        scored(index=0),
        scored(index=1, formatted=False),
        scored(index=2, correct=None),
        scored(index=3, correct=False),
        scored(index=4, completion="completion 0"),
    ]
    off = {"require_format": False, "require_correct": False, "drop_duplicates": False}
    assert why(rows, select="all", **off) == [None] * 5


def test_equal_completions_of_different_prompts_are_no_duplicates():
    assert why([scored("p"), scored("q")]) == [None, None]


def test_a_bad_twin_does_not_take_the_place_of_a_good_one():
    rows = [scored(finish_reason="length"), scored(index=1, completion="completion 0")]
    assert why(rows) == ["truncated", None]


def test_best_keeps_the_highest_rewards():
    rows = [scored(index=i, reward=reward) for i, reward in enumerate([1.0, None, 1.3, -1.0, 1.2])]
    lost = "not_selected"
    assert why(rows, keep=2, select="best") == [lost, lost, None, lost, None]
    assert why(rows, keep=4, select="best") == [None, lost, None, None, None]


def test_equals_are_taken_at_random_not_by_length():
    rows = [scored(str(p), i, tokens=10 + i) for p in range(200) for i in range(4)]
    kept = select_rows(rows, SelectionArgs(), seed=1).kept
    counts = Counter(row["sample"] for row in kept)
    assert sum(counts.values()) == 200
    assert min(counts[i] for i in range(4)) > 25
    assert kept == select_rows(rows, SelectionArgs(), seed=1).kept
    assert kept != select_rows(rows, SelectionArgs(), seed=2).kept


def test_what_is_kept_of_a_prompt_does_not_depend_on_other_prompts():
    rows = [scored(str(p), i) for p in range(20) for i in range(4)]
    whole = select_rows(rows, SelectionArgs(select="random")).kept
    part = select_rows(rows[40:], SelectionArgs(select="random")).kept
    assert part == whole[10:]


def test_shortest():
    rows = [scored(index=i, tokens=tokens) for i, tokens in enumerate([9, 5, 7])]
    assert why(rows, keep=2, select="shortest") == ["not_selected", None, None]
    rows = [scored(index=i, tokens=None, completion="x" * (3 - i)) for i in range(3)]
    assert why(rows, select="shortest") == ["not_selected", "not_selected", None]


def test_all_keeps_whatever_is_good():
    assert why([scored(index=i) for i in range(5)], select="all", keep=1) == [None] * 5


def test_pass_rate_counts_verified_samples():
    rows = [scored(index=i, correct=value) for i, value in enumerate([True, False, None, True])]
    rows += [scored("q", 0, correct=None)]
    selected = select_rows(rows, SelectionArgs())
    rates = {row["id"]: row["pass_rate"] for row in selected.kept + selected.dropped}
    assert rates == {"p": pytest.approx(2 / 3), "q": None}


def test_the_funnel_adds_up():
    rng = random.Random(0)
    rows = [
        scored(
            str(p),
            i,
            completion=rng.choice("abcdef"),
            reward=rng.choice([None, 0.2, 1.0, 1.2]),
            correct=rng.choice([True, True, False, None]),
            formatted=rng.choice([True, True, True, False]),
            finish_reason=rng.choice(["stop"] * 5 + ["length"]),
        )
        for p in range(300)
        for i in range(8)
    ]
    before = [dict(row) for row in rows]
    selected = select_rows(rows, SelectionArgs(keep=2, min_reward=0.5))
    funnel = selected.funnel
    assert funnel["in"] == 2400 == funnel["kept"] + sum(funnel["dropped"].values())
    assert len(selected.kept) == funnel["kept"]
    assert Counter(row["drop"] for row in selected.dropped) == funnel["dropped"]
    assert list(funnel["dropped"]) == list(REASONS)
    everything = {(row["id"], row["sample"]) for row in selected.kept + selected.dropped}
    assert len(everything) == 2400
    assert max(Counter(row["id"] for row in selected.kept).values()) == 2
    assert rows == before


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "no samples"),
        ([scored()], {"keep": 0}, "keep: expected 1"),
        ([{"id": "p", "completion": "x", "reward": 1.0, "correct": True}], {}, "'formatted'"),
        ([{"id": "p", "completion": "x", "reward": 1.0, "formatted": True}], {}, "'correct'"),
        ([{"id": "p", "completion": "x", "correct": True, "formatted": True}], {}, "'reward'"),
        ([scored(reward=None)], {"min_reward": 1.0}, "no sample has a reward"),
    ],
)
def test_bad_input(rows, settings, message):
    with pytest.raises(InputError, match=message):
        select_rows(rows, SelectionArgs(**settings))
