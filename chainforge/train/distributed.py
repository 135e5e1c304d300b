"""How a stage is spread over processes, and which ways of training cannot work with it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from chainforge.core.errors import InputError

SINGLE, DDP, FSDP2, ZERO2, ZERO3 = "single", "ddp", "fsdp2", "zero2", "zero3"
LAYOUTS = {SINGLE: "single", DDP: "DDP", FSDP2: "FSDP2", ZERO2: "ZeRO-2", ZERO3: "ZeRO-3"}
LESS_MEMORY = (
    "change, in this order: `gradient_checkpointing: true`; half of per_device_train_batch_size "
    "with twice gradient_accumulation_steps; a smaller max_length or max_completion_length; "
    "`use_peft: true`; `load_in_4bit: true`"
)
NO_MODEL = "zero3_save_16bit_model: only with true can the weights be gathered to be saved"


@dataclass(frozen=True)
class Layout:
    """The processes of a stage, and which state each of them holds whole.

    `kind` is single, ddp, fsdp1, fsdp2, zero1, zero2 or zero3. `whole_model` is False when the
    weights cannot be gathered to be saved.
    """

    kind: str = SINGLE
    processes: int = 1
    machines: int = 1
    on_cpu: bool = False
    offload_parameters: bool = False
    offload_optimizer: bool = False
    whole_model: bool = True

    @property
    def shards_weights(self) -> bool:
        """Return whether each process holds only a part of the weights."""
        return self.kind in ("fsdp1", FSDP2, ZERO3)

    @property
    def shards_optimizer(self) -> bool:
        """Return whether each process holds only a part of the optimizer's state."""
        return self.shards_weights or self.kind in ("zero1", ZERO2)


def layout_here(environment: Mapping[str, str] = os.environ) -> Layout:
    """Return the layout that the launcher started this process in."""
    processes = int(environment.get("WORLD_SIZE", "1"))
    kind = DDP
    if truth(environment.get("ACCELERATE_USE_FSDP")):
        kind = f"fsdp{environment.get('FSDP_VERSION', '1')}"
    elif truth(environment.get("ACCELERATE_USE_DEEPSPEED")):
        kind = f"zero{environment.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    saves = truth(environment.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"))
    return Layout(
        kind=kind if processes > 1 else SINGLE,
        processes=processes,
        machines=max(1, processes // int(environment.get("LOCAL_WORLD_SIZE", str(processes)))),
        whole_model=kind != ZERO3 or saves,
    )


def truth(value: Any) -> bool:
    """Return whether a text means yes, as accelerate reads it."""
    return str(value).lower() in ("true", "1", "yes", "on")


# Why these cannot work: see the table in docs/distributed.md, which a test compares with them.
_FSDP_4BIT = "FSDP 2 cannot shard 4-bit weights (accelerate#3983); launch with ddp, zero2 or zero3"
_VLLM_4BIT = (
    "use_vllm: an adapter does not merge into the 4-bit weights that TRL would send (trl#4973); "
    "leave it out, or use LoRA on the unquantised base"
)


def refusals(settings: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """Yield each reason why a stage cannot work as launched, with what to change."""
    four, eight, vllm = (settings.get(key) for key in ("load_in_4bit", "load_in_8bit", "use_vllm"))
    quantised, zero3 = four or eight, layout.kind == ZERO3
    if quantised and not settings["use_peft"]:
        yield "load_in_4bit: quantised weights cannot be trained; add `use_peft: true` (QLoRA)"
    if quantised and layout.kind == FSDP2:
        yield _FSDP_4BIT
    elif quantised and vllm:
        yield _VLLM_4BIT
    elif eight and zero3:
        yield "load_in_8bit: ZeRO-3 cannot shard bytes; use load_in_4bit, or launch with zero2"
    elif four and zero3 and settings["bnb_4bit_quant_storage"] != settings["dtype"]:
        yield "bnb_4bit_quant_storage: under ZeRO-3 set it to the model's dtype, such as bfloat16"
    if vllm and (settings["use_cpu"] or layout.on_cpu):
        yield "use_vllm: TRL feeds vLLM on GPUs only; leave it out on the CPU"
    if layout.kind in (FSDP2, ZERO2, ZERO3) and settings["use_cpu"]:
        yield f"use_cpu: {LAYOUTS[layout.kind]} runs as plain DDP on the CPU; launch with cpu_ddp"
    if not layout.whole_model:
        yield NO_MODEL


def check_supported(
    training_args: Any, model_args: Any, environment: Mapping[str, str] = os.environ
) -> None:
    """Raise `InputError` for a stage that cannot work as it was launched.

    To be called before anything is loaded, with TRL's parsed configurations.
    """
    settings, layout = vars(training_args) | vars(model_args), layout_here(environment)
    for reason in refusals(settings, layout):
        raise InputError(reason)
    if layout.processes != getattr(training_args, "world_size", layout.processes):
        raise InputError(
            f"{layout.processes} processes were launched, but each would train alone on all of the "
            "data: on the CPU the stage needs `use_cpu: true`"
        )
    if settings.get("use_vllm") and importlib.util.find_spec("vllm") is None:
        raise InputError("use_vllm: vLLM is not installed; pip install 'trl[vllm]'")
