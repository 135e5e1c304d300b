"""Stages that learn nothing fail with the reason; those with nothing left to learn are done."""

import logging
import math
import shutil

import pytest
from small import CPU, GRPO

from chainforge.core.artifacts import read_manifest
from chainforge.core.jsonl import read_rows, write_rows
from chainforge.core.transcript import write as transcript

REWARDS = """
def same(completion):
    return 1.2

def short(completion):
    return -len(completion)

def later(completions, trainer_state, level, **more):
    if trainer_state.global_step < 2:
        return [-len(turns[0]["content"]) for turns in completions]
    return [level] * len(completions)

def one_is_inf(completions, trainer_state, **more):
    rewards = [-len(turns[0]["content"]) for turns in completions]
    if trainer_state.global_step == 2:
        rewards[5] = float("inf")
    return rewards
"""
SIX = {"max_steps": 6, "save_steps": 1, "save_strategy": "steps"}


@pytest.fixture
def grpo(tmp_path, tiny_model, tokenizer, stage, caplog):
    """Run GRPO with one reward; return the exit code, stderr, and what was logged."""
    caplog.set_level(logging.INFO, logger="chainforge")
    (tmp_path / "rewards.py").write_text(REWARDS)
    # A random model seldom ends its turn.
    settings = GRPO | {"generation_kwargs": {"forced_eos_token_id": tokenizer.eos_token_id}}

    def run(reward, *flags, model=tiny_model, **params):
        rewards = [{"fn": f"{tmp_path}/rewards.py:{reward}", "params": params}]
        values = settings | SIX | {"max_zero_advantage_steps": 2, "rewards": rewards}
        caplog.clear()
        code, error = stage("grpo", "out", values, "--model_name_or_path", model, *flags)
        return code, error, caplog.text

    return run


def steps(folder):
    return [row["step"] for row in read_rows(folder / "out/metrics.jsonl")]


def test_rewards_that_never_differ_end_the_run_early(tmp_path, grpo):
    code, error, _ = grpo("same")
    assert code == 1
    words = (
        "failed: in 2 steps the completions of every group had the same reward (1.200 on average)"
    )
    assert words in error
    assert "Traceback" not in error
    assert steps(tmp_path) == [1, 2]
    assert read_manifest(tmp_path / "out") is None
    assert not (tmp_path / "out/model").exists()


def test_a_stage_that_has_learnt_all_is_done(tmp_path, grpo):
    code, error, log = grpo("later", level=0.0)
    assert code == 0, error
    assert "stopped early, after step 4 of 6" in log
    manifest = read_manifest(tmp_path / "out")
    assert "nothing is left to learn" in manifest.notes["stopped_early"]
    assert manifest.metrics["steps"] == 4
    # Killed before its policy was saved, it knows from its checkpoint that it has ended.
    before = (tmp_path / "out/model/model.safetensors").read_bytes()
    (tmp_path / "out/manifest.json").unlink()
    shutil.rmtree(tmp_path / "out/model")
    code, error, log = grpo("later", level=0.0)
    assert code == 0, error
    assert "is the end of the run: nothing is left to train" in log
    assert (tmp_path / "out/model/model.safetensors").read_bytes() == before


def test_a_collapsed_policy_is_an_error_and_a_larger_limit_resumes(tmp_path, grpo):
    code, error, _ = grpo("later", level=-1000.0)
    assert (code, "the policy has collapsed" in error) == (1, True), error
    assert steps(tmp_path) == [1, 2, 3, 4]
    more = ["--max_zero_advantage_steps", "0", "--health", "off"]  # not of the fingerprint
    code, error, log = grpo("later", *more, level=-1000.0)
    assert code == 0, error
    assert f"resuming from {tmp_path}/out/checkpoints/checkpoint-3" in log
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_reward_that_is_no_number_is_named(tmp_path, grpo):
    code, error, _ = grpo("one_is_inf")
    row = read_rows(tmp_path / "out/rollouts.jsonl")[16 + 5]
    assert (code, row["rewards"]["one_is_inf"]) == (1, None)
    words = f"reward one_is_inf returned inf for a completion of row {row['id']}, at step 3"
    assert words in error
    assert "let it return None where it does not apply" in error


def test_weights_that_are_no_numbers_stop_sampling_and_saving(tmp_path, tiny_model, grpo, stage):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    code, error, _ = grpo("short", model=broken)
    assert code == 1
    assert "failed: the policy's probabilities are not finite after step 0" in error
    row = {"prompt": [{"role": "user", "content": "1 + 1 ="}]}
    row |= {"completion": transcript("1 + 1 = 2", "2")}
    write_rows(tmp_path / "traces.jsonl", [row] * 16)
    flags = ["--model_name_or_path", broken, "--data", tmp_path / "traces.jsonl"]
    code, error = stage("sft", "sft", CPU | SIX | {"logging_steps": 100}, *flags)
    assert code == 1
    assert "failed: loss is nan at step 1. Training has diverged: lower learning_rate" in error
    assert not list(tmp_path.glob("sft/checkpoints/checkpoint-*"))
