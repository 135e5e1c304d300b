"""`report_to` reaches the trackers, and the stages of a chain are runs of one project.

The trackers are heavy and not installed here: small modules replace them and record the calls of
transformers' own callbacks.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from chainforge.chain.plan import plan_chain
from chainforge.chain.spec import load_chain
from chainforge.core.artifacts import read_manifest, write_json
from chainforge.core.jsonl import JsonLines, example, sample
from chainforge.core.transcript import write

TRACKIO = """
import contextvars, json, pathlib, types

context_vars = types.SimpleNamespace(current_space_id=contextvars.ContextVar("s", default=None))
config = type("Config", (dict,), {"update": lambda self, *a, **k: None})()

def told(*words):
    with open(pathlib.Path(__file__).with_name("trackio.jsonl"), "a") as file:
        file.write(json.dumps(words) + "\\n")

def init(project, name, **more):
    told("init", project, name)

def log(values):
    told("log", values["train/global_step"], sorted(values))

def finish():
    told("finish")
"""
TENSORBOARD = """
import pathlib

class SummaryWriter:
    def __init__(self, log_dir):
        pathlib.Path(log_dir).mkdir(parents=True, exist_ok=True)
        self.file = open(pathlib.Path(log_dir) / "events", "a")
    def add_text(self, *words):
        pass
    def add_scalar(self, name, value, step):
        self.file.write(f"{step} {name}\\n")
    def flush(self):
        self.file.flush()
    def close(self):
        self.file.close()
"""
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 0.01,
    "save_strategy": "no",
    "max_length": 256,
}
NAMES = ("WANDB_PROJECT", "TRACKIO_PROJECT", "TENSORBOARD_LOGGING_DIR")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A chain's folder with rows to train on, and trackers that only write down."""
    trackers = tmp_path / "trackers"
    trackers.mkdir()
    (trackers / "trackio.py").write_text(TRACKIO)
    (trackers / "tensorboardX.py").write_text(TENSORBOARD)
    monkeypatch.syspath_prepend(trackers)
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    rows = [
        sample(example([{"role": "user", "content": f"{i} + {i} ="}], str(2 * i), task="sums"),
               write("add", str(2 * i)), 0, source="policy")
        for i in range(8)
    ]  # fmt: skip
    with JsonLines(tmp_path / "rows.jsonl") as file:
        file.extend(rows)
    write_json(tmp_path / "runs/sums/chain.json", {"name": "sums", "stages": []})
    yield tmp_path
    for name in ("trackio", "tensorboardX"):  # else later tests would find them imported
        sys.modules.pop(name, None)


def sft(place, recipe, tiny_model, output, *flags):
    (place / "sft.yaml").write_text(yaml.safe_dump(SETTINGS))
    return recipe("sft", "--config", place / "sft.yaml", "--model_name_or_path", tiny_model,
                  "--data", place / "rows.jsonl", "--output_dir", output, *flags)  # fmt: skip


def events(folder: Path) -> str:
    return (folder / "events").read_text()


def test_the_stages_of_a_chain_are_runs_of_one_project(place, recipe, tiny_model):
    output = place / "runs/sums/cold"
    flags = ("--report_to", "trackio", "tensorboard")
    assert sft(place, recipe, tiny_model, output, *flags)[0] == 0
    told = [
        json.loads(line) for line in (place / "trackers/trackio.jsonl").read_text().split("\n")[:-1]
    ]
    assert told[0] == ["init", "sums", "sums/cold"]
    assert [row[1] for row in told if row[0] == "log"][:2] == [1, 2]
    assert "train/loss" in told[1][2]
    assert told[-1] == ["finish"]
    assert os.environ["WANDB_PROJECT"] == "sums"
    assert "1 train/loss" in events(output / "tensorboard")
    manifest = read_manifest(output)
    assert not any("tensorboard" in name for name in manifest.outputs)
    assert "report_to" not in manifest.given  # what is tracked makes no other model
    code, error = sft(place, recipe, tiny_model, output, "--report_to", "none")
    assert code == 0, error


def test_what_the_user_has_named_stays(place, recipe, tiny_model, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(place / "curves"))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    flags = ("--report_to", "tensorboard", "--run_name", "first")
    assert sft(place, recipe, tiny_model, place / "alone", *flags)[0] == 0
    assert "2 train/loss" in events(place / "curves/first")
    assert os.environ["WANDB_PROJECT"] == "mine"
    assert "TRACKIO_PROJECT" not in os.environ  # no chain, no project


def test_one_line_of_the_chain_tracks_all_that_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    chain = {
        "name": "sums",
        "base": "base",
        "report_to": ["trackio", "tensorboard"],
        "stages": [
            {"name": "traces", "recipe": "collect"},
            {"name": "cold", "recipe": "sft", "model": "base", "data": "traces"},
            {"name": "reason", "recipe": "grpo", "model": "cold", "set": {"report_to": "none"}},
            {"name": "scores", "recipe": "evaluate", "models": ["cold", "reason"]},
        ],
    }
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    tracked = plan_chain(load_chain("chain.yaml"), "runs")
    assert ["--report_to trackio tensorboard" in step.shell for step in tracked] == [
        False, True, False, False,
    ]  # fmt: skip
    assert "--report_to none" in tracked[2].shell
    del chain["report_to"]
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    plain = plan_chain(load_chain("chain.yaml"), "runs")
    assert [step.fingerprint for step in plain] == [step.fingerprint for step in tracked]
