"""How much each stage has to do: rows, steps, tokens, from its settings and from what is there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from chainforge.chain.plan import Step
from chainforge.core.artifacts import read_json
from chainforge.core.errors import InputError
from chainforge.core.run_dir import DONE
from chainforge.doctor import material, supply
from chainforge.doctor.findings import Context, NotHere, Training
from chainforge.doctor.lengths import CHUNK, limit_of, whole
from chainforge.train.settings import settings_of

GUESSED_PROMPT = 256  # tokens, where no tokenizer is here to count


def asked(given: Mapping[str, Any]) -> int | None:
    """Return how many rows the tasks of some settings say that they have."""
    tasks = given.get("tasks")
    sizes = [task.get("size") if isinstance(task, dict) else None for task in tasks or [None]]
    numbers = [size for size in sizes if isinstance(size, int)]
    return sum(numbers) if len(numbers) == len(sizes) else None


def prompts(context: Context, step: Step) -> int:
    """Return how many prompts a stage has; raises `NotHere` where nobody can know."""
    known = asked(step.given)
    if known is None:
        known = len(supply.examples(context, step))
    if not known:
        raise NotHere("how many rows there will be is not known")
    return known


def samples(given: Mapping[str, Any], models: int = 1) -> int:
    """Return how many completions a stage that samples writes for each prompt."""
    each = given.get("max_samples") or given.get("num_samples")
    default = 1 if "teacher" in given else 8
    return int(each or default) * max(1, models)


def rows(context: Context, step: Step) -> int:
    """Return how many rows an SFT stage is trained on, at most."""
    number = 0
    for place, name in enumerate(step.stage.data):
        giver = material.step_of(context, name)
        if giver is None:
            parts = supply.learnt_from(context, step)
            number += sum(len(part.rows) for part in parts if part.source == name)
        elif giver.state == DONE and (giver.directory / "funnel.json").is_file():
            number += int(read_json(giver.directory / "funnel.json")["kept"])
        elif giver.stage.recipe == "collect":
            number += prompts(context, giver) * samples(giver.given | {"teacher": ""})
        elif giver.stage.recipe == "reject" and giver.stage.model:
            number += prompts(context, giver) * int(giver.given.get("max_per_prompt", 1))
        else:
            raise NotHere(f"how many rows data.{place} will have is not known")
    return number


def steps(context: Context, stage: Training) -> int:
    """Return how many optimizer steps a training stage takes, at most."""
    given = material.training_of(context, stage.step)
    if int(given["max_steps"]) > 0:
        return int(given["max_steps"])
    if stage.recipe == "sft":
        each = rows(context, stage.step)
    else:
        each = prompts(context, stage.step) * int(given.get("num_generations") or 1)
    return math.ceil(float(given["num_train_epochs"]) * each / batch(stage))


def batch(stage: Training) -> int:
    """Return the rows, or completions, of one optimizer step."""
    settings = stage.settings
    size = int(settings["per_device_train_batch_size"]) * stage.layout.processes
    return max(1, size * int(settings["gradient_accumulation_steps"]))


def tokens(context: Context, step: Step) -> tuple[float, float]:
    """Return a row's tokens in the mean: of the prompt, and of what is written, at most."""
    if step.stage.recipe == "sft":
        limit = material.training_of(context, step).get("max_length") or 1024
        try:
            parts = [part for part in supply.learnt_from(context, step) if part.real]
            found = [row for part in parts for row in part.rows]
            tokenizer = material.tokenizer(context, step.stage.model or "", step)
            sizes = whole(tokenizer, _some(found)) if found else [limit]
            return sum(sizes) / len(sizes), 0.0
        except (InputError, NotHere):
            return float(limit), 0.0
    limit = float(limit_of(step))
    try:
        tokenizer = material.tokenizer(context, material.sampled(step), step)
        sizes = material.prompt_tokens(tokenizer, _some(supply.examples(context, step)))
        return sum(sizes) / len(sizes), limit
    except (InputError, NotHere):
        return float(GUESSED_PROMPT), limit


def _some(found: list[Any]) -> list[Any]:
    """Return rows from all over, as many as are counted at once."""
    return found[:: 1 + len(found) // CHUNK]


def work(step: Step, given: Mapping[str, Any], done_steps: int | None) -> float | None:
    """Return a stage's work in rows, by some settings of it; None where they do not say."""
    if done_steps is not None:
        settings = settings_of(step.stage.recipe, given)
        size = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
        return float(done_steps * size)
    number = asked(given)
    return None if number is None else float(number * samples(given))
