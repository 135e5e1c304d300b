"""Run the recipes and the GPU benchmarks on this machine; write a receipt for each as it ends.

    benchmarks/gpu/run.sh receipts         # installs the wheels, then runs this

Models have random weights in the shapes of Qwen2.5-0.5B and 1.5B and the quickstart's tokenizer,
filled up to their vocabulary. Jobs run one after the other, the most informative ones first; a job
that does not fit into the remaining time is not started, and a job that is cut says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from random_models import SHAPES  # noqa: E402

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
TASKS = [
    {
        "fn": "reasoning_gym",
        "params": {"dataset": "chain_sum", "max_digits": 1},
        "size": 400,
        "split": "train",
    }
]
LORA = {"use_peft": True, "lora_r": 16}
JOB_SECONDS = 90  # a job that takes longer is stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Folder for the receipts.")
    parser.add_argument("--toy", action="store_true", help="Tiny models on the CPU.")
    parser.add_argument("--seconds", type=float, default=420, help="Start no job after this time.")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        small, large = ("toy", "toy") if args.toy else ("Qwen2.5-0.5B", "Qwen2.5-1.5B")
        for name in {small, large}:
            write_model(name, work / name)
        run(recipe("collect", teacher="offline", tasks=TASKS, output_dir=work / "traces"))
        for name, command in jobs(work, args.out, small, large, args.toy).items():
            if time.monotonic() < deadline:
                write_receipt(name, command, args.out, work)


def write_model(name: str, folder: Path) -> None:
    """Write a model of random weights with the quickstart's tokenizer, filled up to its size."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    base = ROOT / "recipes/quickstart/base"
    folder.mkdir()
    for file in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(base / file, folder / file)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    size = max(SHAPES[name]["vocab_size"], 640)
    taken = {token["id"] for token in tokenizer["added_tokens"]}
    taken |= set(tokenizer["model"]["vocab"].values())
    tokenizer["model"]["vocab"] |= {f"filler{n}": n for n in range(size) if n not in taken}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    ends = json.loads((base / "config.json").read_text())
    shape = SHAPES[name] | {
        "vocab_size": size,
        "eos_token_id": ends["eos_token_id"],
        "pad_token_id": ends["pad_token_id"],
        "bos_token_id": None,
        "max_position_embeddings": 4096,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def recipe(name: str, **settings: Any) -> list[str]:
    """Return the command of a recipe with these settings."""
    command = [sys.executable, str(ROOT / "recipes" / f"{name}.py")]
    for key, value in settings.items():
        plain = isinstance(value, str | Path)
        command += [f"--{key}", str(value) if plain else json.dumps(value)]
    return command


def jobs(work: Path, out: Path, small: str, large: str, toy: bool) -> dict[str, list[str]]:
    """Return the command of every job, the most informative first."""
    common: dict[str, Any] = {
        "max_steps": 2 if toy else 30,
        "dtype": "float32" if toy else "bfloat16",
        "bf16": not toy,
        "use_cpu": toy,
        "report_to": "none",
        "logging_steps": 5,
    }
    sft = common | {
        "data": work / "traces",
        "per_device_train_batch_size": 4,
        "max_length": 256,
    }
    sampled = common | {
        "tasks": TASKS,
        "system_prompt": "",
        "per_device_train_batch_size": 8 if toy else 32,
        "max_completion_length": 8 if toy else 64,
    }
    rl = sampled | {"random_rewards": True, "num_generations": 8, "max_zero_advantage_steps": 1000}
    bench = ROOT / "benchmarks"
    models = ["--toy"] if toy else ["--models", small]

    def script(name: str, *flags: str) -> list[str]:
        return [sys.executable, str(bench / name), *flags]

    def trained(kind: str, model: str, settings: dict[str, Any], name: str) -> list[str]:
        return recipe(kind, model_name_or_path=work / model, **settings, output_dir=work / name)

    found = {
        f"grpo-{case}-{small}": script(
            "gpu_grpo.py",
            *models,
            "--steps",
            "3",
            "--only",
            case,
            "--out",
            str(out / f"{case}.tmp"),
        )
        for case in ("trl", "continuous", "shipped")
    }
    found["sft-ladder-" + small] = script(
        "gpu_sft.py", *models, "--only", "trl", "packing", "padding-free", "shipped",
        "--out", str(out / "sft.tmp"),
    )  # fmt: skip
    if not toy:
        for case in ("qwen-full", "qwen-qlora", "qwen-grpo-reference"):
            found[f"memory-{case}"] = script("memory.py", "--only", case)
    found |= {
        f"grpo-lora-kl-{large}": trained("grpo", large, rl | LORA | {"beta": 0.01}, "grpo-lora"),
        f"grpo-full-{small}": trained("grpo", small, rl, "grpo-full"),
        f"sft-full-{small}": trained("sft", small, sft, "sft-full"),
        f"sft-lora-{large}": trained("sft", large, sft | LORA, "sft-lora"),
        f"distill-{small}": trained(
            "distill", small, sampled | {"teacher_model_name_or_path": work / large}, "distilled"
        ),
    }
    if not toy:
        found[f"sft-qlora-{large}"] = trained(
            "sft", large, sft | LORA | {"load_in_4bit": True}, "sft-qlora"
        )
    return found


def write_receipt(name: str, command: list[str], out: Path, work: Path) -> None:
    """Run a job and write what came of it, also where it failed or was cut."""
    log = out / f"{name}.log"
    started = time.monotonic()
    found = run(command, log)
    places = {str(work) + "/": "", str(ROOT) + "/": "", sys.executable: "python"}
    text = shlex.join(command)
    for place, short in places.items():
        text = text.replace(place, short)
    receipt = {
        "name": name,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "command": text,
        "exit": found,
        "seconds": round(time.monotonic() - started, 1),
    }
    metrics = Path(command[-1]) / "metrics.jsonl"
    if "--output_dir" in command and metrics.exists():
        receipt["last_log"] = json.loads(metrics.read_text().splitlines()[-1])
    elif log.exists():
        lines = [
            line for line in log.read_text(errors="replace").splitlines() if "it/s]" not in line
        ]
        receipt["output"] = lines[-12:]
    (out / f"{name}.json").write_text(json.dumps(receipt, indent=1) + "\n")
    print(name, found, receipt["seconds"], flush=True)


def run(command: list[str], log: Path | None = None) -> int | str:
    """Run a command with its output in a file; return its exit code, or "cut"."""
    with open(log or os.devnull, "w") as sink:
        try:
            return subprocess.run(
                command, stdout=sink, stderr=subprocess.STDOUT, timeout=JOB_SECONDS, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return "cut"


def hardware() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
