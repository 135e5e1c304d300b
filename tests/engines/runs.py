"""Run recipes as users do, in processes of their own; with RECEIPTS=folder each leaves a receipt."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from chainforge.core.artifacts import read_json
from chainforge.core.jsonl import read_rows

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from receipt import Receipt, hardware, text_of, versions, write_receipt  # noqa: E402

CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
SAMPLED = {"system_prompt": "", "max_new_tokens": 72}
GREEDY = SAMPLED | {"temperature": 0, "num_samples": 1}


def tasks(size, split):
    """Return the quickstart's three tasks with so many rows each."""
    found = yaml.safe_load((ROOT / "recipes/quickstart/tasks.yaml").read_text())["tasks"]
    return [task | {"size": size, "split": split} for task in found]


@dataclass
class Done:
    """A command that succeeded."""

    folder: Path  # where it ran
    command: list[str]
    seconds: float

    def rows(self, stage):
        return list(read_rows(self.folder / stage / "samples.jsonl"))


def execute(folder, command, path=ROOT):
    """Run a command in a folder; fail with the end of its output if it fails."""
    command = list(map(str, command))
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    with open(folder / "log.txt", "w") as log:
        code = subprocess.run(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        ).returncode
    took = time.monotonic() - started
    assert code == 0, f"{shlex.join(command)}\n{(folder / 'log.txt').read_text()[-6000:]}"
    return Done(folder, command, took)


def recipe(folder, name, by=(), **settings):
    """Run a recipe with these settings in a folder, `by` further arguments of Python."""
    command = [sys.executable, *by, ROOT / "recipes" / f"{name}.py"]
    for key, value in settings.items():
        plain = isinstance(value, str | Path)
        command += [f"--{key}", str(value) if plain else json.dumps(value)]
    return execute(folder, command)


def greedy(folder, stage, model, rows=16, **settings):
    """Evaluate a model with the likeliest tokens; return the run and its completions by row."""
    settings = GREEDY | {"tasks": tasks(rows, "test"), "models": f"policy={model}"} | settings
    done = recipe(folder, "evaluate", **settings, output_dir=stage)
    return done, {row["id"]: row["completion"] for row in done.rows(stage)}


def accuracy(done, stage):
    return read_json(done.folder / stage / "results.json")["models"][0]["strict"]["mean"]


def receipt(name, done, *packages, note="", cell=None, steps=None, loss=None, **result):
    """Write what a run was and gave, with the versions of these packages too."""
    if not (folder := os.environ.get("RECEIPTS")):
        return
    text = text_of(done.command, done.folder, {})
    text = text.replace(f"{done.folder.parent}/", "")  # where the model and the data are
    found = Receipt(
        name=name,
        date=time.strftime("%Y-%m-%d"),
        hardware=hardware(),
        python=platform.python_version(),
        versions=versions()
        | {package: importlib.metadata.version(package) for package in packages},
        command=text,
        exit=0,
        seconds=round(done.seconds, 1),
        cell=cell,
        steps=steps,
        loss=loss,
        result=result or None,
        note=note,
    )
    write_receipt(found, Path(folder) / f"cpu-{name}.json")
