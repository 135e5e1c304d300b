"""Rejection sampling cut short, shared among processes, and fed with what RL has written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from chainforge.core.artifacts import read_manifest
from chainforge.core.jsonl import read_rows, sample, write_rows
from chainforge.data.tasks import TaskArgs, load_examples

ROOT = Path(__file__).parents[2]
SUMS = {"dataset": "chain_sum", "min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
TASK = {"fn": "reasoning_gym", "params": SUMS, "size": 40, "split": "train"}
TWO = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "use_cpu": True,
    "num_machines": 1,
    "num_processes": 2,
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "no",
    "rdzv_backend": "static",
    "same_network": True,
}


def write(path, **values):
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def picks(tmp_path, tiny_model, recipe):
    """The words of a reject command, for a directory; and the stage that one process makes."""
    config = write(
        tmp_path / "picks.yaml",
        tasks=[TASK],
        num_samples=4,
        max_new_tokens=40,
        generation_batch_size=8,
        require_correct=False,
        require_format=False,
    )

    def words(name, *more):
        given = ["--config", config, "--model_name_or_path", tiny_model]
        return [*map(str, [*given, "--output_dir", tmp_path / name, *more])]

    return words


def keys(path):
    return [(row["id"], row["sample"]) for row in read_rows(path, torn_tail=True)]


def texts(path):
    return {(row["id"], row["sample"]): row["completion"] for row in read_rows(path)}


def test_killed_three_times_it_is_complete_and_samples_nothing_again(tmp_path, picks, recipe):
    assert recipe("reject", *picks("whole"))[0] == 0
    path = tmp_path / "cut/samples.jsonl"
    written = {}
    for _ in range(3):
        before = len(written)
        command = [sys.executable, str(ROOT / "recipes/reject.py"), *picks("cut")]
        run = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline and run.poll() is None:
            if path.exists() and path.read_bytes().count(b"\n") >= before + 10:
                break
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        run.wait()
        there = read_rows(path, torn_tail=True)
        assert before < len(there) < 160
        now = {(row["id"], row["sample"]): row["completion"] for row in there}
        assert len(now) == len(there)
        assert written.items() <= now.items()
        written = now
    assert recipe("reject", *picks("cut"))[0] == 0
    assert len(keys(path)) == 160
    assert texts(path) == texts(tmp_path / "whole/samples.jsonl")
    assert written.items() <= texts(path).items()
    funnel = json.loads((tmp_path / "cut/funnel.json").read_text())
    assert funnel["in"] == 160 == funnel["kept"] + sum(funnel["dropped"].values())


def test_two_processes_make_the_rows_of_one(tmp_path, picks, recipe):
    assert recipe("reject", *picks("one"))[0] == 0
    launch = write(tmp_path / "two.yaml", **TWO)
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch)]
    # Begun by one process, cut, and gone on with by two.
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one/stage.json", tmp_path / "two")
    begun = read_rows(tmp_path / "one/samples.jsonl")[:30]
    write_rows(tmp_path / "two/samples.jsonl", begun)
    done = subprocess.run(
        [*accelerate, str(ROOT / "recipes/reject.py"), *picks("two")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path / "two/samples.jsonl") == texts(tmp_path / "one/samples.jsonl")
    assert not list((tmp_path / "two").glob("*rank*"))
    one, two = (read_manifest(tmp_path / name) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    assert one.metrics["kept"] == two.metrics["kept"]


def grpo(tmp_path, tiny_model, recipe, name, *flags, steps=4):
    (tmp_path / "reward.py").write_text(
        "def short(completion):\n    return -len(completion) / 20\n"
    )
    config = write(
        tmp_path / "reason.yaml",
        tasks=[TASK],
        rewards=[{"fn": "accuracy_reward"}, {"fn": f"{tmp_path}/reward.py:short", "weight": 0.1}],
        use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
        max_steps=steps, save_steps=2, logging_steps=1, learning_rate=0.01,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=8,
    )  # fmt: skip
    return recipe("grpo", "--config", config, "--model_name_or_path", tiny_model,
                  "--output_dir", tmp_path / name, *flags)  # fmt: skip


def test_rollouts_are_harvested_across_a_cut_and_make_a_pool(tmp_path, tiny_model, recipe):
    code, error = grpo(tmp_path, tiny_model, recipe, "reason")
    assert code == 0, error
    stage = tmp_path / "reason"
    rows = read_rows(stage / "rollouts.jsonl")
    assert [row["step"] for row in rows] == [step for step in (1, 2, 3, 4) for _ in range(8)]
    logs = [row for row in read_rows(stage / "metrics.jsonl") if "reward" in row]
    for log in logs:
        rewards = [row["reward"] for row in rows if row["step"] == log["step"]]
        assert sum(rewards) / 8 == pytest.approx(log["reward"], abs=1e-5)
    assert read_manifest(stage).metrics["rollouts"] == 32
    before = texts_by_step(rows)
    # As a kill after step 4, before its checkpoint was whole, leaves it.
    (stage / "manifest.json").unlink()
    shutil.rmtree(stage / "checkpoints/checkpoint-4")
    assert grpo(tmp_path, tiny_model, recipe, "reason")[0] == 0
    assert texts_by_step(read_rows(stage / "rollouts.jsonl")) == before

    code, error = recipe("reject", "--pool", stage, "--output_dir", tmp_path / "picks",
                         "--require_correct", "false", "--require_format", "false",
                         "--select", "all")  # fmt: skip
    if code == 2:  # every rollout of a random model is cut off, so none may be kept
        assert "no row was kept" in error
    funnel = json.loads((tmp_path / "picks/funnel.json").read_text())
    assert funnel["in"] == 32
    assert funnel["sampling"]["pool"] == {"reason": 32}
    there = read_rows(tmp_path / "picks/samples.jsonl")
    assert {row["policy"] for row in there} == {f"reason@{step}" for step in range(4)}


def texts_by_step(rows):
    return sorted((row["step"], row["id"], row["sample"], row["completion"]) for row in rows)


def test_harvesting_can_be_turned_off(tmp_path, tiny_model, recipe):
    code, error = grpo(tmp_path, tiny_model, recipe, "reason", "--log_rollouts", "false", steps=2)
    assert code == 0, error
    assert not (tmp_path / "reason/rollouts.jsonl").exists()


def test_a_gate_leaves_prompts_out_and_the_manifest_says_how_many(tmp_path, tiny_model, recipe):
    examples = load_examples(TaskArgs(tasks=[TASK]), seed=42)
    rows = [sample(row, str(n), n, source="policy", correct=n < place % 5)
            for place, row in enumerate(examples) for n in range(4)]  # fmt: skip
    (tmp_path / "pool").mkdir()
    write_rows(tmp_path / "pool/samples.jsonl", rows)
    gated = ["--gate_pool", tmp_path / "pool", "--min_pass_rate", "0.2"]
    code, error = grpo(tmp_path, tiny_model, recipe, "gated", *gated, steps=2)
    assert code == 0, error
    manifest = read_manifest(tmp_path / "gated")
    assert manifest.metrics["gate"] == {
        "in": 40, "kept": 24, "too_hard": 8, "too_easy": 8, "unmeasured": 0
    }  # fmt: skip
    assert "data.0" in manifest.inputs
    rates = {row["pass_rate"] for row in read_rows(tmp_path / "gated/rollouts.jsonl")}
    assert rates <= {0.25, 0.5, 0.75}
    write_rows(tmp_path / "pool/samples.jsonl", rows[:-1])
    code, error = grpo(tmp_path, tiny_model, recipe, "gated", *gated, steps=2)
    assert code == 2
    assert "the input data.0 changed" in error


def test_a_pool_and_a_policy_are_one_too_many(tmp_path, picks, recipe):
    code, error = recipe("reject", *picks("both", "--pool", tmp_path))
    assert code == 2
    assert "leave model_name_or_path out" in error


def test_prompts_without_answers_are_sampled_and_kept(tmp_path, tiny_model, recipe):
    write_rows(tmp_path / "prompts.jsonl", [{"question": f"Say {word}."} for word in "abcd"])
    config = write(
        tmp_path / "open.yaml",
        tasks=[
            {"fn": "jsonl", "params": {"path": str(tmp_path / "prompts.jsonl")}, "split": "all"}
        ],
        num_samples=2,
        max_new_tokens=10,
        require_format=False,
    )
    code, error = recipe("reject", "--config", str(config), "--model_name_or_path",
                         str(tiny_model), "--output_dir", str(tmp_path / "open"))  # fmt: skip
    assert code in (0, 2), error  # a tiny model may never end: then nothing is kept, and it says so
    rows = read_rows(tmp_path / "open/samples.jsonl")
    assert len(rows) == 8
    assert {row["correct"] for row in rows} == {None}
    assert {row["rewards"]["accuracy_reward"] for row in rows} == {None}
    assert {row["drop"] for row in rows} <= {None, "truncated", "empty", "duplicate", "not_selected",
                                             "repetition", "language"}  # fmt: skip
