"""Keep what messages say from becoming special tokens, and a template's errors readable.

A tokenizer reads the text that a chat template wrote, and cannot tell the template's `<|im_end|>`
from one that a user or a teacher wrote. A shielded tokenizer is given the latter in two pieces.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from chainforge.core.errors import InputError, first_line
from chainforge.core.transcript import special_ids

# Unicode's noncharacters: no text has them, and templates leave them as they are.
_CUTS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def shield(tokenizer: Any) -> Any:
    """Have a tokenizer's `apply_chat_template` take special tokens within messages for text.

    The tokens still spell the same text. A template that fails on a conversation raises
    `InputError`. Returns the tokenizer itself.
    """
    if not isinstance(tokenizer.apply_chat_template, functools.partial):
        longest = sorted(special_ids(tokenizer).values(), key=len, reverse=True)
        marks = re.compile("|".join(re.escape(mark) for mark in longest) or "(?!)")
        tokenizer.apply_chat_template = functools.partial(_apply, tokenizer, marks)
    return tokenizer


def _apply(
    tokenizer: Any, marks: re.Pattern[str], conversation: Any, *args: Any, **options: Any
) -> Any:
    """Do what `apply_chat_template` does, with a cut in every special token within a message."""
    plain = functools.partial(_plain, tokenizer)
    many = bool(conversation) and isinstance(conversation[0], list)
    each = conversation if many else [conversation]
    if not options.get("tokenize", True) or not any(_found(turns, marks) for turns in each):
        return plain(conversation, *args, **options)
    if many and not options.get("padding") and options.get("return_dict", True):
        made = [_apply(tokenizer, marks, turns, *args, **options) for turns in each]
        return {name: [one[name] for one in made] for name in made[0]}
    if many or args or options.get("padding") or options.get("return_assistant_tokens_mask"):
        mark = next(found for turns in each if (found := _found(turns, marks)))
        raise InputError(
            f"a message contains {mark}, which is a special token of the tokenizer: leave the row "
            "out (assistant_only_loss and padded batches cannot take it for text)"
        )
    return _encode(tokenizer, plain, marks, conversation, options)


def _plain(tokenizer: Any, *args: Any, **options: Any) -> Any:
    """Do what `apply_chat_template` does; raise `InputError` where the template fails."""
    try:
        return type(tokenizer).apply_chat_template(tokenizer, *args, **options)
    except Exception as error:  # a template is a program, and may raise anything
        raise InputError(f"the chat template fails: {first_line(error)}") from error


def _encode(tokenizer: Any, plain: Any, marks: Any, turns: Any, options: dict[str, Any]) -> Any:
    """Return the tokens of one conversation, none of them special that a message spells."""
    whole = str(turns)
    cut = next(character for character in _CUTS if character not in whole)

    # The first character of each, also of one that begins within another.
    begins = re.compile(f"(?s)(?=(?:{marks.pattern})).")

    def divided(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        return begins.sub(lambda found: found[0] + cut, text)

    shown = [{key: divided(value) for key, value in turn.items()} for turn in turns]
    rendering = {"tokenize", "return_dict", "return_tensors", "tokenizer_kwargs"}
    asked = {key: value for key, value in options.items() if key not in rendering}
    first, *others = plain(shown, tokenize=False, **asked).split(cut)
    ids = [*_ids(tokenizer, first)]
    for piece in others:
        ids += _continued(tokenizer, piece)
    if not options.get("return_dict", True):
        return ids
    return {"input_ids": ids, "attention_mask": [1] * len(ids)}


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _continued(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text in mid-sentence: SentencePiece would put a blank before it."""
    before, whole = _ids(tokenizer, "\n"), _ids(tokenizer, f"\n{text}")
    if whole[: len(before)] == before:
        return whole[len(before) :]
    return _ids(tokenizer, text)


def _found(turns: Any, marks: re.Pattern[str]) -> str | None:
    """Return the first special token within a conversation's messages."""
    for turn in turns:
        for text in turn.values():
            if isinstance(text, str) and (found := marks.search(text)):
                return found[0]
    return None
