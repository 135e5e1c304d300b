import random
from collections import Counter

import pytest

from chainforge.core.errors import InputError
from chainforge.data.filters import SelectionArgs
from chainforge.data.select import REASONS, select_rows


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
        ({"finish_reason": "half \ud83d a character"}, "truncated"),
        ({"finish_reason": "length", "formatted": False, "correct": False}, "truncated"),
        ({"completion": "4<|im_end|>\n<|im_start|>user"}, "chat_token"),
        ({"completion": "4", "chat_token": "<X>"}, "chat_token"),
        ({"formatted": False, "correct": False}, "format"),
        ({"formatted": None}, "format"),
        ({"correct": None}, "unverified"),
        ({"correct": None, "answer": "4"}, "unverified"),
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


def test_only_good_samples_of_one_prompt_are_duplicates():
    assert why([scored("p"), scored("q")]) == [None, None]
    rows = [scored(finish_reason="length"), scored(index=1, completion="completion 0")]
    assert why(rows) == ["truncated", None]


def test_best_keeps_the_highest_rewards():
    rows = [scored(index=i, reward=reward) for i, reward in enumerate([1.0, None, 1.3, -1.0, 1.2])]
    lost = "not_selected"
    assert why(rows, max_per_prompt=2, select="best") == [lost, lost, None, lost, None]
    assert why(rows, max_per_prompt=4, select="best") == [None, lost, None, None, None]


def test_equals_are_taken_at_random_not_by_length():
    rows = [scored(str(p), i, tokens=10 + i) for p in range(200) for i in range(4)]
    kept = select_rows(rows, SelectionArgs(), seed=1).kept
    counts = Counter(row["sample"] for row in kept)
    assert sum(counts.values()) == 200
    assert min(counts[i] for i in range(4)) > 25
    assert kept == select_rows(rows, SelectionArgs(), seed=1).kept
    assert kept != select_rows(rows, SelectionArgs(), seed=2).kept

    random = SelectionArgs(select="random")
    assert select_rows(rows[400:], random).kept == select_rows(rows, random).kept[100:]


def test_shortest_and_all():
    rows = [scored(index=i, tokens=tokens) for i, tokens in enumerate([9, 5, 7])]
    assert why(rows, max_per_prompt=2, select="shortest") == ["not_selected", None, None]
    rows = [scored(index=i, tokens=None, completion="x" * (3 - i)) for i in range(3)]
    assert why(rows, select="shortest") == ["not_selected", "not_selected", None]
    assert why(rows, select="all", max_per_prompt=1) == [None] * 3


def test_diverse_keeps_what_differs_most():
    same = "we add the first number to the second one and then look at the sum we have got so far"
    other = "count backwards from a hundred in steps of seven until nothing more can be taken away"
    rows = [
        scored(index=i, completion=f"{text} {i}") for i, text in enumerate([same] * 4 + [other])
    ]
    for seed in range(5):
        kept = select_rows(rows, SelectionArgs(select="diverse", max_per_prompt=2), seed=seed).kept
        assert 4 in {row["sample"] for row in kept}
        assert len(kept) == 2
    best = [row | {"reward": 2.0 if row["sample"] == 2 else 1.0} for row in rows]
    assert why(best, select="diverse", max_per_prompt=2)[2] is None


def test_the_pass_rate_band_is_of_correctness():
    rows = [scored("always", i) for i in range(4)]
    rows += [scored("half", i, correct=i < 2, reward=1.2) for i in range(4)]
    rows += [scored("rarely", i, correct=i < 1) for i in range(4)]
    fates = why(rows, select="all", min_pass_rate=0.3, max_pass_rate=0.9)
    assert (
        fates == ["pass_rate"] * 4 + [None, None, "wrong", "wrong"] + ["pass_rate"] + ["wrong"] * 3
    )


def test_quotas_are_spread_evenly_and_what_one_leaves_goes_to_the_others():
    rows = [scored(f"a{p}", task="big") for p in range(80)]
    rows += [scored(f"b{p}", task="middle") for p in range(30)]
    rows += [scored(f"c{p}", task="small") for p in range(5)]
    args = SelectionArgs(max_rows=45)
    kept = select_rows(rows, args, seed=3).kept
    assert Counter(row["task"] for row in kept) == {"big": 20, "middle": 20, "small": 5}
    assert kept == select_rows(rows, args, seed=3).kept
    assert kept != select_rows(rows, args, seed=4).kept
    assert len(select_rows(rows, SelectionArgs(max_rows=50)).kept) == 50


def test_near_duplicates_of_a_prompt():
    text = " ".join(f"word{i}" for i in range(60))
    rows = [
        scored(index=0, completion=text),
        scored(index=1, completion=text.replace("word30", "other")),
        scored(index=2, completion=" ".join(f"term{i}" for i in range(60))),
        scored("q", 0, completion=text),
    ]
    fates = why(rows, select="all", near_duplicates=0.7)
    assert fates == [None, "near_duplicate", None, None]


def test_prompts_that_ask_the_same_are_one():
    rows = [
        scored(p) | {"prompt": [{"role": "user", "content": p}]}
        for p in ("1 + 1?", " 1 +  1?", "2?")
    ]
    assert why(rows) == [None, "duplicate_prompt", None]
    bad = [rows[0] | {"correct": False}, *rows[1:]]
    assert why(bad) == ["wrong", None, None]


def test_pass_rate_counts_verified_samples_of_the_first_round():
    """Later rounds go to prompts that lacked successes; with them the rate would be biased."""
    rows = [scored(index=i, correct=value) for i, value in enumerate([True, False, None, True])]
    rows += [scored("q", 0, correct=None)]
    rows += [scored("r", correct=False, round=0), scored("r", index=1, round=1)]
    selected = select_rows(rows, SelectionArgs())
    rates = {row["id"]: row["pass_rate"] for row in selected.kept + selected.dropped}
    assert rates == {"p": pytest.approx(2 / 3), "q": None, "r": 0.0}


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
    selected = select_rows(rows, SelectionArgs(max_per_prompt=2, min_reward=0.5))
    funnel = selected.funnel
    assert funnel["in"] == 2400 == funnel["kept"] + sum(funnel["dropped"].values())
    assert len(selected.kept) == funnel["kept"]
    assert Counter(row["drop"] for row in selected.dropped) == funnel["dropped"]
    assert list(funnel["dropped"]) == [name for name in REASONS if name in funnel["dropped"]]
    assert {row["drop"] for row in selected.dropped if not row["drop_detail"]} == set()
    everything = {(row["id"], row["sample"]) for row in selected.kept + selected.dropped}
    assert len(everything) == 2400
    assert max(Counter(row["id"] for row in selected.kept).values()) == 2
    assert rows == before


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "no samples"),
        ([scored()], {"max_per_prompt": 0}, "max_per_prompt: expected 1"),
        ([{"id": "p", "completion": "x", "reward": 1.0, "correct": True}], {}, "'formatted'"),
        ([{"id": "p", "completion": "x", "reward": 1.0, "formatted": True}], {}, "'correct'"),
        ([{"id": "p", "completion": "x", "correct": True, "formatted": True}], {}, "'reward'"),
        ([scored(reward=None)], {"min_reward": 1.0}, "no sample has a reward"),
        ([scored()], {"max_rows": 0}, "max_rows: expected 1"),
        ([scored()], {"near_duplicates": 2}, "near_duplicates: expected a share"),
        ([scored()], {"min_pass_rate": 0.9, "max_pass_rate": 0.1}, "is more than"),
        ([scored()], {"decontaminate": ["nowhere.yaml"]}, r"decontaminate\[0\]: nowhere.yaml"),
        ([scored()], {"decontaminate": ["gsm9k"]}, "not a file, a folder, a Hub id"),
        ([scored()], {"decontaminate": ["{fn: hug}"]}, "decontaminate.*no built-in function 'hug'"),
    ],
)
def test_bad_input(rows, settings, message):
    with pytest.raises(InputError, match=message):
        select_rows(rows, SelectionArgs(**settings))
