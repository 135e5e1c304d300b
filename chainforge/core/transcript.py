"""Read and write transcripts: how a completion separates its reasoning from its answer.

The tags live here and nowhere else. `write` and `read` are inverses; `read` is strict, because
format is a reward.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import regex

from chainforge.core.errors import InputError


class Transcript(NamedTuple):
    """What a well-formed completion says: its reasoning and its answer, both non-empty."""

    reasoning: str
    answer: str


@dataclass(frozen=True)
class Tags:
    """The marks of one preset; an empty `answer_open` means: the answer is the text after."""

    reasoning_open: str
    reasoning_close: str
    answer_open: str
    answer_close: str
    template: str
    system_prompt: str

    @property
    def all(self) -> tuple[str, ...]:
        """Return every tag that is not empty, in the order of a transcript."""
        return tuple(filter(None, list(vars(self).values())[:4]))


DEFAULT = "r1-cold-start"
PRESETS = {
    # DeepSeek-R1 v1, section 2.3.1: |special_token|<reasoning_process>|special_token|<summary>.
    "r1-cold-start": Tags(
        "<reasoning_process>",
        "</reasoning_process>",
        "<summary>",
        "</summary>",
        "<reasoning_process>{reasoning}</reasoning_process>\n<summary>{answer}</summary>",
        "Reason step by step between <reasoning_process> and </reasoning_process>, "
        "then give only the final answer between <summary> and </summary>.",
    ),
    # What the released R1 models write, and what reasoning parsers of servers expect.
    "think": Tags(
        "<think>",
        "</think>",
        "",
        "",
        "<think>\n{reasoning}\n</think>\n\n{answer}",
        "Reason step by step between <think> and </think>, then give only the final answer.",
    ),
}


def tags_of(preset: str) -> Tags:
    """Return the tags of a preset; raise `InputError` for an unknown name."""
    if preset not in PRESETS:
        raise InputError(f"transcript: no preset {preset!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[preset]


# All but white space, control and format characters, half surrogates, characters that Unicode calls
# ignorable (grapheme joiner, fillers, variation selectors), and braille without dots.
_VISIBLE = regex.compile(r"[^\s\p{Cc}\p{Cf}\p{Cs}\p{Default_Ignorable_Code_Point}\u2800]")


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: no character, or only invisible ones."""
    return not _VISIBLE.search(text)


def write(reasoning: str, answer: str, preset: str = DEFAULT) -> str:
    """Write a transcript that `read` takes back; surrounding white space is not kept.

    Raises `InputError` when a part is empty or holds one of the preset's tags.
    """
    tags = tags_of(preset)
    reasoning, answer = reasoning.strip(), answer.strip()
    for part, text in (("reasoning", reasoning), ("answer", answer)):
        if is_blank(text):
            raise InputError(f"transcript: the {part} is empty")
        for tag in tags.all:
            if tag in text:
                raise InputError(f"transcript: the {part} contains the tag {tag}")
    return tags.template.format(reasoning=reasoning, answer=answer)


def read(text: str, preset: str = DEFAULT) -> Transcript | None:
    """Read a transcript strictly; None when it is not one.

    Each tag occurs exactly once, in order, neither part is blank, and only white space is outside
    them.
    """
    tags = tags_of(preset)
    if any(text.count(tag) != 1 for tag in tags.all):
        return None
    one, two, three, four = (re.escape(tag) for tag in list(vars(tags).values())[:4])
    found = re.fullmatch(rf"\s*{one}(.*){two}\s*{three}(.*){four}\s*", text, re.DOTALL)
    if found is None or any(map(is_blank, found.groups())):
        return None
    return Transcript(found[1].strip(), found[2].strip())


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
ALL_TAGS = tuple(dict.fromkeys(tag for preset in PRESETS.values() for tag in preset.all))


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
        and token.content not in ALL_TAGS
    }
