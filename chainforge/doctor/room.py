"""What the stages will write, against what is free on the disk that they write to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

from chainforge.chain.plan import Step
from chainforge.core.disk import size_in_words
from chainforge.core.errors import InputError
from chainforge.core.run_dir import DONE
from chainforge.doctor import extent, material
from chainforge.doctor.findings import Context, Finding, NotHere, Training
from chainforge.train.architecture import DTYPES
from chainforge.train.distributed import method_of
from chainforge.train.saving import KEPT

TIGHT = 0.8  # of what is free
STATES = 2  # numbers that Adam keeps for each that is trained
BYTES_A_TOKEN = 8  # of a completion in samples.jsonl, with what is said of it


def check_disk(context: Context) -> Iterator[Finding]:
    """Add up models, checkpoints and rows of the stages that are not done."""
    if not context.steps:
        return
    folder = next(p for p in (context.steps[0].directory, *context.steps[0].directory.parents)
                  if p.is_dir())  # fmt: skip
    free = shutil.disk_usage(folder).free
    kept, peak, unknown = 0, 0, []
    sizes: dict[str, int] = {}
    for step in context.steps:
        if step.state == DONE:
            continue
        try:
            during, after = _of(step, context)
        except (InputError, NotHere, TypeError, ValueError, KeyError):
            unknown.append(step.stage.name)
            continue
        sizes[step.stage.name] = during
        peak = max(peak, kept + during)
        kept += after
    if not sizes and not unknown:
        yield Finding("ok", "disk", f"nothing is left to write, {size_in_words(free)} are free")
        return
    words = f"{size_in_words(peak)} will be written at most, {size_in_words(free)} are free"
    if unknown:
        words += f"; not known of {', '.join(unknown)}"
    data = {"free": free, "peak": peak, "stages": sizes}
    if peak <= TIGHT * free:
        yield Finding("ok", "disk", words, None, data)
        return
    largest = max(sizes, key=lambda name: sizes[name])
    text = (
        f"{words}: {size_in_words(sizes[largest])} of it by {largest}; there set "
        "`save_total_limit: 2`, a larger save_steps, and `save: [model]`; or give --runs another "
        "disk"
    )
    yield Finding("error" if peak > free else "warning", "disk", text, largest, data)


def _of(step: Step, context: Context) -> tuple[int, int]:
    """Return the bytes that a stage holds while it runs, and once it is done."""
    stage = context.trained(step)
    if stage is not None:
        return _of_training(stage, context)
    recipe = step.stage.recipe
    if recipe not in ("collect", "reject", "evaluate") or "pool" in step.given:
        return 0, 0
    rows = extent.prompts(context, step) * extent.samples(step.given, len(step.stage.models))
    prompt, written = extent.tokens(context, step)
    size = int(rows * (prompt + written) * BYTES_A_TOKEN)
    return size, size


def _of_training(stage: Training, context: Context) -> tuple[int, int]:
    shape = context.shape(stage.step.stage.model or "")
    if isinstance(shape, str):
        raise NotHere(shape)
    given, settings = material.training_of(context, stage.step), stage.settings
    dtype = shape.dtype if settings["dtype"] == "auto" else settings["dtype"]
    size = DTYPES.get(str(dtype), 4)
    # It is trained in one precision, and saved in that of its base.
    model, trained = shape.parameters * DTYPES.get(str(shape.dtype), 4), shape.parameters
    if method_of(settings) != "full":
        trained = shape.adapter(settings["lora_r"], settings["lora_target_modules"])
    checkpoint = trained * size * (1 + STATES)
    number = _checkpoints(stage, context, given)
    kept = stage.step.given.get("save", KEPT)
    adapter = trained * size if trained != shape.parameters else 0
    during = model + adapter + number * checkpoint
    return during, model + adapter + (number * checkpoint if "checkpoints" in kept else 0)


def _checkpoints(stage: Training, context: Context, given: dict[str, Any]) -> int:
    """Return how many checkpoints lie there at a time."""
    strategy = str(getattr(given["save_strategy"], "value", given["save_strategy"]))
    if strategy == "no":
        return 0
    steps = extent.steps(context, stage)
    every = float(given["save_steps"])
    every = max(1.0, every * steps if every < 1 else every)
    number = int(steps // every if strategy == "steps" else given["num_train_epochs"]) + 1
    limit = given["save_total_limit"]
    return min(number, limit + 1) if limit else number
