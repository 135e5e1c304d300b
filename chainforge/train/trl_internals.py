"""Every private name of TRL and of transformers' Trainer that ChainForge uses.

`check_versions` refuses another version before a model is loaded, not in the middle of a run.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from typing import Any

from chainforge.core.errors import InputError

SUPPORTED = "1.16"
# Of `trl.trainer.utils`, which is not part of TRL's documented interface, and of the Trainer.
FUNCTIONS = ("create_model_from_path", "get_peft_config", "get_quantization_config", "use_adapter",
             "_use_triton")  # fmt: skip
METHODS = ("_load_best_model",)
SCORES = "_get_per_token_logps_and_entropies"  # of GRPOTrainer


def check_versions() -> None:
    """Raise `InputError` for a name that the installed versions do not have."""
    from transformers import Trainer

    missing = [name for name in FUNCTIONS if not hasattr(_utils(), name)]
    if missing := missing + [name for name in METHODS if not hasattr(Trainer, name)]:
        version = importlib.metadata.version
        raise InputError(
            f"trl {version('trl')} with transformers {version('transformers')} has no {missing[0]}:"
            f' ChainForge supports TRL {SUPPORTED}; pip install "trl~={SUPPORTED}.0"'
        )


def _utils() -> Any:
    return importlib.import_module("trl.trainer.utils")


def create_model(path: str, **options: Any) -> Any:
    """Open a causal language model, of the class that its configuration names."""
    return _utils().create_model_from_path(path, **options)


def lora(model_args: Any) -> Any:
    """Return the configuration of the fresh adapter that a ModelConfig asks for, or None."""
    return _utils().get_peft_config(model_args)


def quantization(model_args: Any) -> Any:
    """Return the quantisation that a ModelConfig asks for, or None."""
    return _utils().get_quantization_config(model_args)


def use_adapter(model: Any, name: str) -> Any:
    """Return a context in which a PEFT model computes with another of its adapters."""
    return _utils().use_adapter(model, adapter_name=name)


def load_best_model(trainer: Any) -> None:
    """Load the best checkpoint into the model, as transformers does after its last step."""
    trainer._load_best_model()


def set_token_count(trainer: Any, tokens: int) -> None:
    """Continue the count of trained tokens, which SFTTrainer starts at 0 when a run resumes."""
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = tokens


def rollouts_by(sampler: Any) -> dict[str, Any]:
    """Return the argument that makes a GRPOTrainer sample with `sampler`; experimental in TRL."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    return {"rollout_func": sampler}


def score_with(trainer: Any, own: Any) -> tuple[Any, Any]:
    """Let `own.scores` and `own.loss` stand for a GRPOTrainer's methods; return those."""
    utils, on_gpu = _utils(), _utils()._use_triton
    # On a CPU, too, the model's head then computes completions only.
    utils._use_triton = lambda device: device.type == "cpu" or on_gpu(device)
    methods = getattr(trainer, SCORES), trainer.compute_loss
    setattr(trainer, SCORES, own.scores)
    trainer.compute_loss = own.loss
    return methods
