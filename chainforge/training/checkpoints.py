"""Find the checkpoint to go on from, and see that going on from it is exact."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"^checkpoint-(\d+)$")


def last_good(directory: Path) -> Path | None:
    """Return the newest whole checkpoint; set newer ones that a kill tore aside, and say so.

    transformers takes the highest number, whole or not, and fails on a torn one.
    """
    if not directory.is_dir():
        return None
    found = [path for path in directory.iterdir() if _NAME.match(path.name)]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        fault = damage(path)
        if fault is None:
            return path
        aside = path.with_name(f"{path.name}.torn")
        number = 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"{path.name}.torn-{number}")
        path.rename(aside)
        logger.warning("%s is not whole (%s): set aside as %s", path, fault, aside.name)
    return None


def damage(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint, or None when it is whole.

    `trainer_state.json` is written last by transformers; the other files are what resuming reads.
    """
    from safetensors import SafetensorError, safe_open

    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json is missing or torn"
    if "global_step" not in state:
        return "trainer_state.json has no global_step"
    weights = list(checkpoint.glob("*.safetensors"))
    sharded = (checkpoint / "pytorch_model_fsdp_0").exists() or any(checkpoint.glob("global_step*"))
    if not weights and not sharded:
        return "it has no weights"
    for path in weights:
        try:
            with safe_open(str(path), "pt") as file:
                file.keys()
        except (SafetensorError, OSError):
            return f"{path.name} is torn"
    if not sharded:
        for name in ("optimizer.pt", "scheduler.pt"):
            path = checkpoint / name
            if not path.exists() or path.stat().st_size == 0:
                return f"{name} is missing or empty"
    if not any(checkpoint.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    return None


def check_save_steps(args: Any) -> None:
    """Refuse checkpoints inside a generation window of GRPO, where resuming is not exact.

    A checkpoint does not hold the completions that are still to be trained on.
    """
    if str(getattr(args.save_strategy, "value", args.save_strategy)) != "steps":
        return
    per_generation = args.steps_per_generation or args.gradient_accumulation_steps
    window = max(1, per_generation * args.num_iterations // args.gradient_accumulation_steps)
    if args.save_steps < 1 or int(args.save_steps) % window:
        below = max(window, int(args.save_steps) // window * window)
        raise InputError(
            f"save_steps: {args.save_steps} falls inside a generation window of {window} steps, "
            f"where a resumed run would differ; use a multiple of {window}, such as {below}"
        )
