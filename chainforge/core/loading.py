"""Explain in one sentence why a library could not load a model, a tokenizer or an adapter.

What was loaded is the user's, and so the fault is one of input: a damaged file, a model that this
transformers does not know, an adapter of another vocabulary, layers that the model does not have.
"""

from __future__ import annotations

import traceback

from chainforge.core.errors import InputError

LONGEST = 300
# What a sound model may raise too.
_OF_THE_MACHINE = {"OutOfMemoryError", "MemoryError", "AcceleratorError", "KeyboardInterrupt"}


def loading_fault(error: BaseException) -> InputError | None:
    """Return what to tell about an error from within `from_pretrained` or PEFT, else None.

    The name of what was being loaded is that which the library was given.
    """
    if type(error).__name__ in _OF_THE_MACHINE or "out of memory" in str(error):
        return None
    words = f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST]
    for frame, _ in traceback.walk_tb(error.__traceback__):
        called, values = frame.f_code.co_name, frame.f_locals
        if called in ("get_peft_model", "inject_adapter"):
            return InputError(
                f"lora_target_modules: this model cannot get such an adapter ({words}); give "
                "all-linear, or a list of names of its layers"
            )
        if called == "from_pretrained":
            name = values.get("pretrained_model_name_or_path") or values.get("model_id")
            return InputError(f"{name}: cannot be loaded ({words}){_tip(str(error))}")
    return None


def _tip(message: str) -> str:
    if "size mismatch" in message:
        return "; its tensors are of other shapes than the model's: another base or vocabulary"
    if "deserializing header" in message or "incomplete" in message:
        return "; a file of weights is damaged or cut: fetch or copy it again"
    return ""
