"""Every private name of TRL and of transformers' Trainer that ChainForge uses.

`check_versions` refuses another version before a model is loaded, not in the middle of a run.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from chainforge.core.errors import InputError

SUPPORTED = "1.16"
# Of a module or of a class. Modules below `trl` are not part of its documented interface.
NAMES = (
    ("transformers.trainer", "Trainer._load_best_model"),
    ("trl.trainer.utils", "create_model_from_path"),
    ("trl.trainer.utils", "get_peft_config"),
    ("trl.trainer.utils", "get_quantization_config"),
    ("trl.trainer.utils", "use_adapter"),
)


def create_model(path: str, **options: Any) -> Any:
    """Open a causal language model, of the class that its configuration names."""
    from trl.trainer import utils

    return utils.create_model_from_path(path, **options)


def lora(model_args: Any) -> Any:
    """Return the configuration of the fresh adapter that a ModelConfig asks for, or None."""
    from trl.trainer import utils

    return utils.get_peft_config(model_args)


def quantization(model_args: Any) -> Any:
    """Return the quantisation that a ModelConfig asks for, or None."""
    from trl.trainer import utils

    return utils.get_quantization_config(model_args)


def use_adapter(model: Any, name: str) -> Any:
    """Return a context in which a PEFT model computes with another of its adapters."""
    from trl.trainer import utils

    return utils.use_adapter(model, adapter_name=name)


def load_best_model(trainer: Any) -> None:
    """Load the best checkpoint into the model, as transformers does after its last step."""
    trainer._load_best_model()


def set_token_count(trainer: Any, tokens: int) -> None:
    """Continue the count of trained tokens, which SFTTrainer starts at 0 when a run resumes."""
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = tokens


def check_versions(names: tuple[tuple[str, str], ...] = NAMES) -> None:
    """Raise `InputError` for a name that the installed versions do not have."""
    for module, name in names:
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            raise InputError(
                f"{module}.{name} does not exist in trl {importlib.metadata.version('trl')} with "
                f"transformers {importlib.metadata.version('transformers')}: ChainForge supports "
                f'TRL {SUPPORTED}; pip install "trl~={SUPPORTED}.0"'
            ) from None
