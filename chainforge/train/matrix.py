"""Which ways of training go with which ways of spreading it, and which cannot.

One table decides: the recipes refuse what it refuses before a model is loaded, `chainforge doctor`
says so for a whole chain, and the README's table is printed from it (a test compares them).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from chainforge.core.errors import InputError
from chainforge.train.layout import DDP, FSDP2, NO_MODEL, SINGLE, ZERO2, ZERO3, Layout, layout_here
from chainforge.train.settings import of_objects

METHODS = ("full", "LoRA", "QLoRA")
LAYOUTS = {SINGLE: "single", DDP: "DDP", FSDP2: "FSDP2", ZERO2: "ZeRO-2", ZERO3: "ZeRO-3"}
ENGINES = ("transformers", "vLLM")
FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Cell:
    """What is known of one combination.

    `run`: a test here runs it. `configured`: everything is set up for it, but nobody ran it here;
    `note` says who has, or what to beware of. `refused`: it cannot work, for the reason in `note`.
    """

    state: Literal["run", "configured", "refused"]
    note: str = ""


RUN = Cell("run")
BY_TRL = Cell("configured", "TRL's own tests run SFT and GRPO this way on two GPUs")
SFT_BY_TRL = Cell(
    "configured", "TRL's own tests run SFT this way on two GPUs; nobody's tests are known for GRPO"
)
CONFIGURED = Cell("configured")
STORAGE = Cell(
    "configured", "with bnb_4bit_quant_storage set to the model's dtype (PEFT's guide to DeepSpeed)"
)
FSDP_4BIT = Cell(
    "refused",
    "FSDP 2 cannot shard 4-bit weights: stored as bytes they stay whole on every GPU, stored as "
    "floats they lose their scales (accelerate#3983, #3874, axolotl#2992). Launch with ddp or "
    "zero2, where each GPU holds the 4-bit base, or with zero3",
)
VLLM_4BIT = Cell(
    "refused",
    "An adapter does not merge into the 4-bit weights that TRL would send: vLLM refuses their "
    "shape, or samples from rounded ones (trl#4973, #3466). Leave use_vllm out, or use LoRA on the "
    "unquantised base",
)
GATHERS = Cell("configured", "each sync gathers the whole model on every GPU (trl#3133)")
MERGES = Cell("configured", "TRL merges the adapter in sharded weights, and doubts it in a comment")

MATRIX: dict[tuple[str, str], tuple[Cell, Cell]] = {
    # method, layout: generation by transformers (and SFT), generation by vLLM
    ("full", SINGLE): (RUN, CONFIGURED),
    ("full", DDP): (RUN, CONFIGURED),
    ("full", FSDP2): (BY_TRL, CONFIGURED),
    ("full", ZERO2): (BY_TRL, CONFIGURED),
    ("full", ZERO3): (BY_TRL, CONFIGURED),
    ("LoRA", SINGLE): (RUN, CONFIGURED),
    ("LoRA", DDP): (RUN, CONFIGURED),
    ("LoRA", FSDP2): (SFT_BY_TRL, MERGES),
    ("LoRA", ZERO2): (SFT_BY_TRL, CONFIGURED),
    ("LoRA", ZERO3): (SFT_BY_TRL, GATHERS),
    ("QLoRA", SINGLE): (RUN, VLLM_4BIT),
    ("QLoRA", DDP): (CONFIGURED, VLLM_4BIT),
    ("QLoRA", FSDP2): (FSDP_4BIT, FSDP_4BIT),
    ("QLoRA", ZERO2): (CONFIGURED, VLLM_4BIT),
    ("QLoRA", ZERO3): (STORAGE, VLLM_4BIT),
}


def method_of(settings: Mapping[str, Any]) -> str:
    """Name the way of training that a recipe's settings ask for."""
    if settings["load_in_4bit"] or settings["load_in_8bit"]:
        return "QLoRA"
    return "LoRA" if settings["use_peft"] else "full"


def cell_of(settings: Mapping[str, Any], layout: Layout) -> Cell | None:
    """Return the cell that a recipe falls into; None for a layout that the table does not have."""
    cells = MATRIX.get((method_of(settings), layout.kind))
    return cells[bool(settings.get("use_vllm"))] if cells else None


def refusals(settings: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """Return why a recipe cannot work, and what would; nothing when it can."""
    quantised = settings["load_in_4bit"] or settings["load_in_8bit"]
    if settings["load_in_4bit"] and settings["load_in_8bit"]:
        yield "load_in_4bit and load_in_8bit: one of them, not both"
    if quantised and not settings["use_peft"]:
        yield "load_in_4bit: quantised weights cannot be trained; add `use_peft: true` (QLoRA)"
    cell = cell_of(settings, layout)
    if cell is not None and cell.state == "refused":
        yield cell.note
    elif cell is STORAGE and settings["load_in_8bit"]:
        yield "load_in_8bit: ZeRO-3 cannot shard bytes; use load_in_4bit, or launch with zero2"
    elif cell is STORAGE and settings["bnb_4bit_quant_storage"] != settings["dtype"]:
        yield (
            "bnb_4bit_quant_storage: ZeRO-3 shards floating numbers only, all of one kind; set it "
            f"to the model's dtype, `bnb_4bit_quant_storage: {_float(settings['dtype'])}`"
        )
    if settings.get("use_vllm") and (settings["use_cpu"] or layout.on_cpu):
        yield "use_vllm: TRL feeds vLLM on GPUs only; leave it out on the CPU"
    if settings.get("use_vllm") and settings["load_in_8bit"]:
        yield "use_vllm: vLLM has no 8-bit loading; leave load_in_8bit out"
    if layout.kind in (FSDP2, ZERO2, ZERO3) and settings["use_cpu"]:
        yield f"use_cpu: {LAYOUTS[layout.kind]} runs as plain DDP on the CPU; launch with cpu_ddp"
    if not layout.whole_model:
        yield NO_MODEL


def check_supported(
    recipe: str, *configs: Any, environment: Mapping[str, str] = os.environ
) -> None:
    """Refuse, before anything is loaded, a recipe that cannot work where it was launched.

    `configs` are its parsed configurations. Raises `InputError` with the reason.
    """
    settings, layout = of_objects(recipe, *configs), layout_here(environment)
    for reason in refusals(settings, layout):
        raise InputError(reason)
    counted = {getattr(config, "world_size", layout.processes) for config in configs}
    if layout.processes > 1 and counted != {layout.processes}:
        # Each process would train alone on all of the data, and the first one's model be kept.
        raise InputError(
            f"{layout.processes} processes were launched, but each would train alone: on the CPU "
            "the recipe needs `use_cpu: true`"
        )
    if settings.get("use_vllm") and importlib.util.find_spec("vllm") is None:
        raise InputError("use_vllm: vLLM is not installed; pip install '.[vllm]'")


def table() -> str:
    """Return the matrix as the README has it."""
    lines = ["| | " + " | ".join(LAYOUTS.values()) + " |", "|---|" + "---|" * len(LAYOUTS)]
    notes: list[str] = []
    for method in METHODS:
        for number, engine in enumerate(ENGINES):
            cells = [MATRIX[method, layout][number] for layout in LAYOUTS]
            words = [_marked(cell, notes) for cell in cells]
            lines.append(f"| {method}, {engine} | " + " | ".join(words) + " |")
    return "\n".join(
        [
            *lines,
            "",
            *(f"{place}. {note[0].upper()}{note[1:]}." for place, note in enumerate(notes, 1)),
        ]
    )


def _marked(cell: Cell, notes: list[str]) -> str:
    if not cell.note:
        return cell.state
    if cell.note not in notes:
        notes.append(cell.note)
    return f"{cell.state} ({notes.index(cell.note) + 1})"


def _float(dtype: Any) -> str:
    return dtype if dtype in FLOATS else "bfloat16"
