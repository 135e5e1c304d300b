"""How a stage is spread over processes, as a launch file or the launcher of this process says.

accelerate checks the outermost keys of a launch file only; what stands in `fsdp_config` and
`deepspeed_config` is taken as it is, and a misspelt key is forgotten. Here it is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError, hint
from chainforge.core.yaml12 import read_yaml

# accelerate 1.15: the fields of ClusterConfig, and the options of `accelerate launch` that the
# nested keys become. A test holds them to what is installed.
# fmt: off
KEYS = {
    "command_file", "commands", "compute_environment", "debug", "deepspeed_config",
    "distributed_type", "downcast_bf16", "dynamo_config", "enable_cpu_affinity", "fp8_config",
    "fsdp_config", "gpu_ids", "machine_rank", "main_process_ip", "main_process_port",
    "main_training_function", "megatron_lm_config", "mixed_precision", "mpirun_config",
    "num_machines", "num_processes", "parallelism_config", "rdzv_backend", "same_network",
    "tpu_env", "tpu_name", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "tpu_zone", "use_cpu",
}
FSDP_KEYS = {
    "fsdp_activation_checkpointing", "fsdp_activation_checkpointing_offload",
    "fsdp_auto_wrap_policy", "fsdp_backward_prefetch", "fsdp_cpu_ram_efficient_loading",
    "fsdp_forward_prefetch", "fsdp_min_num_params", "fsdp_offload_params",
    "fsdp_reshard_after_forward", "fsdp_sharding_strategy", "fsdp_state_dict_type",
    "fsdp_sync_module_states", "fsdp_transformer_layer_cls_to_wrap", "fsdp_use_orig_params",
    "fsdp_version",
}
DEEPSPEED_KEYS = {
    "deepspeed_config_file", "deepspeed_exclusion_filter", "deepspeed_hostfile",
    "deepspeed_inclusion_filter", "deepspeed_moe_layer_cls_names", "deepspeed_multinode_launcher",
    "gradient_accumulation_steps", "gradient_clipping", "offload_optimizer_device",
    "offload_optimizer_nvme_path", "offload_param_device", "offload_param_nvme_path",
    "zero3_init_flag", "zero3_save_16bit_model", "zero_stage",
}
# fmt: on
# Keys of FSDP 1 that FSDP 2 has no use for, and the one that it refuses.
FSDP1_ONLY = (
    "fsdp_backward_prefetch",
    "fsdp_forward_prefetch",
    "fsdp_sharding_strategy",
    "fsdp_sync_module_states",
    "fsdp_use_orig_params",
)
SEVERAL = {"MULTI_GPU", "FSDP", "DEEPSPEED"}  # what accelerate starts several processes for
SINGLE, DDP, FSDP2, ZERO2, ZERO3 = "single", "ddp", "fsdp2", "zero2", "zero3"


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
        """Whether each process holds only a part of the weights."""
        return self.kind in ("fsdp1", FSDP2, ZERO3)

    @property
    def shards_optimizer(self) -> bool:
        """Whether each process holds only a part of the optimizer's state."""
        return self.shards_weights or self.kind in ("zero1", ZERO2)


def layout_of(file: str | Path | None) -> Layout:
    """Return the layout that a launch file asks for; one process without a file."""
    if file is None:
        return Layout()
    given = read_yaml(file)
    kind = str(given.get("distributed_type", "NO")).upper()
    fsdp, zero = _section(given, "fsdp_config"), _section(given, "deepspeed_config")
    name = {"MULTI_GPU": DDP, "MULTI_CPU": DDP}.get(kind, SINGLE)
    if kind == "FSDP":
        name = f"fsdp{fsdp.get('fsdp_version', 1)}"
    elif kind == "DEEPSPEED":
        name = f"zero{zero.get('zero_stage', 2)}"
    processes = int(given.get("num_processes", 1)) if kind in SEVERAL else 1
    return Layout(
        kind=name if processes > 1 else SINGLE,
        processes=processes,
        machines=int(given.get("num_machines", 1)),
        on_cpu=_true(given.get("use_cpu")),
        offload_parameters=_true(fsdp.get("fsdp_offload_params"))
        or zero.get("offload_param_device") in ("cpu", "nvme"),
        offload_optimizer=_true(fsdp.get("fsdp_offload_params"))
        or zero.get("offload_optimizer_device") in ("cpu", "nvme"),
        whole_model=name != ZERO3 or _true(zero.get("zero3_save_16bit_model")),
    )


def layout_here(environment: Mapping[str, str] = os.environ) -> Layout:
    """Return the layout that the launcher started this process in."""
    processes = int(environment.get("WORLD_SIZE", "1"))
    name = DDP if processes > 1 else SINGLE
    if _true(environment.get("ACCELERATE_USE_FSDP")):
        name = f"fsdp{environment.get('FSDP_VERSION', '1')}"
    elif _true(environment.get("ACCELERATE_USE_DEEPSPEED")):
        name = f"zero{environment.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return Layout(
        kind=name if processes > 1 else SINGLE,
        processes=processes,
        machines=max(1, processes // int(environment.get("LOCAL_WORLD_SIZE", str(processes)))),
        whole_model=name != ZERO3
        or _true(environment.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL")),
    )


def faults(file: str | Path) -> Iterator[str]:
    """Return what is wrong with a launch file, and what to write instead."""
    given = read_yaml(file)
    nested = {"fsdp_config": FSDP_KEYS, "deepspeed_config": DEEPSPEED_KEYS}
    sections = [("", given, KEYS)]
    sections += [(f"{name}: ", _section(given, name), known) for name, known in nested.items()]
    for where, section, known in sections:
        for key in section:
            if key not in known:
                yield f"{where}unknown key {key!r}; {hint(str(key), known)}"
    kind = str(given.get("distributed_type", "")).upper()
    if not kind:
        yield "distributed_type is missing: NO, MULTI_GPU, FSDP or DEEPSPEED"
    processes, machines = given.get("num_processes", 1), given.get("num_machines", 1)
    if kind not in SEVERAL and processes != 1 and not given.get("mpirun_config"):
        yield (
            f"num_processes: {processes} with distributed_type {kind or 'NO'}: accelerate starts "
            "one process and says nothing; write MULTI_GPU, with use_cpu: true for the CPU"
        )
    if processes % machines:
        yield f"num_processes: {processes} is not a multiple of num_machines, {machines}"
    if kind in ("FSDP", "DEEPSPEED") and _true(given.get("use_cpu")):
        yield f"use_cpu: {kind} runs as plain DDP on the CPU, in silence; write MULTI_GPU instead"
    yield from _fsdp_faults(_section(given, "fsdp_config"))
    if not layout_of(file).whole_model:
        yield NO_MODEL


NO_MODEL = (
    "zero3_save_16bit_model: only with true can the weights be gathered when the stage ends, to be "
    "saved; write it under deepspeed_config"
)


def _fsdp_faults(section: dict[str, Any]) -> Iterator[str]:
    if not section or str(section.get("fsdp_version", 1)) != "2":
        return
    if needless := [key for key in FSDP1_ONLY if key in section]:
        yield f"fsdp_config: {', '.join(needless)}: of FSDP 1; leave out with fsdp_version: 2"
    if not isinstance(section.get("fsdp_reshard_after_forward", True), bool):
        yield "fsdp_config: fsdp_reshard_after_forward: true or false with fsdp_version: 2"


def _section(given: dict[str, Any], key: str) -> dict[str, Any]:
    value = given.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{key} must hold `key: value` lines, not {value!r}")
    return value


def _true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes", "on")
