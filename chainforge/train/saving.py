"""Leave a trained policy as directories that anything can open.

`model/` is a plain model for `from_pretrained`, and `adapter/` the LoRA adapter alone, whose base
is a Hub id or an absolute path. Weights that are split over processes are gathered by all of them,
and written by the first.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import read_json, write_json
from chainforge.core.errors import Failed, InputError
from chainforge.train.agreement import Agreement, NotWhatWasTrained
from chainforge.train.sources import ADAPTER, ADAPTER_WEIGHTS, Source
from chainforge.train.stage import Stage, is_main_process

logger = logging.getLogger(__name__)

KEPT = ("model", "adapter", "checkpoints")
CONFIG = "config.json"
START = "start"  # where a stage that was given an adapter leaves what it started from


def save(trainer: Any, stage: Stage) -> None:
    """Leave `model/` and, with LoRA, `adapter/`, as far as the stage keeps them.

    Every process of a launch must call this; the first writes while the others wait. Raises
    `NotWhatWasTrained` when what was saved computes something else than the policy did.
    """
    from peft import PeftModel

    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    state = gathered(trainer)
    if is_main_process():
        if isinstance(model, PeftModel):
            _save_adapted(model, trainer.processing_class, stage, state)
        else:
            _save_whole(model, stage, state)
            trainer.processing_class.save_pretrained(str(stage.path("model")))
            shutil.rmtree(stage.path(START), ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def gathered(trainer: Any) -> dict[str, Any] | None:
    """Return the weights, gathered from all processes.

    None where each process has them whole, and where another process got them.
    """
    if trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.deepspeed)
    elif trainer.is_fsdp_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model)
    else:
        return None
    return state and dict(state)


def _save_whole(model: Any, stage: Stage, state: dict[str, Any] | None) -> None:
    """Save a model whose own weights were trained, in the precision of its base."""
    target, dtype = stage.path("model"), _precision(stage.policy)
    if state is None and dtype not in (None, model.dtype):
        state = model.state_dict()
    if state is not None:
        # Gathered weights share no memory, so transformers would not know which ones are tied.
        tied = {copy for copy, kept in model.all_tied_weights_keys.items() if kept in state}
        state = {name: weight for name, weight in state.items() if name not in tied}
        state = {name: _rounded(name, weight, dtype) for name, weight in state.items()}
    model.save_pretrained(str(target), state_dict=state)
    if dtype is not None:  # transformers writes the precision of training
        config = read_json(target / CONFIG)
        write_json(target / CONFIG, config | {"dtype": str(dtype).removeprefix("torch.")})


def _precision(start: Any) -> Any:
    """Return the precision of the model that a stage started from; None when it is not known."""
    import torch
    from safetensors import safe_open

    if start is None:
        return None
    config = start.source.config
    for part in (config, config.get("text_config") or {}):
        if name := part.get("dtype") or part.get("torch_dtype"):
            return getattr(torch, str(name).removeprefix("torch."), None)
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for path in sorted(Path(start.source.model).glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if dtype := known.get(file.get_slice(key).get_dtype()):
                    return dtype
    return None


def _rounded(name: str, weight: Any, dtype: Any) -> Any:
    """Return a weight in another precision, out of the memory of the device that trains."""
    if dtype is None or not weight.is_floating_point():
        return weight
    rounded = weight.detach().to("cpu", dtype)
    if not rounded.isfinite().all() and weight.isfinite().all():
        raise Failed(
            f"{name} has values that {dtype}, the precision of the base, cannot hold. Start from a "
            "base in bfloat16 or float32: set dtype in its config.json and convert its weights"
        )
    return rounded


def _save_adapted(model: Any, tokenizer: Any, stage: Stage, state: dict[str, Any] | None) -> None:
    """Save the adapter, and its base with the adapter merged in; see that both are the policy."""
    start = stage.policy
    save = start.save if start else KEPT
    options = start.options if start else {}
    adapter, target = stage.path("adapter"), stage.path("model")
    config = model.peft_config["default"]
    agreement = Agreement(tokenizer, _tokens(config))
    if state is not None or getattr(model.get_base_model(), "quantization_method", None):
        logger.info("adapter/ and model/ are compared with one another alone: the policy that was "
                    "trained is split over processes, or on quantised weights")  # fmt: skip
    else:
        agreement.see("the trained policy", model)
    if Path(config.base_model_name_or_path).exists():
        # A relative path would bind the adapter to this working directory.
        config.base_model_name_or_path = str(Path(config.base_model_name_or_path).resolve())
    elif start:
        config.revision = options["revision"]
    shutil.rmtree(adapter, ignore_errors=True)
    model.save_pretrained(str(adapter), selected_adapters=["default"], state_dict=state)
    (adapter / "README.md").unlink(missing_ok=True)
    try:
        with _alone():
            if start and start.joins:
                join(start.source, adapter, options)
            base = read_json(adapter / ADAPTER)["base_model_name_or_path"]
            saved = attach(open_base(base, options), adapter)
            agreement.see(f"{adapter} on its base", saved)
            if "model" in save:
                _merge_in(saved, like=model.get_base_model()).save_pretrained(str(target))
                tokenizer.save_pretrained(str(target))
                del saved  # one model at a time
                agreement.see(str(target), open_base(str(target), {**options, "revision": None}))
    except NotWhatWasTrained:
        shutil.rmtree(adapter)
        shutil.rmtree(target, ignore_errors=True)
        raise
    if "adapter" in save:
        tokenizer.save_pretrained(str(adapter))
    else:
        shutil.rmtree(adapter)
    if base != str(stage.path(START).resolve()) or "adapter" not in save:
        shutil.rmtree(stage.path(START), ignore_errors=True)


def _tokens(config: Any) -> list[int]:
    """Return the ids of single tokens that an adapter trains."""
    tokens = config.trainable_token_indices or []
    lists = tokens.values() if isinstance(tokens, dict) else [tokens]
    return [int(token) for one in lists for token in one]


def open_base(base: str, options: Mapping[str, Any]) -> Any:
    """Open a model at its own precision and whole, its head a weight of its own.

    `options` are those of `from_pretrained`, of which `revision` and `trust_remote_code` count.
    """
    import torch
    from trl.trainer.utils import create_model_from_path

    model: Any
    with _alone():
        model = create_model_from_path(
            base,
            dtype="auto",
            device_map=None,
            use_safetensors=True,
            revision=options.get("revision"),
            trust_remote_code=bool(options.get("trust_remote_code")),
        )
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embeddings.weight:
        # What is merged into one of the two is not meant for the other.
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return model


def merge(source: Source, options: Mapping[str, Any], target: Path) -> None:
    """Write the model of an adapter's base with the adapter merged in, and its tokenizer.

    The base is opened at its own precision: merging into quantised weights would keep their
    rounding. Raises `ValueError` when a weight is not finite, and `NotWhatWasTrained` when what
    was written computes something else than the adapter on its base.
    """
    from transformers import AutoTokenizer

    assert source.adapter is not None
    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer)
    with _alone():
        adapted = attach(open_base(source.model, options), source.adapter)
        agreement = Agreement(tokenizer, _tokens(adapted.peft_config["default"]))
        agreement.see(f"{source.adapter} on its base", adapted)
        merged = _merge_in(adapted)
        ends = merged.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if tokenizer.eos_token_id not in [None, *ends]:  # the adapter may end turns with another
            merged.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
        merged.save_pretrained(str(target))
        tokenizer.save_pretrained(str(target))
        del adapted, merged  # one model at a time
        agreement.see(str(target), open_base(str(target), {**options, "revision": None}))


def _merge_in(adapted: Any, like: Any = None) -> Any:
    """Merge the adapter of an opened model in; `like` has the settings that training left."""
    import torch

    tied = adapted.get_base_model().config.get_text_config().tie_word_embeddings
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        merged = adapted.merge_and_unload(safe_merge=True)
    if like is not None:
        merged.generation_config = copy.deepcopy(like.generation_config)
        merged.config = _settings(like.config, merged.config)
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    if tied and head is not None:
        equal = torch.equal(head.weight, embeddings.weight)
        if equal:
            head.weight = embeddings.weight
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = equal
    return merged


def _settings(trained: Any, opened: Any) -> Any:
    """Return the configuration that training left, for weights as they are opened here."""
    config = copy.deepcopy(trained)
    for part, own in ((config, opened), (config.get_text_config(), opened.get_text_config())):
        for name in ("dtype", "use_cache"):
            if hasattr(own, name):
                setattr(part, name, getattr(own, name))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


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


def join(source: Source, adapter: Path, options: Mapping[str, Any]) -> None:
    """Make of the adapter in `adapter`, and of the one below it, one on that one's base.

    The sum of two low-rank products is the product of their factors side by side, so the rank is
    the sum of both ranks, and nothing is lost.
    """
    from peft.tuners.lora import LoraLayer

    assert source.adapter is not None
    model = attach(open_base(source.model, options), source.adapter)
    model.load_adapter(str(adapter), "fresh")
    for name in ("default", "fresh"):
        # PEFT makes the new adapter's settings of these. Each layer knows its own scale already.
        config = model.peft_config[name]
        config.target_modules = {
            place
            for place, module in model.get_base_model().named_modules()
            if isinstance(module, LoraLayer) and name in module.r
        }
        config.use_rslora, config.init_lora_weights = False, True
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    model.base_model.add_weighted_adapter(["default", "fresh"], [1.0, 1.0], "joined", "cat")
    shutil.rmtree(adapter)
    model.save_pretrained(str(adapter.parent), selected_adapters=["joined"])
    (adapter.parent / "README.md").unlink(missing_ok=True)
    (adapter.parent / "joined").rename(adapter)
    settings = {"base_model_name_or_path": source.model, "revision": source.revision}
    write_json(adapter / ADAPTER, read_json(adapter / ADAPTER) | settings)


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
