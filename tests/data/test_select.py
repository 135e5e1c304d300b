"""Whether each sample comes out once, kept or dropped for the first reason that holds."""

import copy
import itertools
import random
from collections import Counter

import pytest

from chainforge.core.errors import InputError
from chainforge.data.filters import SelectionArgs
from chainforge.data.select import REASONS, match_pairs, select

GOOD = {"reward": 1.2, "correct": True, "formatted": True, "finish_reason": "stop", "tokens": 10}


def scored(prompt="p", index=0, **columns):
    row = {"id": prompt, "sample": index, "completion": f"completion {index}"}
    return row | GOOD | columns


def why(rows, seed=0, **settings):
    """Return the fate of each row, in order."""
    return [row["drop"] for row in select(rows, SelectionArgs(**settings), seed=seed)[0]]


def kept(rows, seed=0, **settings):
    marked, _ = select(rows, SelectionArgs(**settings), seed=seed)
    return [row for row in marked if row["drop"] is None]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({}, None),
        ({"finish_reason": None}, None),
        ({"finish_reason": "length", "formatted": False, "correct": False}, "truncated"),
        ({"completion": "4<|im_end|>\n<|im_start|>user"}, "chat_token"),
        ({"completion": "4", "chat_token": "<X>"}, "chat_token"),
        ({"formatted": None}, "format"),
        ({"correct": None}, "unverified"),
        ({"correct": None, "answer": None}, None),
        ({"correct": None, "answer": None, "entry": "{}"}, "unverified"),
        ({"correct": False, "reward": 0.2}, "wrong"),
        ({"reward": 0.9}, "below_min_reward"),
        ({"reward": None}, "below_min_reward"),
        ({"completion": "completion 0"}, "duplicate"),
    ],
)
def test_why_a_sample_is_dropped(columns, reason):
    rows = [scored(), scored(index=1, **columns)]
    assert why(rows, max_per_prompt=2, min_reward=1.0) == [None, reason]


def test_which_samples_of_a_prompt_are_kept():
    rewards, tokens = [1.0, None, 1.3, -1.0, 1.2], [9, 8, 5, 7, 8]
    rows = [scored(index=i, reward=rewards[i], tokens=tokens[i]) for i in range(5)]
    for choice, number, expected in (
        ("best", 2, {2, 4}), ("best", 4, {0, 2, 3, 4}), ("shortest", 2, {2, 3}),
        ("all", 1, {0, 1, 2, 3, 4}),
    ):  # fmt: skip
        found = kept(rows, select=choice, max_per_prompt=number)
        assert {row["sample"] for row in found} == expected
    bad = [scored(), scored(index=1, formatted=False), scored(index=2, correct=False)]
    assert why(bad, select="all", require_format=False, require_correct=False) == [None] * 3
    assert why([scored("p"), scored("q")]) == [None, None]
    # Only of good samples can there be a duplicate.
    bad = [scored(finish_reason="length"), scored(index=1, completion="completion 0")]
    assert why(bad) == ["truncated", None]


def test_equals_are_taken_at_random_not_by_length():
    rows = [scored(str(p), i, tokens=10 + i) for p in range(200) for i in range(4)]
    found = kept(rows, seed=1)
    counts = Counter(row["sample"] for row in found)
    assert sum(counts.values()) == 200
    assert min(counts[i] for i in range(4)) > 25
    assert found == kept(rows, seed=1) != kept(rows, seed=2)
    assert kept(rows[400:], select="random") == kept(rows, select="random")[100:]


def test_diverse_keeps_the_best_and_what_differs_most():
    same = "we add the first number to the second one and then look at the sum we have got so far"
    other = "count backwards from a hundred in steps of seven until nothing more can be taken away"
    texts = [same] * 4 + [other]
    rows = [scored(index=i, completion=f"{text} {i}") for i, text in enumerate(texts)]
    rows[2]["reward"] = 2.0
    found = kept(rows, select="diverse", max_per_prompt=2)
    assert {row["sample"] for row in found} == {2, 4}


def test_quotas_are_spread_evenly_and_what_one_leaves_goes_to_the_others():
    sizes = {"big": 80, "middle": 30, "small": 5}
    rows = [scored(f"{task}{p}", task=task) for task, size in sizes.items() for p in range(size)]
    found = kept(rows, seed=3, max_rows=45)
    assert Counter(row["task"] for row in found) == {"big": 20, "middle": 20, "small": 5}
    assert found == kept(rows, seed=3, max_rows=45) != kept(rows, seed=4, max_rows=45)


def test_near_duplicates_of_a_prompt_and_prompts_that_ask_the_same():
    text, other = (" ".join(f"{word}{i}" for i in range(60)) for word in ("word", "term"))
    texts = [text, text.replace("word30", "other"), other]
    rows = [scored(index=i, completion=one) for i, one in enumerate(texts)]
    rows += [scored("q", 0, completion=text)]
    assert why(rows, select="all", near_duplicates=0.7) == [None, "near_duplicate", None, None]
    asked = ("1 + 1?", " 1 +  1?", "2?")
    rows = [scored(p) | {"prompt": [{"role": "user", "content": p}]} for p in asked]
    assert why(rows) == [None, "duplicate_prompt", None]
    assert why([rows[0] | {"correct": False}, *rows[1:]]) == ["wrong", None, None]
    texts = ("Count  on.\n", "count on.", "count on", "half \ud83d a character")
    rows = [scored(index=i, completion=one) for i, one in enumerate(texts)]
    assert why(rows, select="all") == [None, "duplicate", None, None]


def test_pass_rate_counts_verified_samples_of_the_first_round():
    """Later rounds go to prompts that lacked successes; with them the rate would be biased."""
    rows = [scored(index=i, correct=value) for i, value in enumerate([True, False, None, True])]
    rows += [scored("q", 0, correct=None)]
    rows += [scored("r", correct=False, round=0), scored("r", index=1, round=1)]
    rates = {row["id"]: row["pass_rate"] for row in select(rows, SelectionArgs())[0]}
    assert rates == {"p": pytest.approx(2 / 3), "q": None, "r": 0.0}


def test_the_funnel_adds_up():
    values = {
        "completion": "abcdef",
        "reward": [None, 0.2, 1.0, 1.2],
        "correct": [True, True, False, None],
        "formatted": [True, True, True, False],
        "finish_reason": ["stop"] * 5 + ["length"],
    }
    draw = random.Random(0).choice
    rows = [
        scored(str(p), i, **{name: draw(of) for name, of in values.items()})
        for p, i in itertools.product(range(300), range(8))
    ]
    before = copy.deepcopy(rows)
    marked, funnel = select(rows, SelectionArgs(max_per_prompt=2, min_reward=0.5))
    fates = Counter(row["drop"] for row in marked)
    assert funnel["in"] == 2400 == funnel["kept"] + sum(funnel["dropped"].values())
    assert fates == funnel["dropped"] | {None: funnel["kept"]}
    assert list(funnel["dropped"]) == [name for name in REASONS if name in funnel["dropped"]]
    assert all(("drop_detail" in row) == (row["drop"] is not None) for row in marked)
    assert max(Counter(row["id"] for row in marked if row["drop"] is None).values()) == 2
    assert rows == before


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "no samples"),
        ([scored()], {"max_per_prompt": 0}, "max_per_prompt: expected .* of at least 1"),
        ([scored()], {"near_duplicates": 2}, "near_duplicates: .* at most 1,"),
        ([scored()], {"decontaminate": ["nowhere.yaml"]}, r"decontaminate\[0\]: nowhere.yaml"),
    ],
)
def test_bad_input(rows, settings, message):
    with pytest.raises(InputError, match=message):
        select(rows, SelectionArgs(**settings))


def test_pairs_are_a_kept_sample_and_a_worse_one_of_similar_length():
    texts = ["right " * 4, "right " * 9, "wrong " * 3, "wrong " * 8, "wrong " * 30, "?"]
    rows = [
        scored("p", n, completion=text, correct=text.startswith("right"), reward=1 - n / 9)
        for n, text in enumerate(texts)
    ]
    rows[5] |= {"formatted": False}
    alone = [scored("q", 0), scored("r", 0, correct=False)]
    asks = dict.fromkeys(("answer", "correct"))
    open_ended = [scored("s", n, reward=r, **asks) for n, r in enumerate((0.2, 0.9, None, 0.2))]
    marked, _ = select(rows + alone + open_ended, SelectionArgs(max_per_prompt=2))
    found = [(a["id"], a["sample"], b["sample"]) for a, b in match_pairs(marked, 3)]
    assert found == [("p", 0, 2), ("p", 1, 3), ("s", 1, 0)]
    assert [a["sample"] for a, _ in match_pairs(marked, 1)] == [0, 1]
