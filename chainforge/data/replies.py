"""Read what an OpenAI-compatible server answered: its reasoning, its answer, or what is wrong.

Servers keep the reasoning in different places, and answer with status 200 what is no answer at
all. Nothing is made up here: a reply without a whole reasoning is rejected with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chainforge.core.transcript import read

OPEN, CLOSE = "<think>", "</think>"

# The server gave up in the middle; asking again may help.
INTERRUPTED = ("insufficient_system_resource", "aborted")


class Transient(Exception):
    """The request failed in a way that may pass: ask again."""

    def __init__(self, kind: str, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.wait = kind, wait


class Rejected(Exception):
    """The teacher answered, and the answer cannot be used: asking again would buy the same."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Reply:
    """A whole answer of a teacher."""

    reasoning: str
    answer: str
    found: str  # where the reasoning was
    finish_reason: str
    model: str | None  # as served, which may not be the one that was asked for
    response: str | None
    fingerprint: str | None
    usage: dict[str, Any] | None


def read_reply(body: Any, transcript: str) -> Reply:
    """Take a chat completion apart.

    `body` is what the client returned, which for a proxy's page is a string and for an error in
    a body of status 200 a completion without choices. Raises `Transient` for these and
    `Rejected` for an answer that is cut off, empty, or without reasoning.
    """
    choices = getattr(body, "choices", None)
    if not choices:
        said = getattr(body, "error", None) or (body if isinstance(body, str) else "no choices")
        raise Transient("no_choices", f"a reply without choices: {said!s:.200}")
    message, finish = choices[0].message, choices[0].finish_reason
    if message is None or finish is None:
        raise Transient("unfinished", "a reply without message or finish reason")
    if finish in INTERRUPTED:
        raise Transient("unfinished", f"the server stopped: {finish}")
    if finish != "stop":
        kind = {"length": "truncated", "content_filter": "content_filter"}.get(finish)
        raise Rejected(kind or "finish_reason", f"the reply ended with {finish!r}")
    content = message.content if isinstance(message.content, str) else ""
    reasoning, answer, found = _divide(message, content, transcript)
    if not reasoning.strip():
        raise Rejected("no_reasoning", "the reply holds no reasoning")
    if not answer.strip():
        raise Rejected("empty", "the reply holds no answer")
    usage = getattr(body, "usage", None)
    return Reply(
        reasoning.strip(),
        answer.strip(),
        found,
        finish,
        getattr(body, "model", None),
        getattr(body, "id", None),
        getattr(body, "system_fingerprint", None),
        usage.model_dump(exclude_none=True) if usage is not None else None,
    )


def _divide(message: Any, content: str, transcript: str) -> tuple[str, str, str]:
    """Return reasoning, answer, and where the reasoning was found.

    In this order: `reasoning_details` (OpenRouter), `reasoning_content` (DeepSeek, SGLang),
    `reasoning` (vLLM, Ollama), tags in the content: those of `<think>`, or of our own transcript
    when the teacher is a model that was trained on it.
    """
    fields = {
        "reasoning_details": _details(getattr(message, "reasoning_details", None)),
        "reasoning_content": getattr(message, "reasoning_content", None),
        "reasoning": getattr(message, "reasoning", None),
    }
    for found, text in fields.items():
        if isinstance(text, str) and text.strip():
            # Some servers leave the tags in the content as well.
            return text, content.rpartition(CLOSE)[2], found
    if CLOSE in content:
        # A template that primes the opening tag leaves only the closing one.
        before, _, after = content.rpartition(CLOSE)
        return before.replace(OPEN, "", 1), after, "tags"
    if OPEN in content:
        raise Rejected("truncated", f"the reasoning was opened by {OPEN} and never closed")
    if own := read(content, transcript):
        return own.reasoning, own.answer, "transcript"
    return "", content, "nowhere"


def _details(parts: Any) -> str | None:
    """Join the texts of OpenRouter's list; encrypted parts have none."""
    if not isinstance(parts, list):
        return None
    texts = [
        part.get("text") or part.get("summary") or "" for part in parts if isinstance(part, dict)
    ]
    return "".join(text for text in texts if isinstance(text, str)) or None
