"""Run the recipes and the GPU benchmarks here; append a receipt for each to a file as it ends.

    benchmarks/gpu/run.sh receipts.jsonl         # installs the wheels, then runs this

Models have random weights in the shapes of Qwen2.5-0.5B and 1.5B and the quickstart's tokenizer,
filled up to their vocabulary. The recipes, the quickstart chain and the memory cases run side by
side first (their seconds only say that they run), then the timings, one after the other; a job that
does not fit into the remaining time is not started, and a job that is cut says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from random_models import SHAPES  # noqa: E402
from receipt import record, run  # noqa: E402

TASKS = [
    {
        "fn": "reasoning_gym",
        "params": {"dataset": "chain_sum", "max_digits": 1},
        "size": 400,
        "split": "train",
    }
]
LORA = {"use_peft": True, "lora_r": 16}
TIMING_SECONDS = 110  # a timing that takes longer is stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="File for the receipts.")
    parser.add_argument("--toy", action="store_true", help="Tiny models on the CPU.")
    parser.add_argument("--seconds", type=float, default=370, help="Start no timing after this.")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        small, large = ("toy", "toy") if args.toy else ("Qwen2.5-0.5B", "Qwen2.5-1.5B")
        for name in {small, large}:
            write_model(name, work / name)
        traces = recipe("collect", teacher="offline", tasks=TASKS, output_dir=work / "traces")
        run(traces, work / "traces.log", 60)
        many = side_by_side(work, small, large, args.toy)
        with ThreadPoolExecutor(2 if args.toy else len(many)) as pool:
            for name, command in many.items():
                pool.submit(write_receipt, name, command, args.out, work, args.seconds / 2)
        for name, command in timings(work, small, args.toy).items():
            if time.monotonic() < deadline:
                write_receipt(name, command, args.out, work, TIMING_SECONDS)


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


def side_by_side(work: Path, small: str, large: str, toy: bool) -> dict[str, list[str]]:
    """Return the commands that need not be timed: every recipe, memory cases, the quickstart."""
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

    def trained(kind: str, model: str, settings: dict[str, Any], name: str) -> list[str]:
        return recipe(kind, model_name_or_path=work / model, **settings, output_dir=work / name)

    found = {
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
        for case in ("qwen-full", "qwen-qlora", "qwen-grpo-reference"):
            memory = str(ROOT / "benchmarks/memory.py")
            found[f"memory-{case}"] = [sys.executable, memory, "--only", case]
        cli = [sys.executable, "-c", "from chainforge.cli import main; main()", "run"]
        found["quickstart-chain"] = [*cli, str(quickstart(work)), "--runs", str(work / "runs")]
    return found


def quickstart(work: Path) -> Path:
    """Copy the quickstart without the settings that keep it on the CPU."""
    folder = work / "quickstart"
    shutil.copytree(ROOT / "recipes/quickstart", folder)
    for file in folder.glob("*.yaml"):
        lines = file.read_text().splitlines()
        file.write_text("\n".join(line for line in lines if not line.startswith("use_cpu:")) + "\n")
    return folder / "chain.yaml"


def timings(work: Path, small: str, toy: bool) -> dict[str, list[str]]:
    """Return the commands that have the device for themselves, the most informative first."""
    models = ["--toy"] if toy else ["--models", small]

    def timed(script: str, case: str, *flags: str) -> list[str]:
        path = str(ROOT / "benchmarks" / script)
        file = str(work / f"{Path(script).stem}-{case.replace(' ', '-')}.result")
        return [sys.executable, path, *models, *flags, "--only", case, "--out", file]

    grpo = {
        f"grpo-{case.replace(' ', '-')}-{small}": timed("gpu_grpo.py", case, "--steps", "2")
        for case in ("trl", "shipped", "one batch")
    }
    sft = {
        f"sft-{case}-{small}": timed("gpu_sft.py", case)
        for case in ("trl", "packing", "shipped", "padding-free")
    }
    return grpo | sft


def write_receipt(name: str, command: list[str], out: Path, work: Path, seconds: float) -> None:
    """Run a job and append what came of it to the receipts, also where it failed or was cut."""
    receipt = record(name, command, work / f"{name}.log", seconds)
    results = sorted((work / "runs").glob("*/eval/results.json"))
    if "--out" in command and Path(command[-1]).exists():
        receipt.result = json.loads(Path(command[-1]).read_text())
    elif name == "quickstart-chain" and results:
        receipt.results = json.loads(results[0].read_text())
    with open(out, "ab") as sink:  # one short write, so that jobs side by side do not mix
        sink.write(msgspec.json.encode(receipt) + b"\n")
    print(name, receipt.exit, receipt.seconds, flush=True)


if __name__ == "__main__":
    main()
