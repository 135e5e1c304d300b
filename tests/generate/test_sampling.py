"""The loop that samples, scores, writes and resumes, alone, in rounds and in several processes."""

import random
from collections import Counter

import pytest

from chainforge.core.config import parse
from chainforge.core.errors import InputError
from chainforge.core.jsonl import read_rows
from chainforge.data.filters import SelectionArgs
from chainforge.data.select import pass_rates
from chainforge.data.sources import example
from chainforge.generate.local import LocalEngine, open_policy
from chainforge.generate.rollouts import score_samples
from chainforge.generate.sampling import Rounds, accepted_by, roll_out, sample
from chainforge.generate.settings import SamplingArgs, seed_of
from chainforge.generate.shards import merge, shards_of
from chainforge.rewards.reward import RewardArgs, load_rewards


def examples(count=6):
    turns = [[{"role": "user", "content": f"{n} + 1 ="}] for n in range(count)]
    return [
        example(turn, str(n + 1), task="sums", verifier="exact") for n, turn in enumerate(turns)
    ]


def key(row):
    return row["id"], row["sample"]


@pytest.fixture(scope="module")
def model(tiny_model):
    return open_policy(tiny_model)


def run(model, tokenizer, path, settings=None, **changes):
    sampling = SamplingArgs(
        **{"num_samples": 3, "max_new_tokens": 6, "generation_batch_size": 4} | (settings or {})
    )
    rows = examples()
    rewards = load_rewards(RewardArgs(), set(rows[0]))
    return roll_out(
        lambda: LocalEngine(model, tokenizer, sampling),
        rows,
        sampling,
        path=path,
        seed=1,
        provenance={"model": "policy", "stage": "s"},
        score=lambda rows: score_samples(rows, "r1-cold-start", rewards, tokenizer),
        **changes,
    )


def test_every_sample_is_judged_on_disk_and_has_its_seed(model, tokenizer, tmp_path):
    path, told = tmp_path / "s.jsonl", []
    samples = run(model, tokenizer, path, progress=lambda *word: told.append(word)).samples
    assert list(map(key, samples)) == [
        (row["id"], index) for row in examples() for index in range(3)
    ]
    assert {row["source"] for row in samples} == {"policy"}
    assert all(set(row["rewards"]) == {"accuracy_reward", "format_reward"} for row in samples)
    assert all(row["sampling"]["temperature"] == 1.0 and row["tokens"] <= 6 for row in samples)
    seeds = [row["sampling"]["seed"] for row in samples]
    assert seeds == [seed_of(1, row["id"], row["sample"]) for row in samples]
    assert len(set(seeds)) == 18
    assert sorted(read_rows(path), key=key) == sorted(samples, key=key)
    assert told[-1][:3] == (18, 18, "samples")
    # A second run opens no policy for nothing.
    again = roll_out(None, examples(), SamplingArgs(num_samples=3, max_new_tokens=6), path=path,
                     seed=1, provenance={"model": "policy", "stage": "s"})  # fmt: skip
    assert again.samples == samples


@pytest.mark.parametrize("kept", [0, 5, 18])
def test_a_cut_run_samples_nothing_twice_and_ends_the_same(model, tokenizer, tmp_path, kept):
    whole = run(model, tokenizer, tmp_path / "whole.jsonl").samples
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:kept]) + b'{"torn')
    assert run(model, tokenizer, tmp_path / "cut.jsonl").samples == whole
    again = read_rows(tmp_path / "cut.jsonl")
    assert len(again) == len(set(map(key, again))) == 18


def as_rank(monkeypatch, rank, world):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, str(value))


def test_processes_share_the_prompts_also_after_a_kill(model, tokenizer, tmp_path, monkeypatch):
    alone = run(model, tokenizer, tmp_path / "alone.jsonl").samples
    path = tmp_path / "shared.jsonl"
    for rank in (2, 1):
        as_rank(monkeypatch, rank, 3)
        assert run(model, tokenizer, path).samples == []
    as_rank(monkeypatch, 0, 3)
    assert run(model, tokenizer, path).samples == alone
    assert not path.exists()
    shards = shards_of(path)
    assert [len(read_rows(shard)) for shard in shards] == [6, 6, 6]
    # Killed, and continued by one process.
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-20])
    as_rank(monkeypatch, 0, 1)
    assert run(model, tokenizer, path).samples == alone
    there = [row for file in (*shards[1:], path) for row in read_rows(file, torn_tail=True)]
    assert sorted(map(key, there)) == sorted(map(key, alone))
    merge(path, alone)
    assert shards_of(path) == []


def adaptive(model, tokenizer, path, **settings):
    """Half of all completions are accepted, by their seed."""
    settings = {"max_samples": 8, "round_size": 2} | settings
    accept = lambda row: row["sampling"]["seed"] % 2 == 0  # noqa: E731
    return run(model, tokenizer, path, settings, accept=accept, keep=2)


def test_a_prompt_is_sampled_until_it_has_enough(model, tokenizer, tmp_path):
    rolled = adaptive(model, tokenizer, tmp_path / "s.jsonl")
    counts = Counter(row["id"] for row in rolled.samples)
    for row in examples():
        good = [seed_of(1, row["id"], n) % 2 == 0 for n in range(8)]
        ends = [end for end in (2, 4, 6, 8) if sum(good[:end]) >= 2 or end == 8]
        assert counts[row["id"]] == ends[0]
    assert {row["round"] for row in rolled.samples} == {0, 1, 2, 3} - set(
        range(max(counts.values()) // 2, 4)
    )
    report = rolled.report
    assert report["prompts"] == 6 == report["enough"] + report["exhausted"]
    assert report["samples"] + report["samples_saved"] == 48
    whole = rolled.samples
    for kept in (0, 3, 9):
        lines = (tmp_path / "s.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:kept]))
        assert adaptive(model, tokenizer, tmp_path / "cut.jsonl").samples == whole


def answer(row, number, correct, size=4, text=None):
    return sample(row, text or f"{number}", number, source="policy", correct=correct,
                  round=number // size)  # fmt: skip


def simulate(rates, rng):
    """Sample prompts of known pass rates in rounds until one sample of each is right."""
    rows = examples(len(rates))
    rounds = Rounds(rows, SamplingArgs(max_samples=16, round_size=4), keep=1)
    chance = {row["id"]: rate for row, rate in zip(rows, rates, strict=True)}
    while draws := rounds.draws(rows, seed=0):
        rounds.note(
            [answer(one.row, one.sample, rng.random() < chance[one.row["id"]]) for one in draws]
        )
    return rounds


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_the_pass_rate_is_unbiased_though_rounds_stop_early(rate):
    rounds = simulate([rate] * 4000, random.Random(1))
    assert sum(pass_rates(rounds.samples()).values()) / 4000 == pytest.approx(rate, abs=0.015)
    naive = pass_rates([row | {"round": 0} for row in rounds.samples()]).values()
    assert rate > 0.4 or sum(naive) / 4000 > rate + 0.03  # what it would be otherwise
    assert rounds.report()["samples_saved"] > 0


def test_equal_completions_count_once():
    (row,) = examples(1)
    rounds = Rounds([row], SamplingArgs(max_samples=8, round_size=2), keep=2)
    rounds.note([answer(row, n, True, 2, text="the same") for n in range(2)])
    assert rounds.missing(row["id"]) == [2, 3]
    rounds.note([answer(row, n, True, 2, text=f"other {n}") for n in range(2, 4)])
    assert rounds.missing(row["id"]) == []


def test_accepted_is_what_no_filter_of_the_row_drops():
    (row,) = examples(1)
    good = answer(row, 0, True) | {"formatted": True, "finish_reason": "stop", "reward": 1.0}
    accept = accepted_by(SelectionArgs(near_duplicates=0.8))
    assert accept(good)
    for bad in ({"finish_reason": "length"}, {"correct": False}, {"formatted": False}):
        assert not accept(good | bad)


TAKEN = ("max_tokens", "max_completion_tokens", "n", "model", "seed", "messages")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 4, "temperature": 0.0}, "same completion 4 times"),
        ({"max_samples": 4, "temperature": 0.0}, "set `max_samples: 1`"),
        ({"engine": "api"}, "needs one"),
        ({"base_url": "http://x/v1"}, "goes with `engine: api`"),
        *(({"extra_body": {name: 1}}, f"extra_body: '{name}' changes") for name in TAKEN),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        SamplingArgs(**settings).check()


@pytest.mark.parametrize(
    "words", ["num_samples 0", "temperature -1", "top_p 1.5", "top_k -1", "round_size 0"]
)
def test_values_out_of_bounds(words):
    name, value = words.split()
    with pytest.raises(InputError, match=f"{name}: expected a finite number"):
        parse(SamplingArgs, argv=[f"--{name}", value])
