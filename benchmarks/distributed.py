"""The jobs of `make test-distributed`: a tiny model in each layout, on two processes of a CPU.

The layouts are those of `accelerate_configs/`. FSDP2 and DeepSpeed are for GPUs only: `on_cpu.py`
lets them run here. `make test-distributed RECEIPTS=benchmarks/receipts` records the runs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from receipt import Receipt, record

BASE, STUDENT = "recipes/quickstart/base", "recipes/quickstart/student_base"
NOTE = "a model of 0.7 million parameters on a shared CPU: the speed only says that it runs"
SUMS = {"dataset": "chain_sum", "max_digits": 1}
TASKS = [{"fn": "reasoning_gym", "params": SUMS, "size": 100, "split": "train"}]
STEPS, SAVED = 4, 2  # a run that is killed at step 3 resumes from checkpoint 2
COMMON = {
    "model_name_or_path": BASE,
    "max_steps": STEPS,
    "save_steps": SAVED,
    "learning_rate": 0.001,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "logging_steps": 1,
}
SAMPLED = {"tasks": TASKS, "system_prompt": "", "max_completion_length": 16}
RECIPES: dict[str, dict[str, Any]] = {
    "sft": {"max_length": 192},
    # TRL's rollouts, which every layout can have: the others draw other completions.
    "grpo": SAMPLED
    | {"num_generations": 4, "random_rewards": True, "beta": 0.01, "rollout_engine": "trl"},
    "distill": SAMPLED | {"teacher_model_name_or_path": BASE, "model_name_or_path": STUDENT},
}
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}  # each process drops other values
QLORA = LORA | {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"dtype": "float32"},
    "lora": {"dtype": "float32"} | LORA,
    "qlora": {"dtype": "bfloat16"} | QLORA,
}
LAYOUTS = {"single": None, "ddp": "cpu_ddp", "fsdp2": "fsdp2", "zero2": "zero2", "zero3": "zero3"}


@dataclass(frozen=True)
class Job:
    """One recipe with one method in one layout."""

    layout: str
    recipe: str
    method: str

    @property
    def name(self) -> str:
        """Return the name of its folder, and with `cpu-` before it that of its receipt."""
        return f"{self.layout}-{self.recipe}-{self.method}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that it needs."""
        found = {"OMP_NUM_THREADS": "1"}
        return found | {"DS_ACCELERATOR": "cpu"} if self.layout.startswith("zero") else found

    def command(self, work: Path, name: str, **more: Any) -> list[str]:
        """Return the command that trains it into a folder of `work`: two processes, or one."""
        on_gpu = self.layout in ("fsdp2", "zero2", "zero3")
        batch = 8 if self.layout == "single" else 4
        settings = COMMON | RECIPES[self.recipe] | METHODS[self.method] | more
        settings |= {"per_device_train_batch_size": batch, "use_cpu": not on_gpu}
        if self.recipe == "sft":
            settings["data"] = work / "traces"
        words = [sys.executable]
        if config := LAYOUTS[self.layout]:
            words = [f"{Path(sys.executable).parent}/accelerate", "launch", "--config_file"]
            words += [f"accelerate_configs/{config}.yaml", "--num_processes", "2"]
            words += ["--mixed_precision", "no"] if on_gpu else []
        words += ["benchmarks/on_cpu.py"] if on_gpu else []
        words += [f"recipes/{self.recipe}.py"]
        for key, value in settings.items():
            plain = isinstance(value, str | Path)
            words += [f"--{key}", str(value) if plain else json.dumps(value)]
        return [*words, "--output_dir", str(work / name)]

    def run(self, work: Path, name: str = "", kill_at: int = 0, **more: Any) -> Receipt:
        """Run it to its end, or until it is killed; `more` are further settings."""
        name = name or self.name
        environment = self.environment | ({"KILL_AT": str(kill_at)} if kill_at else {})
        command, log = self.command(work, name, **more), work / f"{name}.log"
        return record(f"cpu-{self.name}", command, log, 580, NOTE, **environment)


JOBS = [
    Job(layout, recipe, method)
    for layout in LAYOUTS
    for recipe in RECIPES
    for method in METHODS
    if (layout, method) != ("fsdp2", "qlora")  # refused
    and (recipe, method) != ("distill", "qlora")
]


def write_traces(work: Path) -> None:
    """Write what SFT trains on: worked solutions of a solver."""
    words = [sys.executable, "recipes/collect.py", "--teacher", "offline", "--system_prompt", "",
             "--tasks", json.dumps(TASKS), "--output_dir", str(work / "traces")]  # fmt: skip
    found = record("traces", words, work / "traces.log")
    if found.exit != 0:
        raise RuntimeError("\n".join(found.output))
