"""The marks that chat templates write around turns, such as `<|im_end|>`.

Read as tokens they end a turn or begin another, whoever wrote them. So what a model wrote must not
hold any before it is trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from chainforge.core.transcript import PRESETS

# Of ChatML, Llama, Phi, Cohere, gpt-oss, Gemma, DeepSeek, Mistral, GLM and their like. Each part is
# bounded or excludes its own beginning, so that the search is linear; each pattern begins with one
# character, which makes it fast.
_MARK = re.compile(
    r"<(?:\|/?[A-Za-z_][\w▁/-]+\|?>|[A-Za-z_]\w+\|>|｜[^｜<>\n]{1,60}｜>"
    r"|/?(?:s|bos|eos|pad|unk|sop|eop)>|(?:start|end)_of_(?:turn|text|utterance|image)>"
    r"|</?SYS>>)"
)
_BRACKETS = re.compile(
    r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|gMASK)\]"
)
_TAGS = frozenset(tag for preset in PRESETS.values() for tag in preset.all)


def chat_mark(text: str, special: Iterable[str] = ()) -> str | None:
    """Return a chat template's mark in a text, or one of the `special` tokens; None without."""
    found = _MARK.search(text) or ("[" in text and _BRACKETS.search(text))
    return found[0] if found else next((token for token in special if token in text), None)


def special_ids(tokenizer: Any) -> dict[int, str]:
    """Return the ids and texts of a tokenizer's special tokens, those of chat templates included.

    The tags of transcripts are left out: they are meant to be written.
    """
    return {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if (token.special or chat_mark(token.content) == token.content)
        and token.content not in _TAGS
    }
