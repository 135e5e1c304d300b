"""Check a setting: its name, its type, and the numbers and words that it can take.

TRL and transformers check some of this, but late: after the model is loaded, or in the first step.
"""

from __future__ import annotations

import contextlib
import difflib
import enum
import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from chainforge.core.errors import InputError

# Other tools' names of settings: the first key that the recipe has is meant.
ALIASES = {
    "lora_r": "lora_rank lora_dim rank r peft_r",
    "lora_target_modules": "lora_target target_modules lora_targets",
    "use_peft": "use_lora lora peft",
    "load_in_4bit": "qlora use_qlora load_4bit",
    "dtype": "torch_dtype precision model_dtype",
    "num_generations": "group_size rollout_n n_samples_per_prompt num_rollouts generations",
    "epsilon": "clip_ratio clip_eps clip_range cliprange clip_ratio_low eps_clip",
    "epsilon_high": "clip_ratio_high clip_range_high",
    "beta": "kl_coef kl_coeff kl_beta kl_loss_coef init_kl_coef",
    "learning_rate": "lr actor_lr",
    "num_train_epochs": "epochs num_epochs n_epochs",
    "max_steps": "num_rl_steps steps num_steps total_steps total_training_steps max_train_steps",
    "per_device_train_batch_size": "batch_size train_batch_size micro_batch_size",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation accumulation_steps",
    "max_length": "max_seq_length max_seq_len cutoff_len sequence_len model_max_length",
    "max_completion_length": "max_new_tokens max_response_length max_completion_len max_tokens",
    "max_new_tokens": "max_completion_length max_response_length max_tokens",
    "num_samples": "num_generations group_size samples_per_prompt n_samples n",
    "model_name_or_path": "model model_name model_id model_path base_model",
    "data": "dataset dataset_name train_file data_path datasets",
    "tasks": "task dataset dataset_name",
    "rewards": "reward_funcs reward_functions reward_fn reward",
    "attn_implementation": "flash_attn use_flash_attention use_flash_attention_2",
    "warmup_steps": "warmup_ratio",
    "report_to": "wandb logger",
}
CLOSE = 0.85  # of difflib's ratio: one letter in six; local_rank is no lora_rank

SEEDS = (0, 2**32 - 1)  # what NumPy takes
_TINY = math.ulp(0.0)  # means "above 0"
_BELOW_1 = math.nextafter(1, 0)
_RANGES: dict[str, tuple[float, float]] = {
    "learning_rate weight_decay beta max_grad_norm warmup_steps epsilon epsilon_high delta "
    "adam_epsilon entropy_coef neftune_noise_alpha temperature max_usd "
    "vllm_importance_sampling_cap": (0, math.inf),
    "dataloader_num_workers heldout_size max_failed_samples": (0, math.inf),
    "num_train_epochs logging_steps save_steps eval_steps timeout repetition_penalty "
    "sapo_temperature_neg sapo_temperature_pos vllm_server_timeout": (_TINY, math.inf),
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "generation_batch_size steps_per_generation num_iterations max_completion_length "
    "max_length max_new_tokens num_samples max_samples round_size lora_r "
    "lora_alpha num_generations num_generations_eval max_concurrency vllm_tensor_parallel_size "
    "vllm_max_model_length pad_to_multiple_of dataset_num_proc eval_accumulation_steps "
    "ref_model_sync_steps ddp_bucket_cap_mb ddp_timeout": (1, math.inf),
    "vllm_server_port vllm_group_port": (1, 65535),
    "adam_beta1 adam_beta2 lora_dropout": (0, _BELOW_1),
    "min_p label_smoothing_factor ref_model_mixup_alpha": (0, 1),
    "top_p top_entropy_quantile vllm_gpu_memory_utilization": (_TINY, 1),
    "seed data_seed": SEEDS,
}  # fmt: skip
# Words of GRPO that TRL reads as late as in its first step.
WORDS = {
    "loss_type": "grpo bnpo dr_grpo dapo cispo luspo sapo vespo",
    "importance_sampling_level": "token sequence",
    "scale_rewards": "group batch none",
    "multi_objective_aggregation": "sum_then_normalize normalize_then_sum",
    "vllm_mode": "server colocate",
    "vllm_importance_sampling_mode": "token_truncate token_mask sequence_truncate sequence_mask",
}
RANGES = {name: span for names, span in _RANGES.items() for name in names.split()}
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def meant(key: str, known: Collection[str]) -> str | None:
    """Return the setting that was probably meant: another tool's name for it, or a typing error."""
    for name, others in ALIASES.items():
        if key.lower() in others.split() and name in known:
            return name
    for near in difflib.get_close_matches(key.lower(), known, n=3, cutoff=0.75):
        close = difflib.SequenceMatcher(None, key.lower(), near).ratio() >= CLOSE
        if close or sorted(key.lower()) == sorted(near):
            return near
    return None


def unknown(what: str, key: str, known: Collection[str]) -> str:
    """Return the message for an unknown setting, with the one that was probably meant."""
    near = meant(key, known)
    return f"unknown {what}" + (f"; did you mean {near!r}?" if near else "")


def out_of_range(key: str, value: Any, known: Collection[str]) -> str | None:
    """Return what is wrong with a number or word in a setting's value; None if it is possible.

    `known` are the recipe's settings: some ranges hold for training or for GRPO alone.
    """
    if isinstance(value, Mapping | list | tuple):
        inner = value.values() if isinstance(value, Mapping) else value
        return next((text for item in inner if (text := out_of_range("", item, known))), None)
    if isinstance(value, str) and key in WORDS and "importance_sampling_level" in known:
        words = WORDS[key].split()
        return None if value in words else f"expected one of {', '.join(words)}, found {value!r}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if math.isnan(value):
        return "expected a number, found nan"
    if key == "max_steps" and (value == 0 or value < -1):
        return f"expected 1 or more, or -1 for whole epochs, found {value}"
    low, high = RANGES.get(key, (-math.inf, math.inf))
    if key == "temperature" and "learning_rate" in known:
        low = _TINY  # TRL divides by it
    if low <= value <= high and not (key in RANGES and math.isinf(value)):
        too_long = isinstance(value, int) and abs(value) >= 2**63
        return f"a number of {len(str(abs(value)))} digits is too long" if too_long else None
    least = "above 0" if low == _TINY else f"of at least {low:g}"
    most = {math.inf: "", _BELOW_1: ", below 1"}.get(high, f", at most {high:.10g}")
    return f"expected a finite number {least}{most}, found {value}"


def truth(value: Any) -> Any:
    """Return the bool that a word such as `off` means; any other value as it is."""
    return _TRUTH.get(value.lower(), value) if isinstance(value, str) else value


def is_structured(kind: Any) -> bool:
    """Return whether a field of this type holds mappings, written as YAML on a command line."""
    parts = typing.get_args(kind)
    return kind is dict or typing.get_origin(kind) is dict or any(map(is_structured, parts))


def parts_of(kind: Any) -> tuple[Any, ...]:
    """Return the types that a union joins, or the type alone; with an enum, text is its values."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    parts = typing.get_args(kind) if union else (kind,)
    return tuple(part for part in parts if part is not str or not any(map(_is_enum, parts)))


def checked(value: Any, kind: Any, where: str) -> Any:
    """Return `value` as a `kind`; raise `InputError` when it does not fit.

    Text that reads as a number, and `yes` or `off` for a bool, is converted.
    """
    parts = parts_of(kind)
    if kind is Any or (value is None and type(None) in parts):
        return value
    for part in parts:
        with contextlib.suppress(TypeError):
            return _fit(value, part, where)
    wanted = " or ".join(_name(part) for part in parts if part is not type(None))
    raise InputError(f"{where}: expected {wanted}, found {value!r} ({type(value).__name__})")


def _fit(value: Any, kind: Any, where: str) -> Any:
    """Return `value` as a `kind` that is no union; raise `TypeError` when it does not fit."""
    origin = typing.get_origin(kind) or kind
    if origin is list:
        (inner,) = typing.get_args(kind) or (Any,)
        if isinstance(value, str) and inner is str:
            value = [value]  # one of several, as on the command line
        if isinstance(value, list):
            return [checked(item, inner, f"{where}[{i}]") for i, item in enumerate(value)]
    elif origin is typing.Literal or _is_enum(kind):
        words = typing.get_args(kind) or [one.value for one in kind]
        if value in words:
            return value
    elif origin is bool:
        if isinstance(truth(value), bool):
            return truth(value)
    elif origin in (int, float) and isinstance(value, str | int) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return origin(value)
    # Only its library can build such a class from text.
    elif not isinstance(origin, type) or (
        isinstance(value, origin) and not (isinstance(value, bool) and origin is int)
    ):
        return value
    raise TypeError


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _name(kind: Any) -> str:
    if _is_enum(kind):
        return "one of " + ", ".join(one.value for one in kind)
    return getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind)
