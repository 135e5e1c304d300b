import json

import pytest

from chainforge.core.errors import InputError
from chainforge.core.records import example, read_rows
from chainforge.data.rollouts import judge, open_policy, roll_out
from chainforge.data.sampling import SamplingArgs
from chainforge.rewards.scoring import RewardArgs, load_rewards

FORM = "<reasoning_process>{}</reasoning_process>\n<summary>{}</summary>"


def examples(count=6):
    return [
        example(
            [{"role": "user", "content": f"{n} + 1 ="}], str(n + 1), task="sums", verifier="exact"
        )
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def model(tiny_model):
    return open_policy(tiny_model)


def run(model, tokenizer, path, rows=None, name="policy", **changes):
    sampling = SamplingArgs(num_samples=3, max_new_tokens=6, generation_batch_size=4)
    rows = rows or examples()
    rewards = load_rewards(RewardArgs(), set(rows[0]))
    options = {
        "transcript": "r1-cold-start",
        "seed": 1,
        "provenance": {"model": name, "stage": "s"},
    }
    options |= {"rewards": rewards, "path": path} | changes
    return roll_out(model, tokenizer, rows, sampling, **options)


def test_every_sample_is_judged_and_on_disk(model, tokenizer, tmp_path):
    told = []
    samples = run(model, tokenizer, tmp_path / "s.jsonl", progress=lambda *word: told.append(word))
    assert [(row["id"], row["sample"]) for row in samples] == [
        (row["id"], index) for row in examples() for index in range(3)
    ]
    assert {row["source"] for row in samples} == {"policy"}
    assert all(set(row["rewards"]) == {"accuracy_reward", "format_reward"} for row in samples)
    assert all(row["sampling"]["temperature"] == 1.0 and row["tokens"] <= 6 for row in samples)
    key = lambda row: (row["id"], row["sample"])  # noqa: E731
    assert sorted(read_rows(tmp_path / "s.jsonl"), key=key) == sorted(samples, key=key)
    assert told[-1][:3] == (18, 18, "samples")


@pytest.mark.parametrize("kept", [0, 5, 11, 18])
def test_a_cut_run_samples_nothing_twice_and_ends_the_same(model, tokenizer, tmp_path, kept):
    whole = run(model, tokenizer, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:kept]) + b'{"torn')
    assert run(model, tokenizer, tmp_path / "cut.jsonl") == whole
    again = read_rows(tmp_path / "cut.jsonl")
    assert len(again) == 18
    assert len({(row["id"], row["sample"]) for row in again}) == 18


def test_two_models_share_a_file(model, tokenizer, tmp_path):
    one = run(model, tokenizer, tmp_path / "s.jsonl", name="one")
    two = run(model, tokenizer, tmp_path / "s.jsonl", name="two")
    assert [row["completion"] for row in one] == [row["completion"] for row in two]
    assert len(read_rows(tmp_path / "s.jsonl")) == 36


def judged(completion, **changes):
    row = examples(4)[3] | {"completion": completion} | changes
    rewards = load_rewards(RewardArgs(), set(row))
    return judge([row], "r1-cold-start", rewards)[0]


def test_verdicts_strict_and_lenient():
    right = judged(FORM.format("3 + 1 = 4", "4"))
    assert (right["correct"], right["lenient_correct"], right["formatted"]) == (True, True, True)
    assert right["reward"] == pytest.approx(1.2)
    bare = judged("3 + 1 = 4, so the answer is 4")
    assert (bare["correct"], bare["lenient_correct"], bare["formatted"]) == (False, True, False)
    assert (bare["reward"], bare["extracted"]) == (0.0, "4")
    wrong = judged(FORM.format("3 + 1 = 4", "5"))
    assert (wrong["correct"], wrong["lenient_correct"], wrong["reward"]) == (False, False, 0.2)


def test_rows_stay_json(model, tokenizer, tmp_path):
    rows = [row | {"entry": None, "level": 2} for row in examples(2)]
    assert json.dumps(run(model, tokenizer, tmp_path / "s.jsonl", rows))


def test_what_is_no_model_is_said(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no model could be loaded"):
        open_policy(str(tmp_path))
