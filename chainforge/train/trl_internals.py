"""Every private name of TRL and of transformers' Trainer that ChainForge uses.

Importing this module checks that they exist, so that another version is refused before a model is
loaded and not in the middle of a run.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from chainforge.core.errors import InputError

SUPPORTED = "1.16"
# Module, class or None, and name. Modules below `trl` are not part of its documented interface.
NAMES = (
    ("trl.chat_template_utils", None, "get_training_chat_template"),
    ("trl.data_utils", None, "common_prefix_length"),
    ("transformers.trainer", "Trainer", "_load_best_model"),
    ("trl.trainer.utils", None, "create_model_from_path"),
    ("trl.trainer.utils", None, "get_peft_config"),
    ("trl.trainer.utils", None, "get_quantization_config"),
    ("trl.trainer.utils", None, "use_adapter"),
)


def load_best_model(trainer: Any) -> None:
    """Load the best checkpoint into the model, as transformers does after its last step."""
    trainer._load_best_model()


def set_token_count(trainer: Any, tokens: int) -> None:
    """Continue the count of trained tokens, which SFTTrainer starts at 0 when a run resumes."""
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = tokens


def check_names(names: tuple[tuple[str, str | None, str], ...] = NAMES) -> None:
    """Raise `InputError` for a name that the installed versions do not have."""
    for module, owner, name in names:
        try:
            found: Any = importlib.import_module(module)
            found = getattr(found, owner) if owner else found
            getattr(found, name)
        except (ImportError, AttributeError):
            where = ".".join(part for part in (module, owner, name) if part)
            raise InputError(
                f"{where} does not exist in trl {importlib.metadata.version('trl')} with "
                f"transformers {importlib.metadata.version('transformers')}: ChainForge supports "
                f'TRL {SUPPORTED}; pip install "trl~={SUPPORTED}.0"'
            ) from None


check_names()
