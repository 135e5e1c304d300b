"""A receipt says what was run, where, with which versions, and what came of it.

`benchmarks/receipts/` has one JSON file for each. `gpu/receipts.py` and `distributed.py` write
them, and `matrix.py` makes the tables of the documentation from them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec

from chainforge.core.jsonl import read_rows

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes",
            "deepspeed", "vllm")  # fmt: skip
CONFIGS = "accelerate_configs/"
LAUNCHES = {"cpu_ddp": "ddp", "ddp": "ddp", "fsdp2": "fsdp2", "zero2": "zero2", "zero3": "zero3"}


class Cell(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The way of training that a receipt is of."""

    recipe: str
    method: Literal["full", "LoRA", "QLoRA"]
    engine: Literal["transformers", "vLLM"]
    layout: Literal["single", "ddp", "fsdp2", "zero2", "zero3"]


class Receipt(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One run. Its seconds are those of the whole command: imports, loading and saving count."""

    name: str
    date: str
    hardware: str
    python: str
    versions: dict[str, str]
    command: str
    exit: int | Literal["cut"]
    seconds: float
    cell: Cell | None = None  # of a recipe that trains
    steps: int | None = None
    tokens_per_second: float | None = None  # trained and sampled, over `seconds`
    loss: float | None = None  # the last that was logged
    last_log: dict[str, Any] = {}
    result: Any = None  # of a benchmark
    results: Any = None  # of an evaluation
    output: list[str] = []  # the last lines of a job that failed, or prints its result
    note: str = ""


def read_receipts(folder: Path = ROOT / "benchmarks/receipts") -> dict[str, Receipt]:
    """Return the receipts of a folder by the names of their files."""
    files = sorted(folder.glob("*.json"))
    return {path.name: msgspec.json.decode(path.read_bytes(), type=Receipt) for path in files}


def write_receipt(receipt: Receipt, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(receipt), indent=1) + b"\n")


def cell_of(command: Sequence[str]) -> Cell | None:
    """Return what a command trains, or None when it runs no recipe that trains."""
    names = [Path(word).stem for word in command if word.endswith(".py")]
    recipe = next((name for name in names if name in ("sft", "grpo", "distill")), None)
    if recipe is None:
        return None

    def asked(flag: str) -> bool:
        return any(pair == (f"--{flag}", "true") for pair in pairwise(command))

    configs = [Path(word).stem for word in command if word.startswith(CONFIGS)]
    method = "QLoRA" if asked("load_in_4bit") else "LoRA" if asked("use_peft") else "full"
    engine = "vLLM" if asked("use_vllm") else "transformers"
    layout = LAUNCHES.get(configs[0] if configs else "", "single")
    return Cell(recipe, method, engine, layout)  # type: ignore[arg-type]


def run(
    command: Sequence[str], log: Path, seconds: float | None = None, **environment: str
) -> int | Literal["cut"]:
    """Run a command with its output in a file; return its exit code, or "cut" after `seconds`."""
    with open(log, "w") as sink:
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
                cwd=ROOT,
                env=os.environ | environment,
            ).returncode
        except subprocess.TimeoutExpired:
            return "cut"


def record(
    name: str,
    command: Sequence[str],
    log: Path,
    seconds: float | None = None,
    note: str = "",
    **environment: str,
) -> Receipt:
    """Run a command; return its receipt, also when it fails or is cut. Folders become names."""
    started = time.monotonic()
    found = run(command, log, seconds, **environment)
    took = time.monotonic() - started
    receipt = Receipt(
        name=name,
        date=time.strftime("%Y-%m-%d"),
        hardware=hardware(),
        python=platform.python_version(),
        versions=versions(),
        command=text_of(command, log.parent, environment),
        exit=found,
        seconds=round(took, 1),
        cell=cell_of(command),
        note=note,
    )
    metrics = Path(command[-1]) / "metrics.jsonl"
    if "--output_dir" in command and metrics.exists():
        receipt.last_log = last = list(read_rows(metrics))[-1]
        receipt.steps, receipt.loss = last["step"], last.get("loss")
        receipt.tokens_per_second = round(last.get("num_tokens", 0) / took, 1)
    if found != 0 or "--output_dir" not in command:
        lines = log.read_text(errors="replace").splitlines()
        receipt.output = [line for line in lines if "it/s]" not in line][-12:]
    return receipt


def text_of(command: Sequence[str], work: Path, environment: dict[str, str]) -> str:
    """Return a command as one may type it in the repository: places of this machine left out."""
    variables = [f"{key}={value}" for key, value in environment.items()]
    text = " ".join([*variables, shlex.join(command)])
    programs = f"{Path(sys.executable).parent}/"
    places = {sys.executable: "python", programs: "", f"{work}/": "", f"{ROOT}/": ""}
    for place, short in places.items():
        text = text.replace(place, short)
    return text


def hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} ({os.cpu_count()} cores)"


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
