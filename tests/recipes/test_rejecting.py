"""Rejection sampling that is killed or has no answers, and RL on prompts that it measured."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from small import GRPO, TASK, by_length

from chainforge.core.artifacts import read_manifest
from chainforge.core.jsonl import read_rows, write_rows
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate.sampling import sample

ROOT = Path(__file__).parents[2]
FORTY = TASK | {"size": 40}
LOOSE = {"require_correct": False, "require_format": False}


def texts(path):
    rows = read_rows(path, torn_tail=True)
    found = {(row["id"], row["sample"]): row["completion"] for row in rows}
    assert len(found) == len(rows)
    return found


def test_killed_three_times_it_is_complete_and_samples_nothing_again(tmp_path, tiny_model, stage):
    settings = LOOSE | {"tasks": [FORTY], "num_samples": 4, "max_new_tokens": 40}
    settings |= {"generation_batch_size": 8, "model_name_or_path": tiny_model}
    assert stage("reject", "whole", settings)[0] == 0
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(settings))
    given = ["--config", tmp_path / "cut.yaml", "--output_dir", tmp_path / "cut"]
    path = tmp_path / "cut/samples.jsonl"
    written = {}
    for _ in range(3):
        before = len(written)
        command = [sys.executable, ROOT / "recipes/reject.py", *given]
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
    code, error = stage("reject", "cut", settings)
    assert code == 0, error
    assert len(texts(path)) == 160
    assert texts(path) == texts(tmp_path / "whole/samples.jsonl")
    funnel = json.loads((tmp_path / "cut/funnel.json").read_text())
    assert funnel["in"] == 160 == funnel["kept"] + sum(funnel["dropped"].values())


def test_a_gate_drops_prompts_and_counts_them_in_the_manifest(tmp_path, tiny_model, stage):
    examples = load_examples(TaskArgs(tasks=[FORTY]), seed=42)
    rows = [
        sample(row, str(n), n, source="policy", correct=n < place % 5)
        for place, row in enumerate(examples)
        for n in range(4)
    ]
    (tmp_path / "pool").mkdir()
    write_rows(tmp_path / "pool/samples.jsonl", rows)
    settings = GRPO | {"tasks": [FORTY], "rewards": by_length(tmp_path)}
    flags = ["--model_name_or_path", tiny_model, "--gate_pool", tmp_path / "pool"]
    flags += ["--min_pass_rate", "0.2"]
    code, error = stage("grpo", "gated", settings, *flags)
    assert code == 0, error
    counts = {"in": 40, "kept": 24, "too_hard": 8, "too_easy": 8, "unmeasured": 0}
    assert read_manifest(tmp_path / "gated").metrics["gate"] == counts
    rates = {row["pass_rate"] for row in read_rows(tmp_path / "gated/rollouts.jsonl")}
    assert rates <= {0.25, 0.5, 0.75}
    write_rows(tmp_path / "pool/samples.jsonl", rows[:-1])
    code, error = stage("grpo", "gated", settings, *flags)
    assert (code, "data.0: the input changed" in error) == (2, True)


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
