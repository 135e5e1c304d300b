"""The policy of a training stage: what it starts from, how it trains, and its KL reference.

`model_name_or_path` is a plain model (a Hub id, a directory, a stage's `model/`) or a LoRA adapter
(a directory, a stage's `adapter/`, a Hub id). `adapter:` chooses what happens to an adapter:

    merge      it is merged into its base; then all weights train, or a fresh adapter, whose base
               is the merged model
    continue   it is trained further (LoRA or QLoRA), and keeps its own base

The KL reference is always the policy that the stage starts from: without an adapter the same
directory opened again; under a fresh adapter the model below it; with `continue` a frozen copy of
the adapter, which TRL calls `ref`. Merging is done in the base's own precision, never in quantised
weights, and goes through a directory, because TRL opens a reference by the path of its policy.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chainforge.core.artifacts import read_manifest
from chainforge.core.config import given
from chainforge.core.errors import InputError
from chainforge.core.process import CHAIN_VARIABLE
from chainforge.train import trl_internals
from chainforge.train.distributed import check_supported
from chainforge.train.model_source import Source, find_source
from chainforge.train.stage import Stage, is_main_process

KEPT = ("model", "adapter", "checkpoints")


@dataclass
class PolicyArgs:
    """What is done with a given adapter, and what a training stage saves."""

    adapter: Literal["merge", "continue"] = field(
        default="merge",
        metadata={
            "help": "Of an adapter that the stage is given. merge: it is merged into its base "
            "first. continue: it is trained further."
        },
    )
    save: list[str] = field(
        default_factory=lambda: list(KEPT),
        metadata={"help": "What stays of `model`, `adapter` and `checkpoints`; all if left out."},
    )


@dataclass(frozen=True)
class Start:
    """How a stage's policy is opened; checked, and nothing loaded yet."""

    source: Source
    adapter: str
    save: tuple[str, ...]
    options: dict[str, Any]  # of `from_pretrained`
    quantization: Any = None
    lora: Any = None

    @property
    def reference(self) -> str:
        """Return the model as the user named it."""
        return self.source.reference

    @property
    def tokenizer_options(self) -> dict[str, Any]:
        """Return the options of `from_pretrained` for the policy's tokenizer."""
        return {name: self.options[name] for name in ("revision", "trust_remote_code")}

    @property
    def continues(self) -> bool:
        """Return whether the given adapter itself is trained further."""
        return self.adapter == "continue"

    @property
    def peft_config(self) -> Any:
        """Return the fresh adapter's configuration for TRL; None when none is to be made."""
        return None if self.continues else self.lora


def check_policy(args: PolicyArgs, training_args: Any, model_args: Any) -> Start:
    """Check that a stage's model, method and launch fit together, before anything is loaded.

    Turns dropout off where a KL reference is used. Raises `InputError`.
    """
    trl_internals.check_versions()
    asked = given(sys.argv[1:])
    check_supported(training_args, model_args)
    if training_args.report_to:
        from chainforge.train.trackers import check_trackers

        check_trackers(training_args.report_to)
    _check_method(args, model_args, asked)
    check_options("model_init_kwargs", training_args.model_init_kwargs)
    trust = bool(training_args.trust_remote_code)
    source = find_source(model_args.model_name_or_path, model_args.model_revision, trust)
    options = {
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": trust,
        "use_safetensors": True,
        **(training_args.model_init_kwargs or {}),
        "revision": source.revision,
    }
    start = Start(
        source=source,
        adapter=args.adapter,
        save=tuple(args.save),
        options=options,
        quantization=trl_internals.quantization(model_args),
        lora=trl_internals.lora(model_args),
    )
    _check_adapter(start, asked)
    # Only GRPO's beta is the weight of a KL to a reference. With dropout a policy differs from its
    # own copy: the KL would not measure the training.
    if hasattr(training_args, "num_generations") and training_args.beta:
        if str(asked.get("disable_dropout")).lower() in ("false", "no", "off"):
            raise InputError("disable_dropout: false with beta: the KL would measure dropout")
        training_args.disable_dropout = True
    return start


def check_options(name: str, options: dict[str, Any] | None) -> None:
    """Raise `InputError` for options of `from_pretrained` that read other weights than checked."""
    for key in ("use_safetensors", "subfolder", "gguf_file", "transformers_weights"):
        if (options or {}).get(key) not in (None, True):
            raise InputError(f"{name}: {key} would open other weights than were checked; remove it")


def _check_method(args: PolicyArgs, model_args: Any, asked: dict[str, Any]) -> None:
    """Raise `InputError` for settings of a method that is not used, and for an empty `save`."""
    if args.adapter != "merge" and not model_args.use_peft:
        raise InputError(
            f"adapter: {args.adapter} trains an adapter; set use_peft: true, or adapter: merge to "
            "train all weights"
        )
    idle = [key for key in asked if key.startswith("lora_") or key in ("use_dora", "use_rslora")]
    if idle and "use_peft" not in asked:
        raise InputError(f"{idle[0]} is given, but not use_peft: set use_peft to true, or false")
    if odd := [name for name in args.save if name not in KEPT]:
        raise InputError(f"save: {odd[0]!r} is not one of: {', '.join(KEPT)}")
    trained = ("model", "adapter") if model_args.use_peft else ("model",)
    if not set(trained) & set(args.save):
        raise InputError(f"save: no trained weights would be kept; save {' or '.join(trained)}")


def _check_adapter(start: Start, asked: dict[str, Any]) -> None:
    """Raise `InputError` for a model or an adapter that cannot train as the settings say."""
    source = start.source
    if "quantization_config" in source.config:
        raise InputError(
            f"{source.model} is quantised already, and what is trained on it could not be merged; "
            "give the model it was made from, with load_in_4bit: true"
        )
    if start.continues and source.adapter is None:
        raise InputError(
            f"adapter: continue: {source.reference} is a plain model; give its adapter/, or use "
            "adapter: merge"
        )
    for key in ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"):
        own = source.lora.get("r" if key == "lora_r" else key)
        if start.continues and key in asked and asked[key] != own:
            raise InputError(f"{key}: the adapter to be continued has {own}; leave {key} out")
    lora = source.lora if start.continues else vars(start.lora) if start.lora else {}
    for name in ("target_modules", "modules_to_save"):
        if "lm_head" in (lora.get(name) or ()):
            raise InputError(
                f"lora_{name}: lm_head: TRL computes its losses from the head's own weights, so an "
                "adapter on it would never train; leave lm_head out, or use adapter: merge"
            )


def open_policy(start: Start, stage: Stage) -> Any:
    """Return what TRL trains: the path or Hub id of a model, or a model that had to be opened here.

    What the stage starts from, and so what its KL is measured to, is noted in its manifest.
    """
    from chainforge.train.saving import attach

    stage.policy, source = start, start.source
    model, stage.notes["starts_from"] = source.model, start.reference
    if source.adapter and not start.continues:
        merged = _merge_given(start, stage)
        model, stage.notes["starts_from"] = str(merged.resolve()), str(merged)
    if not (start.continues or start.quantization):
        return model
    from accelerate import PartialState

    options = start.options | {"quantization_config": start.quantization}
    if PartialState().num_processes > 1:
        options["device_map"] = None  # one device for each process, as TRL has it
    opened = trl_internals.create_model(model, **options)
    module: Any
    for module in opened.modules():
        # bitsandbytes would repack 4-bit weights at the first evaluation on a CPU, for good, into a
        # form that no gradient goes through.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if start.continues and source.adapter:
        return attach(opened, source.adapter, trains=True)
    return opened


def _merge_given(start: Start, stage: Stage) -> Path:
    """Return the directory of the given adapter's base with the adapter merged in.

    That is the `model/` of the finished stage that left the adapter, or else made here.
    """
    from accelerate import PartialState

    from chainforge.train.saving import START, merge

    source, target = start.source, stage.path(START)
    assert source.adapter is not None
    maker = source.adapter.parent
    if source.adapter.name == "adapter" and read_manifest(maker) and (maker / "model").exists():
        return maker / "model"
    with PartialState().main_process_first():
        if is_main_process():
            merge(source, start.options, target)
    return target


def upcast_adapter(trainer: Any, stage: Stage) -> None:
    """Convert the adapter on quantised weights to float32, as PEFT has it, before training starts.

    TRL rounds it to bfloat16, in which the small steps of RL are lost. It does not round the frozen
    copy, so the KL would not start at 0; nor is an adapter rounded that is read from a checkpoint.
    Where processes share out the weights, TRL's choice stays: they need one precision throughout.
    """
    start = stage.policy
    if not start.quantization or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if start.continues:
        trainer.model.load_adapter(str(start.source.adapter), "default", is_trainable=True)


def check_reference(trainer: Any) -> None:
    """Check that the KL reference of a continued adapter is a copy of the adapter.

    TRL copies weights by name, and misses those of embeddings. Raises `NotWhatWasTrained` when
    the copy still differs, unless processes share out the weights, which then cannot be run here.
    """
    from chainforge.train.saving import Agreement

    model = trainer.accelerator.unwrap_model(trainer.model)
    if "ref" not in getattr(model, "peft_config", {}):
        return
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if name.endswith(".default"):
            weights[f"{name.removesuffix('default')}ref"].data.copy_(weight.data)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    agreement = Agreement(trainer.processing_class)
    agreement.check("the policy", model)
    with trl_internals.use_adapter(model, "ref"):
        agreement.check("its KL reference, a copy of the adapter,", model)


def prepare(training_args: Any, stage: Stage) -> Any:
    """Point a TRL configuration at the stage: checkpoints inside it, the model as asked for."""
    start = stage.policy
    if training_args.report_to:
        from chainforge.train.trackers import name_run

        name_run(training_args, stage.directory)
    training_args.push_to_hub = False  # the stage is sent once it is signed
    training_args.output_dir = str(stage.path("checkpoints"))
    opened = start.continues or start.quantization
    training_args.model_init_kwargs = None if opened else start.options
    if os.environ.get(CHAIN_VARIABLE):
        training_args.disable_tqdm = True  # the chain draws the bar; a log has no use for one
    return training_args
