"""What the GPU benchmarks share: their arguments, the device's limits, one case a process.

Without a GPU they say so and measure nothing; `--toy` runs the same code on the CPU with a model of
two layers, to see that it works: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from measuring import ROOT, results
from random_models import SHAPES, has_gpu

from chainforge.core.config import read_settings

RECIPES = {"Qwen2.5-0.5B": "qwen2.5-0.5b", "Qwen2.5-1.5B": "qwen2.5-1.5b",
           "SmolLM2-135M": "smollm2-135m", "toy": "quickstart"}  # fmt: skip
NO_GPU = (
    "no GPU here: nothing was measured. `--toy` runs the same code on the CPU, without meaning."
)


def arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """Return a parser with what both benchmarks take."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    models = [name for name in SHAPES if name != "toy"]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--only", nargs="+", help="cases by name; all if left out")
    parser.add_argument("--steps", type=int, default=6, help="the first two are not counted")
    parser.add_argument("--toy", action="store_true", help="on the CPU, to see that it runs")
    parser.add_argument("--out", type=Path, default=results() / f"{name}.json")
    parser.add_argument("--case", nargs=2, metavar=("MODEL", "CASE"), help=argparse.SUPPRESS)
    return parser


def shipped(model: str, file: str, keys: Iterable[str]) -> dict[str, Any]:
    """Return what our recipe for a model sets, of the keys that change what a step costs."""
    settings = read_settings(ROOT / "recipes" / RECIPES[model] / file)
    settings["use_peft"] = bool(settings.get("use_peft") or "adapter" in settings)
    return {key: settings[key] for key in keys if key in settings}


def verdict(rows: list[dict[str, Any]], rivals: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return how the shipped settings compare with the fastest rival, for the table of results."""
    words, met = [], True
    for model in dict.fromkeys(row["model"] for row in rows):
        found = {row["case"]: row["tokens_per_second"] for row in rows
                 if row["model"] == model and "error" not in row and rivals(row)}  # fmt: skip
        if "shipped" not in found:
            return {"measured": f"{model}: the shipped settings were not measured", "met": None}
        best = max(found, key=lambda case: found[case])
        ratio = found["shipped"] / found[best]
        of = f", {found['shipped'] / found['trl']:.2f}x TRL's defaults" if "trl" in found else ""
        words.append(f"{model}: {found['shipped']:,.0f} tokens/s, {ratio:.2f} of the fastest "
                     f"({best}){of}")  # fmt: skip
        met = met and ratio >= 0.98
    return {"measured": "; ".join(words), "met": met}


def limits() -> dict[str, float]:
    """Measure what the device can do at most: bf16 multiplications, and bytes copied a second."""
    import torch

    device = "cuda" if has_gpu() else "cpu"
    size, length = (8192, 2**30) if has_gpu() else (256, 2**22)
    kind = torch.bfloat16 if has_gpu() else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    source = torch.empty(length, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return {
        "flops": 2 * size**3 / seconds_of(lambda: left @ right),
        "bytes_per_second": 2 * length / seconds_of(lambda: target.copy_(source)),
    }


def seconds_of(work: Callable[[], Any], runs: int = 10) -> float:
    """Return the least seconds that a piece of work took."""
    best = float("inf")
    for _ in range(runs):
        wait()
        started = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - started)
    return best


def wait() -> None:
    """Wait until the device has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def weights_of(name: str) -> tuple[int, int]:
    """Return a model's number of parameters, and the bytes of keys and values a token in bf16."""
    from chainforge.doctor.memory import read_shape

    config = SHAPES[name]
    shape = read_shape(config)
    head = config["hidden_size"] // config["num_attention_heads"]
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    return shape.parameters, 2 * 2 * layers * heads * head


def measure(
    script: str,
    cases: Iterable[str],
    args: argparse.Namespace,
    shares: Callable[[dict[str, Any], dict[str, float]], dict[str, float]],
) -> dict[str, Any]:
    """Run every case of every model; return the rows with their shares of the device's limits."""
    if not (args.toy or has_gpu()):
        raise SystemExit(NO_GPU)
    models = ["toy"] if args.toy else args.models
    most = limits()
    rows = run_cases(script, [(model, name) for model in models for name in cases], args)
    for row in rows:
        if "error" not in row:
            row |= shares(row, most)
    return {"limits": most, "cases": rows}


def run_cases(
    script: str, cases: Iterable[tuple[str, str]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Run each case in a process of its own; one that fails is reported with its last line."""
    rows = []
    for model, case in cases:
        command = [sys.executable, script, "--case", model, case, "--steps", str(args.steps)]
        done = subprocess.run([*command, *(["--toy"] if args.toy else [])], capture_output=True,
                              text=True, check=False)  # fmt: skip
        row: dict[str, Any] = {"model": model, "case": case}
        if done.returncode:
            row["error"] = (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
        else:
            row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows
