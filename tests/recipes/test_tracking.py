"""`report_to` reaches the trackers, and the stages of a chain are runs of one project.

The tracker is not installed here: a small module replaces it and records the calls of
transformers' own callback.
"""

import json
import os
import sys
from unittest import mock

import pytest
import yaml
from small import TRAIN

from chainforge.chain.plan import plan_chain
from chainforge.chain.spec import load_chain
from chainforge.core.artifacts import read_manifest, write_json
from chainforge.core.jsonl import write_rows

TRACKIO = """
import contextvars, json, pathlib, types

context_vars = types.SimpleNamespace(current_space_id=contextvars.ContextVar("s", default=None))
config = type("Config", (dict,), {"update": lambda self, *a, **k: None})()

def record(*words):
    with open(pathlib.Path(__file__).with_name("trackio.jsonl"), "a") as file:
        file.write(json.dumps(words) + "\\n")

def init(project, name, **more):
    record("init", project, name)

def log(values):
    record("log", values["train/global_step"], sorted(values))

def finish():
    record("finish")
"""


@pytest.fixture
def sft(tmp_path, tiny_model, recipe, monkeypatch):
    """Run SFT beside a tracker that only records; return the tracker's calls."""
    (tmp_path / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path)
    row = {"prompt": [{"role": "user", "content": "1 + 1 ="}], "completion": "2"}
    write_rows(tmp_path / "rows.jsonl", [row] * 8)
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(TRAIN))
    flags = ["--config", tmp_path / "sft.yaml", "--data", tmp_path / "rows.jsonl"]

    def run(output, *more):
        given = ["--model_name_or_path", tiny_model, "--output_dir", output]
        code, error = recipe("sft", *flags, *given, *more)
        assert code == 0, error
        return [json.loads(line) for line in open(tmp_path / "trackio.jsonl")]

    with mock.patch.dict(os.environ):
        for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
            os.environ.pop(name, None)
        yield run
    sys.modules.pop("trackio", None)  # else later tests would find it imported


def test_the_stages_of_a_chain_are_runs_of_one_project(tmp_path, sft):
    write_json(tmp_path / "runs/sums/chain.json", {"name": "sums", "stages": []})
    calls = sft(tmp_path / "runs/sums/cold", "--report_to", "trackio")
    assert calls[0] == ["init", "sums", "sums/cold"]
    assert [call[1] for call in calls if call[0] == "log"][:2] == [1, 2]
    assert "train/loss" in calls[1][2]
    assert calls[-1] == ["finish"]
    # A tracker is not part of the fingerprint.
    assert "report_to" not in read_manifest(tmp_path / "runs/sums/cold").given
    assert sft(tmp_path / "runs/sums/cold", "--report_to", "none") == calls
    os.environ["WANDB_PROJECT"] = "mine"
    calls = sft(tmp_path / "alone", "--report_to", "trackio", "--run_name", "first")
    assert "first" in [call[2] for call in calls if call[0] == "init"]
    assert os.environ["WANDB_PROJECT"] == "mine"


def test_one_line_of_the_chain_tracks_every_training_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "base/config.json", {})
    stages = [
        {"name": "traces", "recipe": "collect"},
        {"name": "cold", "recipe": "sft", "model": "base", "data": "traces"},
        {"name": "reason", "recipe": "grpo", "model": "cold", "set": {"report_to": "none"}},
        {"name": "scores", "recipe": "evaluate", "models": ["cold", "reason"]},
    ]

    def planned(**more):
        write_json(
            tmp_path / "chain.yaml", {"name": "sums", "base": "base", "stages": stages} | more
        )
        return plan_chain(load_chain("chain.yaml"), "runs")

    tracked = planned(report_to=["trackio", "tensorboard"])
    found = ["--report_to trackio tensorboard" in step.shell for step in tracked]
    assert found == [False, True, False, False]
    assert "--report_to none" in tracked[2].shell
    assert [step.fingerprint for step in planned()] == [step.fingerprint for step in tracked]
