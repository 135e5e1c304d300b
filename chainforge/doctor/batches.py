"""The arithmetic of batches: how many prompts a step has, and what divides what."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from chainforge.core.errors import InputError
from chainforge.doctor.extent import asked, batch
from chainforge.doctor.findings import Context, Finding, Training, of_stage
from chainforge.train.checkpoints import check_save_steps


def check_batches(context: Context) -> Iterator[Finding]:
    """Check each training stage's batches as TRL will, and say what a step holds."""
    for stage in context.training:
        numbers = [
            key
            for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
            if not isinstance(stage.settings[key], int) or stage.settings[key] < 1
        ]
        if numbers:
            problems = [f"{key}: {stage.settings[key]!r} is no number from 1 on" for key in numbers]
            yield from of_stage("batches", stage.name, problems, "")
        elif stage.recipe == "grpo":
            yield from _groups(stage)
        else:
            what = "rows" if stage.recipe == "sft" else "prompts"
            yield Finding("ok", "batches", f"{batch(stage)} {what} a step", stage.name)


def _groups(stage: Training) -> Iterator[Finding]:
    """Check the batches of GRPO: what is written at once, in groups, for whole batches."""
    settings, processes = stage.settings, stage.layout.processes
    at_once = settings["per_device_train_batch_size"] * processes
    group, learnt = settings["num_generations"], batch(stage)
    given, steps = settings["generation_batch_size"], settings["steps_per_generation"]
    if given and steps:
        text = "generation_batch_size and steps_per_generation: give one of them"
        yield Finding("error", "batches", text, stage.name)
        return
    written = int(given or (at_once * int(steps) if steps else learnt))
    problems = []
    if group < 2:
        problems.append(f"num_generations: {group}: a group needs 2 to compare, better 8 or more")
    elif written % group:
        near = _nearest(settings, processes, group)
        problems.append(
            f"{written} completions are written at once, which num_generations, {group}, does not "
            f"divide: {near}"
        )
    if written % at_once:
        whole = max(1, written // at_once) * at_once
        problems.append(
            f"generation_batch_size: {written} does not hold whole batches of {at_once} "
            f"(per_device_train_batch_size x {processes} processes): write {whole}"
        )
    prompts = written // group if group else 0
    rows = asked(stage.step.given)
    if not problems and rows is not None and rows < prompts:
        problems.append(
            f"{rows} prompts are fewer than the {prompts} that are written for at once: TRL would "
            "end without a step; raise the tasks' size, or lower the batch"
        )
    try:
        check_save_steps(SimpleNamespace(**settings, eval_steps=None, eval_strategy="no"))
    except InputError as error:
        problems.append(str(error))
    fine = f"{learnt} completions a step, of {max(1, learnt // max(group, 1))} prompts"
    yield from of_stage("batches", stage.name, problems, fine)


def _nearest(settings: dict[str, Any], processes: int, group: int) -> str:
    """Suggest the batch next in size that groups go into."""
    steps, size = settings["gradient_accumulation_steps"], settings["per_device_train_batch_size"]
    for more in range(group):
        for near in (size + more, size - more):
            if near > 0 and near * processes * steps % group == 0:
                return f"write per_device_train_batch_size: {near}"
    return f"make per_device_train_batch_size x {processes} processes a multiple of it"
