"""The quickstart in a folder of its own, to plant faults in."""

import json
import os
import shutil
from pathlib import Path

import yaml

from chainforge.chain.plan import override, plan_chain
from chainforge.chain.spec import load_chain
from chainforge.doctor.environment import this_machine
from chainforge.doctor.preflight import examine

ROOT = Path(__file__).parents[2]
DISTILL = {"name": "distill", "recipe": "distill", "config": "distill.yaml", "size": 12,
           "model": "student_base", "teacher_model": "rl_final"}  # fmt: skip


class Copy:
    """The quickstart in a folder of its own, with few rows, one more stage, and broken weights."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder / "quick", monkeypatch
        shutil.copytree(ROOT / "recipes/quickstart", self.folder)
        for weights in self.folder.glob("*/model.safetensors"):
            weights.write_bytes(b"no weights at all")
        for file in self.folder.glob("*.yaml"):
            settings = yaml.safe_load(file.read_text())
            for entry in [*settings.get("stages", []), *settings.get("tasks", [])]:
                if isinstance(entry, dict) and ("size" in entry or "fn" in entry):
                    entry["size"] = 12
            if "max_completion_length" in settings:
                settings["per_device_train_batch_size"] = 8
            file.write_text(yaml.safe_dump(settings))
        self.change("chain", stages=[*self.read("chain")["stages"], DISTILL])
        monkeypatch.chdir(folder)

    def examine(self, stage, machine=None, launch=None):
        """Return the doctor's findings of a stage and of those that it needs."""
        chain = load_chain(self.folder)
        steps = plan_chain(override(chain, launch=launch), self.folder / "runs")
        names = {stage}
        for step in reversed(steps):
            if step.stage.name in names:
                names |= {item.name for item in step.inputs.values()}
        kept = [step for step in steps if step.stage.name in names]
        return examine(machine or this_machine(), chain, kept)

    def read(self, name):
        return yaml.safe_load((self.folder / f"{name}.yaml").read_text())

    def change(self, name, **settings):
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(self.read(name) | settings))

    def stage(self, name, **keys):
        stages = self.read("chain")["stages"]
        self.change("chain", stages=[s | keys if s["name"] == name else s for s in stages])

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    def edit(self, name, **keys):
        """Change keys of a JSON file."""
        path = self.folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    def tokenizer(self, act, model="base"):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder / model)
        act(tokenizer)
        tokenizer.save_pretrained(self.folder / model)

    def template(self, old, new, times=-1):
        path = self.folder / "base/chat_template.jinja"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, times))

    def launch(self, stage, text):
        self.stage(stage, launch=self.write("launch.yaml", text))

    def on_gpu(self, memory):
        """Put a program on the path that answers as nvidia-smi does on a machine with a GPU."""
        program = Path(self.write("bin/nvidia-smi", f"#!/bin/sh\necho '{memory}, NVIDIA L4'\n"))
        program.chmod(0o755)
        self.monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    def package(self, name, version):
        """Make the environment one in which another version is installed."""
        self.write(f"site/{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}")
        self.monkeypatch.syspath_prepend(self.folder / "site")
