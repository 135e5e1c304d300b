"""Leave a trained policy as directories that anything can open.

`model/` is a plain model for `from_pretrained`, and `adapter/` the LoRA adapter alone, whose base
is a Hub id or an absolute path. Weights that are split over processes are gathered by all of them,
and written by the first.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import read_json, write_json
from chainforge.core.errors import InputError
from chainforge.training.sources import ADAPTER, ADAPTER_WEIGHTS, Source
from chainforge.training.stage import Stage, is_main_process

KEPT = ("model", "adapter", "checkpoints")
START = "start"  # where a stage that was given an adapter leaves what it started from


def save(trainer: Any, stage: Stage) -> None:
    """Leave `model/` and, with LoRA, `adapter/`, as far as the stage keeps them.

    Every process of a launch must call this; the first writes while the others wait.
    """
    from peft import PeftModel

    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    state = gathered(trainer)
    if is_main_process():
        if isinstance(model, PeftModel):
            _save_adapted(model, trainer.processing_class, stage, state)
        else:
            model.save_pretrained(str(stage.path("model")), state_dict=state)
            trainer.processing_class.save_pretrained(str(stage.path("model")))
            shutil.rmtree(stage.path(START), ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def gathered(trainer: Any) -> dict[str, Any] | None:
    """Return the weights, gathered from all processes; None where each has them whole."""
    if trainer.is_deepspeed_enabled:
        return dict(trainer.accelerator.get_state_dict(trainer.deepspeed))
    if trainer.is_fsdp_enabled:
        return dict(trainer.accelerator.get_state_dict(trainer.model))
    return None


def _save_adapted(model: Any, tokenizer: Any, stage: Stage, state: dict[str, Any] | None) -> None:
    """Save the adapter, and what it was trained on with the adapter merged in."""
    start = stage.policy
    keep = start.keep if start else KEPT
    adapter, target = stage.path("adapter"), stage.path("model")
    config = model.peft_config["default"]
    if Path(config.base_model_name_or_path).exists():
        # A relative path would bind the adapter to this working directory.
        config.base_model_name_or_path = str(Path(config.base_model_name_or_path).resolve())
    elif start:
        config.revision = start.options["revision"]
    base = config.base_model_name_or_path
    shutil.rmtree(adapter, ignore_errors=True)
    model.save_pretrained(str(adapter), selected_adapters=["default"], state_dict=state)
    (adapter / "README.md").unlink(missing_ok=True)
    if "model" in keep:
        merge(base, adapter, start.options if start else {}).save_pretrained(str(target))
        tokenizer.save_pretrained(str(target))
    if start and start.joins:
        join(start.source, adapter)
    if "adapter" in keep:
        tokenizer.save_pretrained(str(adapter))
    else:
        shutil.rmtree(adapter)
    if not adapter.exists() or read_json(adapter / ADAPTER)["base_model_name_or_path"] != base:
        shutil.rmtree(stage.path(START), ignore_errors=True)


def merge(base: str, adapter: Path, options: Mapping[str, Any]) -> Any:
    """Return a model, opened at its own precision and whole, with an adapter merged in.

    It is opened anew: merging into quantised weights would keep their rounding. `options` are those
    of `from_pretrained`, of which `revision` and `trust_remote_code` count. Raises `ValueError`
    when a weight is not finite.
    """
    from trl.trainer.utils import create_model_from_path

    with _alone():
        model = create_model_from_path(
            base,
            dtype="auto",
            device_map=None,
            use_safetensors=True,
            revision=options.get("revision"),
            trust_remote_code=bool(options.get("trust_remote_code")),
        )
        return attach(model, adapter).merge_and_unload(safe_merge=True)


def attach(model: Any, adapter: Path, *, trains: bool = False) -> Any:
    """Put an adapter on a model; raise `InputError` when it was made for another one.

    PEFT only warns then, and leaves the weights that it did not find as they are initialised.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    # As TRL has it: ZeRO-3 needs one precision throughout, unless the weights are quantised.
    mixed = getattr(model, "quantization_method", None) or not is_deepspeed_zero3_enabled()
    adapted = PeftModel.from_pretrained(
        model, str(adapter), is_trainable=trains, autocast_adapter_dtype=bool(mixed)
    )
    with safe_open(str(adapter / ADAPTER_WEIGHTS), "pt") as file:
        found = {key for key in file.keys() if "lora_" in key}  # noqa: SIM118
    wanted = {
        key
        for key in get_peft_model_state_dict(adapted, save_embedding_layers=False)
        if "lora_" in key
    }
    if found != wanted:
        different = sorted(found ^ wanted)
        raise InputError(
            f"{adapter} was made for another model than {model.name_or_path}: {len(different)} of "
            f"its weights find no place, or are missing, such as {different[0]}"
        )
    return adapted


def join(source: Source, adapter: Path) -> None:
    """Make of the adapter in `adapter`, and of the one below it, one on that one's base.

    The sum of two low-rank products is the product of their factors side by side, so the rank is
    the sum of both ranks, and nothing is lost.
    """
    import torch
    from safetensors.torch import load_file, save_file

    assert source.adapter is not None
    folders = (source.adapter, adapter)
    configs = [read_json(folder / ADAPTER) for folder in folders]
    weights = [load_file(folder / ADAPTER_WEIGHTS) for folder in folders]
    joined = {}
    for name in sorted(weights[0].keys() | weights[1].keys()):
        down = "lora_A" in name or "lora_embedding_A" in name  # (rank, in); else (out, rank)
        like = next(one[name] for one in weights if name in one)
        parts = []
        for config, one in zip(configs, weights, strict=True):
            rank = config["r"]
            shape = (rank, like.shape[1]) if down else (like.shape[0], rank)
            part = one[name].float() if name in one else torch.zeros(shape)
            parts.append(part * (config["lora_alpha"] / rank) if down else part)
        joined[name] = torch.cat(parts, dim=0 if down else 1).contiguous()
    rank = sum(config["r"] for config in configs)
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in joined}
    settings = {"r": rank, "lora_alpha": rank, "target_modules": sorted(modules)}
    settings |= {"base_model_name_or_path": source.model, "revision": source.revision}
    save_file(joined, adapter / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(adapter / ADAPTER, configs[1] | settings)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Load models whole, in this process: under ZeRO-3 loading would wait for the others."""
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and (config := reference()) is not None:
            deepspeed.set_hf_deepspeed_config(config)
