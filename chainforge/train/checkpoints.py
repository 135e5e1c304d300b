"""Checkpoints that count only when they are whole, and settings that allow an exact resume.

transformers resumes from the checkpoint with the highest number, even if its optimizer is missing
or its weights have a flipped bit. Here a checkpoint counts once it contains `sealed.json`, which is
written last and has the SHA-256 of every other file.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import read_json, sha256, sign_for, write_json
from chainforge.core.errors import InputError
from chainforge.core.jsonl import to_disk

logger = logging.getLogger(__name__)

SEAL = "sealed.json"
DAMAGED = "damaged-"
# Settings under which an interrupted run cannot resume exactly, or that a recipe overwrites.
REFUSED = {
    "save_only_model": "a run cannot resume without the optimizer's state; remove this setting",
    "ignore_data_skip": "a resumed run would read the data from the start; remove this setting",
    "reward_weights": "remove this setting; each entry of `rewards` has a weight",
    "resume_from_checkpoint": "remove this setting; a stage resumes from its last whole checkpoint",
}


def seal(checkpoint: Path) -> None:
    """Force a checkpoint to disk and write the hash of every file; from now on it counts."""
    files, _ = sign_for(checkpoint, [name for name in _files(checkpoint) if name != SEAL])
    write_json(checkpoint / SEAL, {"files": files})
    to_disk(checkpoint.parent)


def is_sealed(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end."""
    return (checkpoint / SEAL).is_file()


def last_good(directory: Path, processes: int = 1) -> Path | None:
    """Return the newest whole checkpoint; rename newer ones that are damaged, with a warning.

    Raises `InputError` when it was written by another number of processes, which would continue
    with other batches and other random numbers.
    """
    for path in reversed(_all(directory)):
        fault = damage(path)
        if fault is None:
            made_by = max(1, len(list(path.glob("rng_state_*.pth"))))
            if made_by != processes:
                raise InputError(
                    f"{path} was made by {made_by} processes, and this run has {processes}: launch "
                    f"{made_by}, or delete {directory} to start from the beginning"
                )
            return path
        renamed = path.with_name(f"{DAMAGED}{path.name}")
        shutil.rmtree(renamed, ignore_errors=True)
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
        sealed = read_json(checkpoint / SEAL).get("files")
    except InputError:
        sealed = None
    if not isinstance(sealed, dict):
        return f"{SEAL} is not readable"
    for name in sorted({*_files(checkpoint), *sealed} - {SEAL}):
        if not (checkpoint / name).is_file() or sha256(checkpoint / name) != sealed.get(name):
            return f"{name} has changed since it was written"
    best = read_json(checkpoint / "trainer_state.json").get("best_model_checkpoint")
    if best and Path(best).name != checkpoint.name:
        fault = damage(checkpoint.with_name(Path(best).name))
        return f"the best checkpoint before it, {Path(best).name}: {fault}" if fault else None
    return None


def rotate(directory: Path, limit: int | None, best: str | None) -> None:
    """Remove damaged checkpoints, and all but the newest `limit` whole ones and the best one.

    Call it after the newest is sealed. transformers' own rotation comes before that, so it may
    remove the only whole one.
    """
    old = list(directory.glob(f"{DAMAGED}*"))
    if limit:
        whole = [path for path in _all(directory) if is_sealed(path)]
        keep = {path.name for path in whole[-limit:]} | {Path(best).name if best else ""}
        old += [path for path in _all(directory) if path.name not in keep]
    for path in old:
        (path / SEAL).unlink(missing_ok=True)  # a removal that is interrupted leaves none
        shutil.rmtree(path, ignore_errors=True)


def remove_unsealed(directory: Path) -> Path | None:
    """Remove checkpoints that were not written to their end; return the newest of them."""
    unsealed = [path for path in _all(directory) if not is_sealed(path)]
    for path in unsealed:
        shutil.rmtree(path, ignore_errors=True)
    return unsealed[-1] if unsealed else None


def _all(directory: Path) -> list[Path]:
    """Return the checkpoints of a directory, in the order of their steps."""
    found = [path for path in directory.glob("checkpoint-*") if re.search(r"-\d+$", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _files(checkpoint: Path) -> list[str]:
    files = (path for path in checkpoint.rglob("*") if path.is_file())
    return [path.relative_to(checkpoint).as_posix() for path in files]


def check_saving(args: Any) -> None:
    """Raise `InputError` for settings under which an interrupted run cannot resume exactly."""
    for name, why in REFUSED.items():
        if getattr(args, name, None):
            raise InputError(f"{name}: {why}")
    if args.save_strategy == "best":
        raise InputError("save_strategy: best: use heldout_size with keep_best: true instead")
    steps = window(args)
    # A checkpoint does not have the completions that are still to be trained on.
    if steps > 1 and args.save_strategy == "steps" and args.save_steps % steps:
        raise InputError(
            f"save_steps: {args.save_steps} falls inside a generation window of {steps} steps "
            "(steps_per_generation x num_iterations / gradient_accumulation_steps), where a "
            f"resumed run would differ; use a multiple of {steps}"
        )


def window(args: Any) -> int:
    """Return how many steps train on one generation; a resume is exact between two of them.

    Raises `InputError` for settings of GRPO with which steps and generations do not end together.
    """
    if not hasattr(args, "num_iterations"):
        return 1
    accumulated = args.gradient_accumulation_steps
    used = (args.steps_per_generation or accumulated) * args.num_iterations
    if used % accumulated and accumulated % used:
        raise InputError(
            f"gradient_accumulation_steps ({accumulated}) and steps_per_generation x num_iterations"
            f" ({used}): one must be a multiple of the other, or a step trains on two generations"
        )
    return int(max(1, used // accumulated))
