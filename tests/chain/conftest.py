"""A chain of small recipes of one's own, so that running chains can be tested in seconds."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from chainforge.chain.plan import Step, plan_chain
from chainforge.chain.run import run_chain
from chainforge.chain.spec import load_chain
from chainforge.report.html import write_report

RECIPE = '''
"""Count to `steps`, a row a step, and leave a model that knows its own and those before it.

Stop or fail where the environment says, and where the model before knows less than `needs`.
"""
import json
import os
import sys
import time

from chainforge.core import process
from chainforge.core.artifacts import write_json
from chainforge.core.config import given
from chainforge.core.errors import InputError, Stopped
from chainforge.core.jsonl import JsonLines, read_rows
from chainforge.train.stage import open_stage


def main():
    settings = given(sys.argv[1:])
    roles = {"data.0": "data", "model": "model_name_or_path"}
    inputs = {role: settings[key] for role, key in roles.items() if key in settings}
    if settings.get("wrong"):
        raise InputError(f"steps: {settings['wrong']}\\n  line 3: not a number")
    name = os.path.basename(settings["output_dir"])
    with open_stage("counting", settings["output_dir"], inputs=inputs) as stage:
        start = os.path.join(settings.get("model_name_or_path", ""), "config.json")
        before = json.load(open(start)).get("steps", 0) if os.path.exists(start) else 0
        if before < settings.get("needs", 0):
            raise Stopped("it earned no reward in 50 steps", 1)
        path = stage.path("samples.jsonl")
        steps = settings.get("steps", 3)
        with JsonLines(path) as rows:
            for step in range(len(read_rows(path)), steps):
                rows.append({"step": step, "process": os.getpid()})
                stage.progress(step + 1, steps, "steps", f"loss {1 / (step + 1):.2f}")
                if os.environ.get("FAKE_STOP_AT") == f"{name}:{step + 1}":
                    time.sleep(60)
        if os.environ.get("FAKE_SIGNAL") == name:
            raise Stopped("by SIGTERM after step 2 of 3; run the same command again", 143)
        if os.environ.get("FAKE_FAIL") == name:
            raise RuntimeError("the loss is not a number")
        write_json(stage.path("model") / "config.json", {"steps": before + steps})
        stage.metrics["steps"] = steps


if __name__ == "__main__":
    process.run(main)
'''

MEASURE = '''
"""Measure models that got as many of twenty rows right as `right` says, or as they know steps."""
import json
import sys
from pathlib import Path

from chainforge.core import process
from chainforge.core.artifacts import write_json
from chainforge.core.config import given
from chainforge.core.jsonl import write_rows
from chainforge.data.metrics import summarize
from chainforge.train.stage import open_stage


def rows(name, right):
    return [{"id": str(i), "sample": 0, "correct": i < right, "model": name} for i in range(20)]


def main():
    settings = given(sys.argv[1:])
    models = settings["models"] if isinstance(settings["models"], list) else [settings["models"]]
    paths = dict(model.split("=") for model in models)
    inputs = {f"models.{name}": path for name, path in paths.items()}
    knows = {n: json.loads(Path(p, "config.json").read_text()).get("steps", 0)
             for n, p in paths.items()}
    with open_stage("measuring", settings["output_dir"], inputs=inputs) as stage:
        judged = {n: rows(n, right) for n, right in settings.get("right", knows).items()}
        write_rows(stage.path("samples.jsonl"), [row for part in judged.values() for row in part])
        write_json(stage.path("results.json"), summarize(judged))


if __name__ == "__main__":
    process.run(main)
'''

CHAIN = {
    "name": "fake",
    "base": "base",
    "launch": "none",
    "seed": 1,
    "stages": [
        {"name": "traces", "recipe": "count.py", "config": "traces.yaml"},
        {"name": "cold_start", "recipe": "count.py", "config": "cold_start.yaml", "model": "base",
         "data": "traces"},
        {"name": "rl", "recipe": "count.py", "config": "rl.yaml", "model": "cold_start"},
    ],
}  # fmt: skip


class Workplace:
    """A folder with a base model, a recipe of one's own and a chain of three stages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chain = json.loads(json.dumps(CHAIN))
        (folder / "base").mkdir()
        (folder / "base/config.json").write_text("{}")
        (folder / "count.py").write_text(RECIPE)
        for name in ("traces", "cold_start", "rl"):
            self.configure(name, steps=3)
        self.save()

    def save(self) -> None:
        (self.folder / "chain.yaml").write_text(yaml.safe_dump(self.chain, sort_keys=False))

    def configure(self, name: str, **settings) -> None:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))

    def start(self, *words: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "chainforge.cli", *words],
            cwd=self.folder,
            env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def chainforge(self, *words: str, expect: int = 0, **environment: str) -> str:
        """Run a command line; return stdout and stderr together."""
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == expect, f"exit code {process.returncode}\n{out}\n{err}"
        assert expect == 1 or "Traceback" not in err, err
        return out + err

    def run(self, **options) -> None:
        """Run the chain from here, without starting a command line."""
        run_chain(load_chain("chain.yaml"), **options)

    def plan(self, runs: str | Path = "runs") -> dict[str, Step]:
        return {step.stage.name: step for step in plan_chain(load_chain("chain.yaml"), runs)}

    def states(self) -> dict[str, str]:
        return {name: step.state for name, step in self.plan().items()}

    def shell(self, line: str) -> None:
        """Do what a person does who pastes a line into a shell where ChainForge is installed."""
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        subprocess.run(
            line, shell=True, cwd=self.folder, check=True, env=os.environ | {"PATH": path}
        )

    def report(self, write: bool = False) -> str:
        """Return the report as it is, or as it would be written now."""
        if write:
            write_report(self.folder / "runs/fake")
        return (self.folder / "runs/fake/report.html").read_text()

    def rows(self, stage: str) -> list[dict]:
        lines = (self.folder / "runs/fake" / stage / "samples.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def fingerprint(self, stage: str) -> str:
        manifest = self.folder / "runs/fake" / stage / "manifest.json"
        return json.loads(manifest.read_text())["fingerprint"]

    def wait_for_rows(self, stage: str, number: int) -> int:
        """Wait until a stage has written so many rows; return the process that writes them."""
        for _ in range(400):
            try:
                rows = self.rows(stage)
            except (OSError, ValueError):
                rows = []
            if len(rows) >= number:
                return rows[-1]["process"]
            time.sleep(0.05)
        raise AssertionError(f"{stage} never came to {number} rows")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path)


@pytest.fixture
def gated(workplace: Workplace) -> Workplace:
    """Two trained stages with a measurement between them, whose gate says if the second starts."""
    (workplace.folder / "measure.py").write_text(MEASURE)
    _, cold_start, rl = workplace.chain["stages"]
    cold_start.pop("data")
    measure = {
        "name": "eval",
        "recipe": "measure.py",
        "models": ["base", "cold_start"],
        "set": {"right": {"base": 2, "cold_start": 12}},
        "gate": {"metric": "accuracy", "min": 0.7},
    }
    workplace.chain["stages"] = [cold_start, measure, rl]
    workplace.save()
    return workplace
