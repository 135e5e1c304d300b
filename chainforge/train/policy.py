"""Open the policy that a stage trains; what it starts from is what its KL is measured against."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import read_manifest
from chainforge.core.process import CHAIN
from chainforge.train.agreement import Agreement
from chainforge.train.methods import Start, model_options
from chainforge.train.saving import START, attach, merge
from chainforge.train.stage import Stage, is_main_process
from chainforge.train.trackers import name_run


def open_policy(start: Start, stage: Stage) -> Any:
    """Return what TRL trains: the path or Hub id of a model, or a model that had to be opened here.

    What the stage starts from, and so what its KL is measured against, is noted in its manifest.
    """
    stage.policy, source = start, start.source
    model, stage.notes["starts_from"] = source.model, start.reference
    if source.adapter and not start.continues:
        merged = _merged(start, stage)
        model, stage.notes["starts_from"] = str(merged.resolve()), str(merged)
    if not start.opened_here:
        return model
    from accelerate import PartialState
    from trl.trainer.utils import create_model_from_path

    options = start.options | {"quantization_config": start.quantization}
    if PartialState().num_processes > 1:
        options["device_map"] = None  # one device for each process, as TRL has it
    opened = create_model_from_path(model, **options)
    module: Any
    for module in opened.modules():
        # bitsandbytes would repack 4-bit weights at the first evaluation on a CPU, for good, into a
        # form that no gradient goes through.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if start.continues and source.adapter:
        return attach(opened, source.adapter, trains=True)
    return opened


def _merged(start: Start, stage: Stage) -> Path:
    """Return the directory of the given adapter's base with the adapter merged in."""
    from accelerate import PartialState

    source, target = start.source, stage.path(START)
    assert source.adapter is not None
    if beside := _beside(source.adapter):
        return beside
    with PartialState().main_process_first():
        if is_main_process() and not target.exists():
            part = stage.path(f"{START}.part")
            shutil.rmtree(part, ignore_errors=True)
            merge(source, start.options, part)
            part.rename(target)
    return target


def _beside(adapter: Path) -> Path | None:
    """Return the `model/` of the finished stage that left an adapter: it is merged there."""
    manifest, model = read_manifest(adapter.parent), adapter.with_name("model")
    if manifest is None or adapter.name != "adapter":
        return None
    names = [name for name in manifest.outputs if name.startswith("model/")]
    return model if names and all((adapter.parent / name).exists() for name in names) else None


def unround(trainer: Any, stage: Stage) -> None:
    """Have the adapter on quantised weights in float32, as PEFT has it, before training starts.

    TRL rounds it to bfloat16, in which the small steps of RL are lost. It does not round the frozen
    copy, so the KL would not start at 0; nor is an adapter rounded that is read from a checkpoint.
    Where processes share out the weights, TRL's choice stays: they need one precision throughout.
    """
    start = stage.policy
    if start is None or start.quantization is None:
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if start.continues:
        trainer.model.load_adapter(str(start.source.adapter), "default", is_trainable=True)


def check_reference(trainer: Any) -> None:
    """See that the frozen copy of an adapter that trains on, the KL reference, is its copy.

    TRL copies weights by name, and misses those of embeddings. Raises `NotWhatWasTrained` when
    the copy still differs, unless processes share out the weights, which then cannot be run here.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if "ref" not in getattr(model, "peft_config", {}):
        return
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if name.endswith(".default"):
            weights[f"{name.removesuffix('default')}ref"].data.copy_(weight.data)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    from trl.trainer.utils import use_adapter

    agreement = Agreement(trainer.processing_class)
    agreement.see("the policy", model)
    with use_adapter(model, adapter_name="ref"):
        agreement.see("its KL reference, a copy of the adapter,", model)


def prepare(training_args: Any, model_args: Any, stage: Stage) -> Any:
    """Point a TRL configuration at the stage: checkpoints inside it, the model as asked for."""
    start = stage.policy
    name_run(training_args, stage.directory)
    training_args.push_to_hub = False  # the stage is sent once it is signed
    training_args.output_dir = str(stage.path("checkpoints"))
    if start is None:
        training_args.model_init_kwargs = model_options(model_args, training_args)
    else:
        training_args.model_init_kwargs = None if start.opened_here else start.options
    if os.environ.get(CHAIN):
        training_args.disable_tqdm = True  # the chain draws the bar; a log has no use for one
    return training_args
