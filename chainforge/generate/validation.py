"""What an answer must be like before it may teach: each check has a name, and is counted by it.

After DeepSeek-R1, appendix B.3: reasoning that repeats itself or mixes languages is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, question
from chainforge.core.transcript import PRESETS, chat_mark
from chainforge.data.filters import language_share, repetition
from chainforge.generate.replies import Rejected, Reply
from chainforge.rewards.language import scripts_of

TAGS = tuple(dict.fromkeys(tag for preset in PRESETS.values() for tag in preset.all))


@dataclass
class ValidationArgs:
    """What a teacher's answer must be like."""

    min_reasoning_chars: int = field(
        default=20, metadata={"help": "A shorter reasoning is rejected as short_reasoning."}
    )
    language: str | None = field(
        default=None,
        metadata={
            "help": "Language of the reasoning, such as en; when left out, one that is written in "
            "the same script as the question."
        },
    )
    min_language: float = field(
        default=0.8,
        metadata={"help": "Least share of the reasoning's words in that script; 0: no check."},
    )
    max_repetition: float = field(
        default=0.3,
        metadata={"help": "Most of the reasoning that may repeat itself, as a share; 1: no check."},
    )


def check_settings(args: ValidationArgs) -> None:
    """Raise `InputError` for a setting that can mean nothing."""
    for name in ("min_language", "max_repetition"):
        if not 0 <= getattr(args, name) <= 1:
            raise InputError(f"{name}: expected a share from 0 to 1, found {getattr(args, name)}")
    if args.language is not None:
        scripts_of(args.language)


def validate(reply: Reply, row: Row, args: ValidationArgs) -> None:
    """Raise `Rejected`, with the name of the first check that a reply does not pass."""
    fault = _fault(reply, row, args)
    if fault is not None:
        said = {"reasoning": reply.reasoning, "answer": reply.answer}
        raise Rejected(*fault, usage=reply.usage, said=said)


def _fault(reply: Reply, row: Row, args: ValidationArgs) -> tuple[str, str] | None:
    size = len(reply.reasoning)
    if size < args.min_reasoning_chars:
        found = f"the reasoning has {size} characters"
        return "short_reasoning", _accepted(found, args, "min_reasoning_chars", size)
    for part, text in (("reasoning", reply.reasoning), ("answer", reply.answer)):
        for tag in TAGS:
            if tag in text:
                return "tags", f"the {part} contains the tag {tag}; ask in `instruction` for none"
        if mark := chat_mark(text):
            return "chat_token", f"the {part} contains the chat template's mark {mark}"
    right = language_share(reply.reasoning, args.language, question(row))
    if right < args.min_language:
        found = f"{right:.0%} of the reasoning's words are in the language asked for"
        return "language", _accepted(found, args, "min_language", math.floor(100 * right) / 100)
    repeated = repetition(reply.reasoning)
    if repeated > args.max_repetition:
        found = f"{repeated:.0%} of the reasoning repeats itself"
        accepting = math.ceil(100 * repeated) / 100
        return "repetition", _accepted(found, args, "max_repetition", accepting)
    return None


def _accepted(found: str, args: ValidationArgs, name: str, value: float) -> str:
    """Return a fault with the setting that would accept the reply."""
    return f"{found}, {name} is {getattr(args, name)}; `{name}: {value:g}` would accept it"
