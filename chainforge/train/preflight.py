"""Checks that the recipes share before a model is loaded: of prompts, and of how a turn ends."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import read_json
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row

logger = logging.getLogger(__name__)

_LONGEST = 256  # prompts that are tokenised: the longest in characters


def check_prompts(
    tokenizer: Any, rows: Sequence[Row], model: str, limit: int | None, key: str
) -> int:
    """Return the tokens of the longest prompt; raise `InputError` if it fills the model's context.

    `limit` is the longest completion, as the setting `key` has it. A completion that may not fit
    after the longest prompt is a warning.
    """
    longest = heapq.nlargest(
        _LONGEST, rows, key=lambda row: sum(len(turn["content"]) for turn in row["prompt"])
    )
    made = tokenizer.apply_chat_template(
        [row["prompt"] for row in longest], add_generation_prompt=True, return_dict=True
    )
    tokens = max(len(ids) for ids in made["input_ids"])
    context, limit = config_of(model).get("max_position_embeddings"), limit or 0
    if context and tokens >= context:
        raise InputError(
            f"prompts have up to {tokens} tokens, and the context of {model} is {context}: there "
            "is no room for a completion, and TRL cuts no prompt; leave them out"
        )
    if context and tokens + limit > context:
        logger.warning(
            "%s: %d tokens do not fit after the longest prompt (%d) into the context of %s (%d): "
            "write %s: %d, or leave such prompts out",
            key, limit, tokens, model, context, key, context - tokens,
        )  # fmt: skip
    return tokens


def check_end(tokenizer: Any, row: Row, model: str, eos_token: str | None = None) -> None:
    """Raise `InputError` unless the end of a turn, as SFT trains it, is where generation stops."""
    from chainforge.generate.settings import ends_of

    folder = Path(tokenizer.name_or_path)
    if folder.is_dir() and not (folder / "tokenizer_config.json").exists():
        raise InputError(f"{folder} has no tokenizer_config.json: transformers would guess it")
    turns = [*row["prompt"], *row["completion"]]
    ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    last = next(one for one in reversed(ids) if tokenizer.decode([one]).strip())
    stops = {tokenizer.convert_tokens_to_ids(eos_token or tokenizer.eos_token)}
    stops |= ends_of(model, local_files_only=True)
    if last in stops:
        return
    word = tokenizer.decode([last])
    advice = f"use a chat template that writes {tokenizer.eos_token} after the assistant's text"
    if last in tokenizer.all_special_ids or last in tokenizer.added_tokens_decoder:
        advice = f"set `eos_token: {word}` in the SFT stage"
    shown = ", ".join(repr(tokenizer.decode([one])) for one in sorted(stops))
    raise InputError(
        f"a turn ends with {word!r}, and generation stops at {shown}: no completion would end; "
        f"{advice}"
    )


def config_of(model: str) -> dict[str, Any]:
    """Return the configuration of a local or cached model; empty if there is none here."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path: Any = Path(model) / "config.json"
    if not path.is_file():
        try:
            path = try_to_load_from_cache(model, "config.json")
        except HFValidationError:
            return {}
    return read_json(path) if isinstance(path, str | Path) else {}
