"""What would make a stage fit: settings to change, the one that costs least first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from chainforge.train.architecture import Shape
from chainforge.train.distributed import FSDP2, SINGLE, ZERO2, ZERO3, Layout, method_of, refusals
from chainforge.train.memory import Estimate, estimate

Change = tuple[str, dict[str, Any], Layout]


def remedies(
    recipe: str,
    settings: Mapping[str, Any],
    shape: Shape,
    layout: Layout,
    device_bytes: int,
    **known: Any,
) -> tuple[list[str], Estimate]:
    """Return the changes that make a stage fit, and what it needs with them.

    One change alone where one is enough; else several, added up in the order of what they cost.
    When nothing helps, all of them, and an estimate that is still too large. `known` goes on to
    `estimate`.
    """

    def tried(changed: Mapping[str, Any], where: Layout) -> Estimate:
        return estimate(recipe, changed, shape, where, device_bytes=device_bytes, **known)

    before = set(refusals(settings, layout))  # what is wrong already is no change's fault
    for words, changes, where in _changes(recipe, settings, layout):
        found = tried({**settings, **changes}, where)
        if found.peak <= device_bytes and before.issuperset(
            refusals({**settings, **changes}, where)
        ):
            return [words], found
    added: list[str] = []
    now, at = dict(settings), layout
    found = tried(now, at)
    while found.peak > device_bytes:
        better = None
        for words, changes, where in _changes(recipe, now, at):
            candidate = {**now, **changes}
            if before.issuperset(refusals(candidate, where)):
                new = tried(candidate, where)
                if new.peak < 0.98 * found.peak:
                    better = (words, candidate, where, new)
                    break
        if better is None:
            break
        words, now, at, found = better[0], better[1], better[2], better[3]
        added = [*(word for word in added if word.split(":")[0] != words.split(":")[0]), words]
    return added, found


def _changes(recipe: str, settings: Mapping[str, Any], layout: Layout) -> Iterator[Change]:
    """Yield changes of a recipe: first those that change nothing of what is learnt."""
    method = method_of(settings)
    changes: dict[str, Any]
    if not settings["gradient_checkpointing"]:
        yield "gradient_checkpointing: true", {"gradient_checkpointing": True}, layout
    batch = int(settings["per_device_train_batch_size"])
    steps = int(settings["gradient_accumulation_steps"])
    # TRL writes completions for all steps of one update at once: that number stays the same.
    while batch > 1:
        batch, steps = batch // 2, steps * 2
        words = f"per_device_train_batch_size: {batch} with gradient_accumulation_steps: {steps}"
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        yield words, changes, layout
    if method != "full" and settings["dtype"] == "float32":
        yield "dtype: bfloat16", {"dtype": "bfloat16"}, layout
    if settings.get("use_vllm") and settings["vllm_mode"] == "colocate":
        if not settings["vllm_enable_sleep_mode"]:
            yield "vllm_enable_sleep_mode: true", {"vllm_enable_sleep_mode": True}, layout
        if settings["vllm_gpu_memory_utilization"] > 0.2:
            changes = {"vllm_gpu_memory_utilization": 0.2}
            yield "vllm_gpu_memory_utilization: 0.2", changes, layout
    if recipe == "grpo" and not settings["use_vllm"] and not settings["generation_batch_size"]:
        yield from _fewer_at_once(settings, layout)
    if method == "full" and not str(settings["optim"]).endswith("8bit"):
        yield "optim: adamw_8bit", {"optim": "adamw_8bit"}, layout
    if method == "full" and layout.processes > 1 and not layout.shards_weights:
        yield "launch: fsdp2", {}, replace(layout, kind=FSDP2)
        yield "launch: zero3", {}, replace(layout, kind=ZERO3)
    if method == "full":
        changes = {"use_peft": True, "dtype": "bfloat16"}
        yield "use_peft: true, dtype: bfloat16 (LoRA)", changes, layout
    if method != "QLoRA" and not settings["use_cpu"]:
        where = layout if layout.kind in (SINGLE, ZERO2) else replace(layout, kind="ddp")
        changes = {"use_peft": True, "load_in_4bit": True, "dtype": "bfloat16", "use_vllm": False}
        known = {key: value for key, value in changes.items() if key in settings}
        yield "use_peft: true, load_in_4bit: true, dtype: bfloat16 (QLoRA)", known, where
    if recipe != "sft" and (settings["max_completion_length"] or 0) > 256:
        shorter = int(settings["max_completion_length"]) // 2
        yield f"max_completion_length: {shorter}", {"max_completion_length": shorter}, layout
    elif recipe == "sft" and (settings["max_length"] or 0) > 256:
        shorter = int(settings["max_length"]) // 2
        yield f"max_length: {shorter}", {"max_length": shorter}, layout


def _fewer_at_once(settings: Mapping[str, Any], layout: Layout) -> Iterator[Change]:
    """Yield the change that halves how many completions are written at once."""
    batch = int(settings["per_device_train_batch_size"])
    steps = int(settings["gradient_accumulation_steps"])
    rows, group = batch * steps * layout.processes // 2, int(settings["num_generations"])
    if rows < group or rows % group:
        return
    changes, words = {"generation_batch_size": rows}, f"generation_batch_size: {rows}"
    if steps % 2:  # what is written at once must hold whole batches
        if batch % 2:
            return
        changes |= {
            "per_device_train_batch_size": batch // 2,
            "gradient_accumulation_steps": steps * 2,
        }
        words += (
            f" with per_device_train_batch_size: {batch // 2} and "
            f"gradient_accumulation_steps: {steps * 2}"
        )
    yield words, changes, layout
