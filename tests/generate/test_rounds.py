import random

import pytest

from chainforge.core.errors import InputError
from chainforge.core.jsonl import example, sample
from chainforge.data.select import SelectionArgs
from chainforge.generate.rollouts import pass_rates
from chainforge.generate.sampling import Rounds, accepted_by
from chainforge.generate.settings import SamplingArgs


def prompts(count):
    return [
        example([{"role": "user", "content": str(n)}], "1", task="t", verifier="exact")
        for n in range(count)
    ]


def answer(row, number, correct, size=4, text=None):
    return sample(row, text or f"{number}", number, source="policy", correct=correct,
                  round=number // size)  # fmt: skip


def simulate(rates, rng, **settings):
    """Sample prompts of known pass rates in rounds; return the rows and the rounds."""
    rows = prompts(len(rates))
    args = SamplingArgs(**{"max_samples": 16, "round_size": 4} | settings)
    rounds = Rounds(rows, args, keep=settings.pop("keep", 1))
    chance = {row["id"]: rate for row, rate in zip(rows, rates, strict=True)}
    while draws := rounds.draws(rows, seed=0):
        rounds.note(
            [answer(one.row, one.sample, rng.random() < chance[one.row["id"]]) for one in draws]
        )
    return rounds


def test_the_pass_rate_is_unbiased_though_rounds_stop_early():
    for rate in (0.2, 0.5, 0.8):
        rounds = simulate([rate] * 4000, random.Random(1))
        measured = pass_rates(rounds.samples()).values()
        mean = sum(measured) / 4000
        assert mean == pytest.approx(rate, abs=0.015)
        every = pass_rates([row | {"round": 0} for row in rounds.samples()]).values()
        naive = sum(every) / 4000
        if rate < 0.5:
            assert naive > rate + 0.03  # what it would be otherwise
        assert rounds.report()["samples_saved"] > 0


def test_rounds_save_samples_and_lose_no_row():
    rng = random.Random(2)
    rounds = simulate([0.2, 0.5, 0.8] * 300, rng)
    report = rounds.report()
    rows = {row["id"] for row in rounds.samples() if row["correct"]}
    assert len(rows) == report["enough"]
    assert report["given_up"] == 0
    assert report["enough"] / 900 > 0.98  # what 16 samples each would find
    assert report["samples"] < 0.5 * 900 * 16


def test_without_rounds_every_sample_counts():
    row = prompts(1)[0]
    rows = [row | {"correct": correct, "sample": n} for n, correct in enumerate([1, 0, None, 1])]
    assert pass_rates(rows) == {row["id"]: pytest.approx(2 / 3)}
    assert pass_rates([row | {"correct": None}]) == {}


def test_equal_completions_count_once():
    (row,) = prompts(1)
    rounds = Rounds([row], SamplingArgs(max_samples=8, round_size=2), keep=2)
    rounds.note([answer(row, n, True, 2, text="the same") for n in range(2)])
    assert rounds.state(row["id"])[0] == "open"
    rounds.note([answer(row, n, True, 2, text=f"other {n}") for n in range(2, 4)])
    assert rounds.state(row["id"]) == ("enough", 4)


def test_a_round_that_was_cut_is_made_whole_before_it_decides():
    (row,) = prompts(1)
    rounds = Rounds([row], SamplingArgs(max_samples=8, round_size=4))
    rounds.note([answer(row, 0, True), answer(row, 2, True)])
    assert [draw.sample for draw in rounds.draws([row], 0)] == [1, 3]


def test_accepted_is_what_no_filter_of_the_row_drops():
    (row,) = prompts(1)
    good = answer(row, 0, True) | {"formatted": True, "finish_reason": "stop", "reward": 1.0}
    rows = [good, good | {"finish_reason": "length"}, good | {"correct": False},
            good | {"formatted": False}, good]  # fmt: skip
    assert accepted_by(SelectionArgs(near_duplicates=0.8))(rows) == [
        True, False, False, False, True
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_failed_samples": 4}, "requires max_samples"),
        ({"max_samples": 0}, "max_samples: expected 1"),
        ({"max_samples": 4, "round_size": 0}, "round_size: expected 1"),
        ({"max_samples": 4, "temperature": 0.0}, "set `max_samples: 1`"),
        ({"engine": "api"}, "needs one"),
        ({"base_url": "http://x/v1"}, "goes with `engine: api`"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        SamplingArgs(**settings).check()
