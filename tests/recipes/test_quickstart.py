"""The quickstart's chain, with little data and few steps: killed, resumed, and by the README.

The tests share one folder and build on one another, as the stages of a chain do.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hubserver import HubServer
from pyarrow import parquet
from smallchain import STAGES, resized

from chainforge.core.artifacts import read_manifest
from chainforge.core.jsonl import read_rows
from chainforge.core.run_dir import holder

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CHAIN = "recipes/quickstart/chain.yaml"
ROWS = {"collect": 1600, "rl": 64, "rejection": 40, "rl_final": 64, "distill_data": 64, "eval": 24}
ROWS |= {"distill": 64}
STEPS = {"cold_start": 100, "rl": 6, "sft2": 100, "rl_final": 2, "student": 8, "dpo_train": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A clone whose quickstart is small, with this environment as its `.venv`."""
    path = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "accelerate_configs"):
        shutil.copytree(ROOT / name, path / name)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy2(ROOT / name, path)
    shrink(path / "recipes/quickstart", STEPS)
    (path / ".venv").mkdir()
    (path / ".venv/bin").symlink_to(Path(sys.prefix) / "bin")
    (path / ".venv/ready").touch()
    return path


def shrink(recipe, steps):
    """Give a recipe little data and few steps."""
    for file in recipe.glob("*.yaml"):
        settings = resized(file, ROWS)
        if file.stem in steps:
            settings |= {"max_steps": steps[file.stem], "save_steps": 2, "logging_steps": 1}
            settings |= {"save_strategy": "steps", "save_total_limit": 2}
        if "max_completion_length" in settings:
            settings |= {"per_device_train_batch_size": 32, "steps_per_generation": 1}
        file.write_text(yaml.safe_dump(settings))


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def shell(folder, hub):
    def run(command, timeout=600):
        path = f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "COLUMNS": "100"} | hub.environment(folder / "hf")
        return subprocess.run(
            ["bash", "-ec", command], cwd=folder, env=environment, capture_output=True,
            text=True, timeout=timeout,
        )  # fmt: skip

    return run


def test_a_killed_rl_stage_is_resumed(folder, shell):
    """Kill -9 during GRPO, and run again: it resumes from its last checkpoint."""
    command = ["chainforge", "run", CHAIN, "--until", "rl"]
    path = f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"
    run = subprocess.Popen(command, cwd=folder, env=os.environ | {"PATH": path})
    state = folder / "runs/quickstart/rl/checkpoints/checkpoint-4/sealed.json"
    deadline = time.monotonic() + 400
    while not state.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert run.poll() is None, "the chain ended before it could be killed"
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    reason = folder / "runs/quickstart/rl"
    assert read_manifest(reason) is None
    while holder(reason):  # it saves, and ends with its chain
        time.sleep(0.05)
    plan = shell(f"chainforge plan {CHAIN} --json")
    states = [stage["state"] for stage in json.loads(plan.stdout)["stages"]]
    assert states[:3] == ["done", "done", "resumable"]
    again = shell(f"chainforge run {CHAIN} --until rl")
    assert again.returncode == 0, again.stderr
    assert "resuming from" in (reason / "log.txt").read_text()
    steps = [row["step"] for row in read_rows(reason / "metrics.jsonl") if "reward" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_planned_line_pasted_by_hand_is_the_stage(folder, shell):
    """The planned line makes the same stage with the same fingerprint."""
    stages = json.loads(shell(f"chainforge plan {CHAIN} --json").stdout)["stages"]
    (planned,) = [stage for stage in stages if stage["name"] == "rl"]
    done = shell(planned["command"])
    assert done.returncode == 0, done.stderr
    assert "is done already" in done.stderr
    shutil.rmtree(folder / "runs/quickstart/rl")
    pasted = shell(planned["command"])
    assert pasted.returncode == 0, pasted.stderr
    manifest = read_manifest(folder / "runs/quickstart/rl")
    assert manifest.fingerprint == planned["fingerprint"]


def share(folder, other):
    """Give another run the first stages, to save the time of making the same ones again."""
    for name in ("traces", "cold_start"):
        shutil.copytree(folder / "runs/quickstart" / name, folder / other / name)


def readme_commands():
    """Return every command of the README and the docs."""
    blocks = re.findall(
        r"```bash\n(.*?)```", "\n".join(page.read_text() for page in PAGES), re.DOTALL
    )
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and line not in ("make test", "make lint")]


@pytest.mark.timeout(1500)  # the demo and the docs, on cores that others may use
def test_every_command_of_the_readme_runs(folder, shell):
    commands = readme_commands()
    assert "make demo" in commands
    assert len(commands) >= 8
    for command in commands:
        if other := re.search("--runs (.+)", command):
            share(folder, f"{other[1]}/quickstart")
        done = shell(command)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if command.startswith("chainforge new my-project"):
            shrink(folder / "my-project", {"cold_start": 20, "rl": 2})
    assert (folder / "scratch/model/model.safetensors").exists()


def test_a_project_of_ones_own_was_trained_and_measured(folder):
    """The README's second journey: own questions, own reward."""
    runs = folder / "runs/my-project"
    logs = [row for row in read_rows(runs / "rl/metrics.jsonl") if "reward" in row]
    assert all("rewards/concise/mean" in row for row in logs)
    results = json.loads((runs / "eval/results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["base", "cold_start", "rl"]
    asked = {row["prompt"][-1]["content"] for row in read_rows(runs / "eval/samples.jsonl")}
    trained = {row["prompt"][-1]["content"] for row in read_rows(runs / "rl/rollouts.jsonl")}
    traces = (folder / "my-project/traces.jsonl").read_text()
    assert asked
    assert not asked & trained
    assert not any(question in traces for question in asked)
    assert "recipes/custom" not in (folder / "my-project/rl.yaml").read_text()


def test_an_adapter_went_to_the_hub(folder, hub):
    """The README's third journey; tests/hub/test_export.py loads such an adapter."""
    config = json.loads(hub.files("me/small-adapter")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "me/small-base"
    made = folder / "runs-lora/quickstart/cold_start/adapter/adapter_model.safetensors"
    adapter = made.read_bytes()
    assert hub.files("me/small-adapter")["adapter_model.safetensors"] == adapter
    assert (folder / "my-adapter/adapter_model.safetensors").read_bytes() == adapter
    assert all(repository.private for repository in hub.repositories.values())
    assert not hub.carried(hub.secret)


def test_the_demo_leaves_what_it_says(folder, shell):
    runs = folder / "runs/quickstart"
    assert all(read_manifest(runs / name) for name in STAGES)
    results = json.loads((runs / "eval/results.json").read_text())
    assert [model["name"] for model in results["models"]] == [
        "base", "cold_start", "rl", "sft2", "rl_final", "student_base", "student"
    ]  # fmt: skip
    for name in ("traces", "rejection", "distill_data"):
        funnel = json.loads((runs / name / "funnel.json").read_text())
        assert funnel["in"] == funnel["kept"] + sum(funnel["dropped"].values())
        assert funnel["in"] == len(read_rows(runs / name / "samples.jsonl"))
    page = (runs / "report.html").read_text()
    assert page.count("<script") == page.count("script-src 'sha256-") == 1


def test_no_held_out_question_was_trained_on(folder):
    runs = folder / "runs/quickstart"
    asked = {
        name: {row["prompt"][-1]["content"] for row in read_rows(runs / name / "samples.jsonl")}
        for name in ("traces", "rejection", "distill_data", "eval")
    }
    held_out = asked.pop("eval")
    assert held_out
    assert not any(held_out & questions for questions in asked.values())


def test_a_second_run_finds_everything_done_unless_a_setting_changed(folder, shell):
    paths = [folder / f"runs/quickstart/{name}/manifest.json" for name in STAGES]
    before = [path.read_bytes() for path in paths]
    again = shell("make demo")
    assert again.returncode == 0
    assert "all 9 stages are done" in again.stdout
    assert "report: runs/quickstart/report.html" in again.stdout
    assert before == [path.read_bytes() for path in paths]
    plan = shell(f"chainforge plan {CHAIN} --set rejection.temperature=0.7 --json")
    states = {stage["name"]: stage["state"] for stage in json.loads(plan.stdout)["stages"]}
    fresh = {name for name, state in states.items() if state == "done"}
    assert fresh == {"traces", "cold_start", "rl"}


def test_a_misspelt_option_and_a_broken_reward_are_found(folder, shell):
    config = "recipes/quickstart/rl.yaml"
    done = shell(f"accelerate launch recipes/grpo.py --config {config} --learning_rat 1e-6")
    assert done.returncode != 0
    assert "unknown option --learning_rat; did you mean 'learning_rate'?" in done.stderr
    assert "config.py" not in done.stderr
    (folder / "constant.py").write_text("def constant(completion):\n    return 1.0\n")
    done = shell("chainforge check constant.py:constant --task recipes/quickstart/rl.yaml")
    assert done.returncode == 1


def test_dpo_prefers_right_answers_to_wrong_ones(folder, shell):
    runs = folder / "runs/dpo"
    checked = shell("chainforge doctor recipes/quickstart/dpo.yaml --json")
    assert json.loads(checked.stdout)["level"] == "ok", checked.stdout
    share(folder, "runs/dpo")
    done = shell("chainforge run recipes/quickstart/dpo.yaml")
    assert done.returncode == 0, done.stderr
    pairs = parquet.read_table(runs / "rejection/pairs/train.parquet").to_pylist()
    verdicts = {
        (r["id"], r["sample"]): r["correct"] for r in read_rows(runs / "rejection/samples.jsonl")
    }
    for side, right in (("chosen", True), ("rejected", False)):
        assert {verdicts[row["id"], row[f"{side}_sample"]] for row in pairs} == {right}
    manifest = read_manifest(runs / "dpo")
    assert manifest.metrics["pairs"] == len(pairs)
    assert manifest.notes["kl_reference"] == "runs/dpo/cold_start/model"
    assert "rewards/margins" in read_rows(runs / "dpo/metrics.jsonl")[0]
    plan = shell("chainforge plan recipes/quickstart/dpo.yaml --set rejection.preference_pairs=0")
    assert "stage dpo: rejection writes no pairs: set `preference_pairs: 1` there" in plan.stderr
