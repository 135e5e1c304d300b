"""Rejection sampling that is killed, shared among processes, and fed with rollouts of RL."""

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
from small import GRPO, TASK, by_length

from chainforge.core.artifacts import read_manifest
from chainforge.core.jsonl import read_rows, sample, write_rows
from chainforge.data.tasks import TaskArgs, load_examples

ROOT = Path(__file__).parents[2]
FORTY = TASK | {"size": 40}


@pytest.fixture
def picks(tmp_path, tiny_model):
    """Return the words of a reject command for a directory."""
    settings = {"tasks": [FORTY], "num_samples": 4, "max_new_tokens": 40, "require_correct": False,
                "generation_batch_size": 8, "require_format": False}  # fmt: skip
    (tmp_path / "picks.yaml").write_text(yaml.safe_dump(settings))
    given = ["--config", f"{tmp_path}/picks.yaml", "--model_name_or_path", tiny_model]
    return lambda name: [*given, "--output_dir", f"{tmp_path}/{name}"]


def texts(path):
    rows = read_rows(path, torn_tail=True)
    found = {(row["id"], row["sample"]): row["completion"] for row in rows}
    assert len(found) == len(rows)
    return found


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
        now = texts(path)
        assert before < len(now) < 160
        assert written.items() <= now.items()
        written = now
    assert recipe("reject", *picks("cut"))[0] == 0
    assert len(texts(path)) == 160
    assert texts(path) == texts(tmp_path / "whole/samples.jsonl")
    funnel = json.loads((tmp_path / "cut/funnel.json").read_text())
    assert funnel["in"] == 160 == funnel["kept"] + sum(funnel["dropped"].values())


def test_two_processes_make_the_rows_of_one(tmp_path, picks, recipe):
    assert recipe("reject", *picks("one"))[0] == 0
    # Begun by one process, killed, and resumed by two.
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one/stage.json", tmp_path / "two")
    write_rows(tmp_path / "two/samples.jsonl", read_rows(tmp_path / "one/samples.jsonl")[:30])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    done = subprocess.run(
        [*launch, "accelerate_configs/cpu_ddp.yaml", "recipes/reject.py", *picks("two")],
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


def by_step(folder):
    rows = read_rows(folder / "rollouts.jsonl")
    return sorted((row["step"], row["id"], row["sample"], row["completion"]) for row in rows)


def test_rollouts_are_complete_across_a_kill_and_make_a_pool(
    tmp_path, tiny_model, tokenizer, recipe, stage
):
    settings = GRPO | {"tasks": [FORTY], "rewards": by_length(tmp_path), "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    nul = tokenizer("\0")["input_ids"]  # which a random model may write, and makes a row malformed
    settings["generation_kwargs"] = {"suppress_tokens": nul}
    flags = ["--model_name_or_path", tiny_model]
    code, error = stage("grpo", "reason", settings, *flags)
    assert code == 0, error
    folder = tmp_path / "reason"
    rows = read_rows(folder / "rollouts.jsonl")
    assert [row["step"] for row in rows] == [step for step in (1, 2, 3, 4) for _ in range(8)]
    for log in (row for row in read_rows(folder / "metrics.jsonl") if "reward" in row):
        rewards = [row["reward"] for row in rows if row["step"] == log["step"]]
        assert sum(rewards) / 8 == pytest.approx(log["reward"], abs=1e-5)
    assert read_manifest(folder).metrics["rollouts"] == 32
    before = by_step(folder)
    # As a kill after step 4, before its checkpoint was whole, leaves it.
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "checkpoints/checkpoint-4")
    assert stage("grpo", "reason", settings, *flags)[0] == 0
    assert by_step(folder) == before

    loose = ["--require_correct", "false", "--require_format", "false", "--select", "all"]
    pool = ["--pool", folder, "--output_dir", tmp_path / "picks"]
    code, error = recipe("reject", *pool, *loose)
    if code == 2:  # every rollout of a random model is cut off, so none may be kept
        assert "no row was kept" in error
    funnel = json.loads((tmp_path / "picks/funnel.json").read_text())
    assert funnel["in"] == 32
    assert funnel["sampling"]["pool"] == {"reason": 32}
    there = read_rows(tmp_path / "picks/samples.jsonl")
    assert {row["policy"] for row in there} == {f"reason@{step}" for step in range(4)}
    code, error = recipe("reject", *pool, "--model_name_or_path", tiny_model)
    assert (code, "leave model_name_or_path out" in error) == (2, True)


def test_a_gate_drops_prompts_and_counts_them_in_the_manifest(tmp_path, tiny_model, stage):
    examples = load_examples(TaskArgs(tasks=[FORTY]), seed=42)
    rows = [sample(row, str(n), n, source="policy", correct=n < place % 5)
            for place, row in enumerate(examples) for n in range(4)]  # fmt: skip
    (tmp_path / "pool").mkdir()
    write_rows(tmp_path / "pool/samples.jsonl", rows)
    settings = GRPO | {"tasks": [FORTY], "rewards": by_length(tmp_path)}
    flags = ["--model_name_or_path", tiny_model]
    flags += ["--gate_pool", tmp_path / "pool", "--min_pass_rate", "0.2"]
    code, error = stage("grpo", "gated", settings, *flags)
    assert code == 0, error
    manifest = read_manifest(tmp_path / "gated")
    assert manifest.metrics["gate"] == {
        "in": 40, "kept": 24, "too_hard": 8, "too_easy": 8, "unmeasured": 0
    }  # fmt: skip
    assert "data.0" in manifest.inputs
    rates = {row["pass_rate"] for row in read_rows(tmp_path / "gated/rollouts.jsonl")}
    assert rates <= {0.25, 0.5, 0.75}
    write_rows(tmp_path / "pool/samples.jsonl", rows[:-1])
    code, error = stage("grpo", "gated", settings, *flags)
    assert (code, "the input data.0 changed" in error) == (2, True)


def test_prompts_without_answers_are_sampled_and_kept(tmp_path, tiny_model, stage):
    write_rows(tmp_path / "prompts.jsonl", [{"question": f"Say {word}."} for word in "abcd"])
    task = {"fn": "jsonl", "params": {"path": str(tmp_path / "prompts.jsonl")}, "split": "all"}
    settings = {"tasks": [task], "num_samples": 2, "max_new_tokens": 10, "require_format": False}
    code, error = stage("reject", "open", settings, "--model_name_or_path", tiny_model)
    assert code in (0, 2), error  # a tiny model may never end: then no row was kept
    rows = read_rows(tmp_path / "open/samples.jsonl")
    assert len(rows) == 8
    assert {row["correct"] for row in rows} == {None}
    assert {row["rewards"]["accuracy_reward"] for row in rows} == {None}
    assert "wrong" not in {row["drop"] for row in rows}
