"""Stages that learn nothing fail with the reason; those with nothing left to learn are done."""

import json
import logging
import math
import shutil

import pytest
import yaml

from chainforge.core.artifacts import read_manifest
from chainforge.core.jsonl import read_rows
from chainforge.core.transcript import write as transcript

REWARDS = """
from chainforge.core.transcript import read

def same(completion):
    return 1.2

def short(completion):
    return -len(completion)

def later(completions, trainer_state, level, **more):
    if trainer_state.global_step < 2:
        return [-len(turns[0]["content"]) for turns in completions]
    return [level] * len(completions)

def one_is_inf(completions, trainer_state, value, **more):
    rewards = [-len(turns[0]["content"]) for turns in completions]
    if trainer_state.global_step == 2:
        rewards[5] = float(value)
    return rewards
"""
CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
CPU |= {"max_steps": 6, "save_steps": 1, "logging_steps": 1, "learning_rate": 0.01}


@pytest.fixture
def grpo(tmp_path, tiny_model, tokenizer, recipe):
    questions = [{"question": f"{n} + {n + 1} =", "answer": str(2 * n + 1)} for n in range(20)]
    text = "".join(json.dumps(row) + "\n" for row in questions)
    (tmp_path / "questions.jsonl").write_text(text)
    (tmp_path / "rewards.py").write_text(REWARDS)

    def run(reward, *flags, model=tiny_model, **params):
        task = {"fn": "jsonl", "params": {"path": str(tmp_path / "questions.jsonl")}}
        values = CPU | {"tasks": [task], "num_generations": 4, "max_completion_length": 8}
        values |= {"rewards": [{"fn": f"{tmp_path}/rewards.py:{reward}", "params": params}]}
        values |= {"per_device_train_batch_size": 8, "max_zero_advantage_steps": 2}
        # A random model seldom ends its turn.
        values["generation_kwargs"] = {"forced_eos_token_id": tokenizer.eos_token_id}
        (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(values))
        return recipe("grpo", "--config", tmp_path / "grpo.yaml", "--model_name_or_path", model,
                      "--output_dir", tmp_path / "out", *flags)  # fmt: skip

    return run


@pytest.fixture
def told(caplog):
    """Return what the run said of itself on the way."""
    caplog.set_level(logging.INFO, logger="chainforge")

    def words():
        text = caplog.text
        caplog.clear()
        return text

    return words


def steps(folder):
    return [row["step"] for row in read_rows(folder / "out/metrics.jsonl")]


def test_rewards_that_never_differ_end_the_run_early(tmp_path, grpo):
    code, error = grpo("same")
    assert code == 1
    assert "failed: in 2 steps the completions of every group had the same reward" in error
    assert "(1.200 on average)" in error
    assert "Traceback" not in error
    assert steps(tmp_path) == [1, 2]
    assert not (tmp_path / "out/model").exists()


def test_a_stage_that_has_learnt_all_is_done(tmp_path, grpo, told):
    code, error = grpo("later", "--log_rollouts", "false", level=0.0)
    assert code == 0, error
    assert "stopped early, after step 4 of 6" in told()
    manifest = read_manifest(tmp_path / "out")
    assert "nothing is left to learn" in manifest.notes["stopped_early"]
    assert manifest.metrics["steps"] == 4
    assert not (tmp_path / "out/rollouts.jsonl").exists()
    # Killed before its policy was saved, it knows from its checkpoint that it has ended.
    before = (tmp_path / "out/model/model.safetensors").read_bytes()
    (tmp_path / "out/manifest.json").unlink()
    shutil.rmtree(tmp_path / "out/model")
    code, error = grpo("later", "--log_rollouts", "false", level=0.0)
    assert code == 0, error
    assert "is the end of the run: nothing is left to train" in told()
    assert (tmp_path / "out/model/model.safetensors").read_bytes() == before


def test_a_policy_that_fell_is_an_error_and_a_larger_limit_goes_on(tmp_path, grpo, told):
    code, error = grpo("later", level=-1000.0)
    assert code == 1
    assert "the policy has collapsed" in error
    assert steps(tmp_path) == [1, 2, 3, 4]
    code, error = grpo("later", "--max_zero_advantage_steps", "0", level=-1000.0)
    assert code == 0, error
    assert f"resuming from {tmp_path}/out/checkpoints/checkpoint-3" in told()
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_reward_that_is_no_number_is_named(tmp_path, grpo):
    code, error = grpo("one_is_inf", value="inf")
    assert code == 1
    row = read_rows(tmp_path / "out/rollouts.jsonl")[16 + 5]
    assert row["rewards"]["one_is_inf"] is None
    words = f"reward one_is_inf returned inf for a completion of row {row['id']}, at step 3"
    assert words in error
    assert "let it return None where it does not apply" in error


@pytest.fixture
def broken(tmp_path, tiny_model):
    """Make a model with one weight that is no number."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, tmp_path / "broken")
    path = tmp_path / "broken/model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, path, metadata={"format": "pt"})
    return tmp_path / "broken"


def test_sampling_from_weights_that_are_no_numbers_is_reported(grpo, broken):
    code, error = grpo("short", model=broken)
    assert code == 1
    assert "failed: the policy's probabilities are not finite after step 0" in error


def test_a_diverged_loss_stops_before_it_is_saved(tmp_path, recipe, broken):
    prompt = [{"role": "user", "content": "1 + 1 ="}]
    row = {"prompt": prompt, "completion": transcript("1 + 1 = 2", "2")}
    (tmp_path / "traces.jsonl").write_text((json.dumps(row) + "\n") * 16)
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(CPU | {"logging_steps": 100}))
    code, error = recipe("sft", "--config", tmp_path / "sft.yaml", "--model_name_or_path", broken,
                         "--data", tmp_path / "traces.jsonl", "--output_dir", tmp_path / "out")  # fmt: skip
    assert code == 1
    assert "failed: loss is nan at step 1: training has diverged. Lower learning_rate" in error
    assert not list(tmp_path.glob("out/checkpoints/checkpoint-*"))
