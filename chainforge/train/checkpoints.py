"""Checkpoints that count only when they are whole, and settings that allow an exact resume.

transformers resumes from the checkpoint with the highest number, even if its optimizer is missing
or its weights have a flipped bit. Here a checkpoint counts once it contains `sealed.json`, which is
written last and has the SHA-256 of every other file.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from chainforge.core import disk
from chainforge.core.artifacts import read_json, sha256, write_json
from chainforge.core.errors import InputError

logger = logging.getLogger(__name__)

SEAL = "sealed.json"
DAMAGED = "damaged-"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(checkpoint: Path) -> None:
    """Write the hash of every file of a checkpoint; from now on it counts.

    Every file is forced to disk first, so that not even a power cut leaves a seal without them.
    """
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    names = [str(path.relative_to(checkpoint)) for path in paths]
    files = dict(zip(names, _digests(paths, to_disk=True), strict=True))
    for folder in {checkpoint, *(path.parent for path in paths)}:
        disk.to_disk(folder)
    write_json(checkpoint / SEAL, {"files": files})
    disk.to_disk(checkpoint.parent)


def is_sealed(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end."""
    return (checkpoint / SEAL).is_file()


def last_good(directory: Path, processes: int = 1) -> Path | None:
    """Return the newest whole checkpoint; rename newer ones that are damaged, with a warning.

    Raises `InputError` when it was written by another number of processes, which would continue
    with other batches and other random numbers.
    """
    newest_first = _all(directory)[::-1]
    for path in newest_first:
        fault = damage(path)
        if fault is None:
            _check_processes(path, processes)
            return path
        if path is newest_first[0]:
            remove_damaged(directory)  # of earlier runs, each as large as a checkpoint
        renamed = path.with_name(f"{DAMAGED}{path.name}")
        path.rename(renamed)
        logger.warning("%s is not whole (%s): renamed to %s", path, fault, renamed.name)
    return None


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None when it is whole.

    The best checkpoint so far, which a run may end with, must be whole too.
    """
    if not is_sealed(checkpoint):
        return f"it was not written to its end: it has no {SEAL}"
    try:
        files = read_json(checkpoint / SEAL)["files"]
        for name in files:
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
        found = _digests([checkpoint / name for name in files])
        for (name, digest), other in zip(files.items(), found, strict=True):
            if digest != other:
                return f"{name} has changed since it was written"
        state = read_json(checkpoint / "trainer_state.json")
        best = state.get("best_model_checkpoint")
    except (InputError, KeyError, AttributeError, TypeError, OSError):
        return f"{SEAL} is not readable"
    if best and Path(best).name != checkpoint.name:
        fault = damage(checkpoint.with_name(Path(best).name))
        return f"the best checkpoint before it, {Path(best).name}: {fault}" if fault else None
    return None


def rotate(directory: Path, limit: int | None, best: str | None) -> None:
    """Remove all but the newest `limit` whole checkpoints and the best one.

    Call it after the newest is sealed. transformers' own rotation comes before that, so it may
    remove the only whole one.
    """
    if not limit:
        return
    whole = [path for path in _all(directory) if is_sealed(path)]
    keep = {path.name for path in whole[-limit:]} | {Path(best).name if best else ""}
    for path in _all(directory):
        if path.name not in keep:
            (path / SEAL).unlink(missing_ok=True)  # a removal that is interrupted leaves none
            shutil.rmtree(path, ignore_errors=True)


def remove_unsealed(directory: Path) -> Path | None:
    """Remove checkpoints that were not written to their end; return the newest of them."""
    unsealed = [path for path in _all(directory) if not is_sealed(path)]
    for path in unsealed:
        shutil.rmtree(path, ignore_errors=True)
    return unsealed[-1] if unsealed else None


def remove_damaged(directory: Path) -> None:
    """Remove what `last_good` renamed."""
    for path in directory.glob(f"{DAMAGED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _all(directory: Path) -> list[Path]:
    """Return the checkpoints of a directory, in the order of their steps."""
    names = os.listdir(directory) if directory.is_dir() else []
    numbered = [(int(match[1]), name) for name in names if (match := _NAME.fullmatch(name))]
    return [directory / name for _, name in sorted(numbered)]


def _digests(paths: list[Path], to_disk: bool = False) -> list[str]:
    """Return the SHA-256 of each file, several at a time; force them to disk if asked to."""

    def digest(path: Path) -> str:
        if to_disk:
            disk.to_disk(path)
        return sha256(path)

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(digest, paths))


def _check_processes(checkpoint: Path, processes: int) -> None:
    made_by = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    if made_by != processes:
        raise InputError(
            f"{checkpoint} was made by {made_by} processes, and this run has {processes}, so it "
            f"would not resume exactly. Launch {made_by} processes, or delete {checkpoint.parent} "
            "to start from the beginning"
        )


def check_saving(args: Any) -> None:
    """Raise `InputError` for settings under which an interrupted run cannot resume exactly."""
    for name, why in {
        "save_only_model": "leaves out the optimizer, so a run could not resume",
        "ignore_data_skip": "starts the data from the beginning when a run resumes",
    }.items():
        if getattr(args, name, False):
            raise InputError(f"{name}: it {why}; leave it out")
    if getattr(args, "resume_from_checkpoint", None):
        raise InputError(
            "resume_from_checkpoint: leave it out; a stage resumes from its last whole checkpoint"
        )
    check_save_steps(args)


def check_save_steps(args: Any) -> None:
    """Refuse checkpoints inside a generation window of GRPO, where a resume is not exact.

    A checkpoint does not have the completions that are still to be trained on.
    """
    steps = window(args)
    if steps == 1:
        return
    strategy = _word(args.save_strategy)
    key = {"steps": "save_steps", "best": "eval_steps"}.get(strategy)
    if key is None or (strategy == "best" and _word(args.eval_strategy) != "steps"):
        return  # the end of an epoch is the end of a window
    value = getattr(args, key) or 0
    if value < 1 or int(value) % steps:
        near = max(steps, int(value) // steps * steps)
        raise InputError(
            f"{key}: {value} falls inside a generation window of {steps} steps, where a resumed "
            f"run would differ (steps_per_generation {args.steps_per_generation} x num_iterations "
            f"{args.num_iterations} / gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps}); use a multiple of {steps}, such as {near}"
        )


def window(args: Any) -> int:
    """Return how many steps train on one generation; a resume is exact between two of them.

    1 where a generation is used within one step. Raises `InputError` for settings of GRPO with
    which steps and generations do not end together.
    """
    if not hasattr(args, "num_iterations"):
        return 1
    accumulated = args.gradient_accumulation_steps
    used = (args.steps_per_generation or accumulated) * args.num_iterations
    if used % accumulated and accumulated % used:
        raise InputError(
            f"gradient_accumulation_steps ({accumulated}) and steps_per_generation x num_iterations"
            f" ({used}): neither divides the other, so a step may train on two generations and an "
            "interrupted run could not resume exactly; make one a multiple of the other"
        )
    return int(max(1, used // accumulated))


def _word(strategy: Any) -> str:
    return str(getattr(strategy, "value", strategy))
