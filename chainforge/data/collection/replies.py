"""Read what an OpenAI-compatible server answered: its reasoning, its answer, or what is wrong.

Servers keep the reasoning in different places, and answer with status 200 what is no answer at
all. Nothing is made up here: a reply without a whole reasoning is rejected with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chainforge.core.records import Row
from chainforge.core.transcript import read
from chainforge.data.collection.ledger import Amount

OPEN, CLOSE = "<think>", "</think>"


class Failure(Exception):
    """A request without a usable answer; `paid` is None as long as nobody told what it cost."""

    def __init__(self, kind: str, message: str, *, usage: Row | None = None) -> None:
        super().__init__(message)
        self.kind, self.usage = kind, usage
        self.paid: Amount | None = None


class Transient(Failure):
    """It failed in a way that may pass: ask again, after `wait` seconds where the server said so.

    `refused` is a 429: there are too many requests, which is nobody's fault but ours.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        wait: float | None = None,
        refused: bool = False,
        usage: Row | None = None,
    ) -> None:
        super().__init__(kind, message, usage=usage)
        self.wait, self.refused = wait, refused


class Rejected(Failure):
    """The teacher answered, and the answer cannot be used: asking again would buy the same.

    `too_short` is the exception: the limit of tokens cut it off. `said` keeps what was paid for.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        too_short: bool = False,
        usage: Row | None = None,
        said: Row | None = None,
    ) -> None:
        super().__init__(kind, message, usage=usage)
        self.too_short, self.said = too_short, said


class Fatal(Failure):
    """No other request would fare better: the run stops. The message says what to do."""


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
    usage: Row | None


def read_reply(body: Any, transcript: str) -> Reply:
    """Take a chat completion apart.

    `body` is what the client returned, which for a proxy's page is a string and for an error in
    a body of status 200 a completion without choices. Raises `Transient` for these and for what
    the server broke off, `Rejected` for an answer that is cut off, filtered, empty, or without
    reasoning.
    """
    usage = usage_of(body)
    message, content, finish = choice_of(body)
    said = {"message": _plain(message)}
    if finish == "length":
        words = "the reply reached the limit of tokens"
        raise Rejected("truncated", words, too_short=True, usage=usage, said=said)
    if finish == "content_filter":
        raise Rejected("content_filter", "the reply was filtered", usage=usage, said=said)
    if finish != "stop":  # insufficient_system_resource, aborted, and whatever comes next
        raise Transient("unfinished", f"the reply ended with {finish!r}", usage=usage)
    reasoning, answer, found = _divide(message, content, transcript)
    if found == "unclosed":
        words = f"the reasoning was opened by {OPEN} and never closed"
        raise Rejected("unfinished_reasoning", words, usage=usage, said=said)
    if not reasoning.strip():
        raise Rejected("no_reasoning", "the reply holds no reasoning", usage=usage, said=said)
    if not answer.strip():
        raise Rejected("no_answer", "the reply holds no answer", usage=usage, said=said)
    return Reply(
        reasoning.strip(),
        answer.strip(),
        found,
        finish,
        getattr(body, "model", None),
        getattr(body, "id", None),
        getattr(body, "system_fingerprint", None),
        usage,
    )


def choice_of(body: Any) -> tuple[Any, str, str]:
    """Return the first choice of a body: its message, what that says, and why it ended.

    Raises `Transient` where there is none.
    """
    usage = usage_of(body)
    choices = getattr(body, "choices", None)
    if not isinstance(choices, list) or not choices:
        words = getattr(body, "error", None) or (body if isinstance(body, str) else "none")
        raise Transient("no_choices", f"a reply without choices: {words!s:.200}", usage=usage)
    message = getattr(choices[0], "message", None)
    finish = getattr(choices[0], "finish_reason", None)
    if message is None or finish is None:
        raise Transient("unfinished", "a reply without message or finish reason", usage=usage)
    content = getattr(message, "content", None)
    return message, content if isinstance(content, str) else "", finish


def usage_of(body: Any) -> Row | None:
    """Return the usage that a body reports, also one that is no answer."""
    usage = _plain(getattr(body, "usage", None))
    return usage or None


def _plain(value: Any) -> Row:
    """Return one of the client's objects as a mapping."""
    return dict(value.model_dump(exclude_none=True)) if hasattr(value, "model_dump") else {}


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
            # llama.cpp's deepseek-legacy leaves the block in the content as well.
            twice = content.lstrip().startswith(OPEN) and CLOSE in content
            return text, content.partition(CLOSE)[2] if twice else content, found
    if CLOSE in content:
        # A template that primes the opening tag leaves only the closing one.
        before, _, after = content.rpartition(CLOSE)
        return before.replace(OPEN, "", 1), after, "tags"
    if OPEN in content:
        return "", "", "unclosed"
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
