"""What a training recipe's settings come to, TRL's defaults included, without importing TRL.

To import TRL's configurations takes seconds, and to build one asks for the very processes and GPUs
that the stage will run on. Whoever looks at a chain from outside has neither. A test holds the
defaults to what is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chainforge.core.options import truth

TRAINED = ("sft", "grpo", "distill")

_MODEL = {
    "dtype": "float32",
    "use_peft": False,
    "lora_r": 16,
    "lora_target_modules": None,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "use_bnb_nested_quant": False,
    "bnb_4bit_quant_storage": None,
}
_TRAINING = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "bf16": None,
    "fp16": False,
    "optim": "adamw_torch_fused",
    "use_cpu": False,
    "max_steps": -1,
    "trust_remote_code": False,
}
_GENERATION = {
    "max_completion_length": 512,
    "top_k": 0,
    "top_p": 1.0,
    "use_vllm": False,
    "vllm_mode": "colocate",
    "vllm_gpu_memory_utilization": 0.3,
    "vllm_enable_sleep_mode": False,
    "vllm_tensor_parallel_size": 1,
    "vllm_server_base_url": None,
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": _MODEL | _TRAINING | {"max_length": 1024, "packing": False},
    "grpo": _MODEL
    | _TRAINING
    | _GENERATION
    | {
        "beta": 0.0,
        "num_generations": 8,
        "generation_batch_size": None,
        "steps_per_generation": None,
        "num_iterations": 1,
        "save_strategy": "steps",
        "save_steps": 500,
    },
    "distill": _MODEL | _TRAINING | _GENERATION | {"beta": 1.0, "teacher_model_init_kwargs": None},
}


def settings_of(recipe: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe that are looked at here: as given, else TRL's default.

    Numbers written as text (`1e-4` is text in YAML) become numbers. What cannot be one stays as it
    is: the recipe itself refuses it, by name.
    """
    found = dict(DEFAULTS[recipe])
    for key, default in found.items():
        if key in given:
            found[key] = _as(given[key], default)
    found["bf16"] = truth(found["bf16"])
    if found["bf16"] is None:  # as TRL's own configurations do
        found["bf16"] = not found["fp16"]
    return found


def of_objects(recipe: str, *configs: Any) -> dict[str, Any]:
    """Return the same settings from the parsed configurations of a running recipe."""
    values = {}
    for key in DEFAULTS[recipe]:
        for config in configs:
            if hasattr(config, key):
                value = getattr(config, key)
                values[key] = getattr(value, "value", value)  # TRL keeps some as enumerations
    return settings_of(recipe, values)


def _as(value: Any, default: Any) -> Any:
    """Return a value of its default's type, where it can be one."""
    if isinstance(default, bool) and isinstance(value, str):
        return value.lower() in ("true", "yes", "on", "1")
    if isinstance(default, int | float) and not isinstance(default, bool):
        try:
            return type(default)(float(value))
        except (TypeError, ValueError):
            return value
    return value
