"""Read what an OpenAI-compatible server answered: its reasoning, its answer, or what is wrong.

Servers keep the reasoning in different places, name the end of a reply differently, and answer
with status 200 what is no answer at all. Nothing is made up here: a reply without a whole
reasoning is rejected with its reason.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chainforge.core.jsonl import Row
from chainforge.core.transcript import is_blank, read
from chainforge.generate.ledger import Amount
from chainforge.generate.prices import token_counts

OPEN, CLOSE = "<think>", "</think>"
DEEPEST = 50  # levels of a reply; a real one has fewer than ten
LARGEST = 2**53  # JSON promises no more digits of an integer than these
LONGEST_NAME = 200
TOKEN_CHARACTERS = 40  # of a text have a token at least: on average they have four
# What helps where a teacher, as a small one, does not say its reasoning apart from its answer.
ASK = (
    "ask for it with `instruction: Reason between <think> and </think>, then give the final "
    "answer.`, or start the server with its reasoning parser"
)

# What servers call the end of a reply, without case and marks: OpenAI, vLLM, SGLang, TGI,
# llama.cpp, DeepSeek, Mistral, and what stands before Anthropic's, Google's, Cohere's, Amazon's,
# Zhipu's and xAI's models.
STOP, LENGTH, FILTERED, BROKEN = "stop", "length", "content_filter", "broken"
_ENDS = {
    STOP: "stop eos eos_token eod end_turn end_of_text stop_sequence stop_token stop_str end word "
    "complete completed finish finished done normal",
    LENGTH: "length max_tokens max_output_tokens max_output max_new_tokens max_length max_len "
    "model_length token_limit limit max_context context_length model_context_window_exceeded",
    FILTERED: "content_filter content_filtered filtered safety image_safety recitation refusal "
    "blocklist prohibited_content spii sensitive guardrail_intervened error_toxic",
    BROKEN: "insufficient_system_resource abort aborted error cancel cancelled canceled "
    "user_cancel network_error server_error internal_error timeout time_limit error_limit",
}
_MARKS = re.compile(r"[^a-z]")
_MEANINGS = {_MARKS.sub("", word): end for end, words in _ENDS.items() for word in words.split()}


class Failure(Exception):
    """A request without a usable answer; `paid` is None as long as nobody told what it cost."""

    def __init__(self, kind: str, message: str, *, usage: Row | None = None) -> None:
        super().__init__(message)
        self.kind, self.usage = kind, usage
        self.paid: Amount | None = None


class Transient(Failure):
    """It failed in a way that may pass: ask again, after `wait` seconds where the server said so.

    `refused` is a 429: there are too many requests, which is nobody's fault but ours. `billed`
    says that the server worked on it, so that each further try costs again.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        wait: float | None = None,
        refused: bool = False,
        billed: bool = False,
        usage: Row | None = None,
    ) -> None:
        super().__init__(kind, message, usage=usage)
        self.wait, self.refused, self.billed = wait, refused, billed


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


class Refused(Rejected):
    """The server did not take the request; the fault is the row's only if it takes others."""


class Fatal(Failure):
    """No other request would fare better: the run stops. The message says what to do."""


@dataclass(frozen=True)
class Reply:
    """A whole answer of a teacher."""

    reasoning: str
    answer: str
    found: str  # where the reasoning was
    end: Row  # `finish_reason`, and `finish_reason_raw` where the server called it otherwise
    model: str | None  # as served, which may not be the one that was asked for
    response: str | None
    fingerprint: str | None
    usage: Row | None


@dataclass(frozen=True)
class Choice:
    """The first choice of a reply: its message, what that says, and why it ended."""

    message: Row
    content: str
    raw: str | None  # the server's own word; None where it gave none
    end: str | None  # one of STOP, LENGTH, FILTERED, BROKEN; None where the word is unknown

    def columns(self) -> Row:
        """Return why it ended for a Sample's row: an unknown end of a whole answer is a stop."""
        end = self.end or STOP
        return {"finish_reason": end} | ({} if self.raw == end else {"finish_reason_raw": self.raw})


def parse_body(data: bytes, hide: Callable[[str], str]) -> Any:
    """Decode a body; `hide` takes secrets out of each text.

    What JSON does not know, and what no file of ours could hold, becomes null or `?`: NaN, numbers
    too large, half characters. Raises `Transient` for what is no JSON, as a proxy's page or a body
    that was cut, and `Rejected` for one that is nested like an attack.
    """
    try:
        return _plain(json.loads(data, parse_int=_integer), hide)
    except RecursionError:
        raise Rejected("malformed", "a reply that is nested too deeply") from None
    except ValueError as error:
        said = data[:LONGEST_NAME].decode("utf-8", "replace")
        raise Transient("malformed", f"a reply that is not JSON ({error}): {said!r}") from None


def _integer(digits: str) -> int | None:
    return int(digits) if len(digits) < 20 and abs(int(digits)) <= LARGEST else None


def _plain(value: Any, hide: Callable[[str], str], depth: int = 0) -> Any:
    if depth > DEEPEST:
        raise RecursionError
    if isinstance(value, str):
        text = hide(value)
        return text if text.isascii() else text.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {
            str(_plain(key, hide, depth + 1)): _plain(item, hide, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_plain(item, hide, depth + 1) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_reply(body: Any, choice: Choice, transcript: str) -> Reply:
    """Take a chat completion and its first choice apart.

    Raises `Rejected` for an answer that is cut off, filtered, empty, or without reasoning.
    """
    usage = usage_of(body)
    said = {"reply": choice.message, "finish_reason": choice.raw}
    if choice.end == LENGTH:
        words = "the reply reached the limit of tokens; raise `max_tokens`"
        raise Rejected("truncated", words, too_short=True, usage=usage, said=said)
    if choice.end == FILTERED:
        raise Rejected("content_filter", "the reply was filtered", usage=usage, said=said)
    reasoning, answer, found = _divide(choice.message, choice.content, transcript)
    odd = "" if choice.end else f" (finish_reason {choice.raw!r})"
    if found == "unclosed":
        words = f"the reasoning was opened by {OPEN} and never closed{odd}; raise `max_tokens`"
        raise Rejected("unfinished_reasoning", words, usage=usage, said=said)
    if is_blank(answer):
        words = f"the reply holds no answer{odd}; ask in `instruction` for one after the reasoning"
        raise Rejected("no_answer", words, usage=usage, said=said)
    if is_blank(reasoning):
        words = f"the reply holds no reasoning{odd}; {ASK}"
        raise Rejected("no_reasoning", words, usage=usage, said=said)
    return Reply(
        reasoning.strip(),
        answer.strip(),
        found,
        choice.columns(),
        text_of(body, "model"),
        text_of(body, "id"),
        text_of(body, "system_fingerprint"),
        usage,
    )


def choice_of(body: Any) -> Choice:
    """Return the first choice of a body.

    Raises `Transient` where there is none, and where the server broke it off.
    """
    first = _first(body)
    if first is None:
        said = (isinstance(body, dict) and body.get("error")) or body
        words = f"a reply without choices: {json.dumps(said):.200}"
        raise Transient("no_choices", words, usage=usage_of(body))
    raw = first.get("finish_reason")
    raw = None if raw in (None, "", "null") else str(raw)[:LONGEST_NAME]
    letters = _MARKS.sub("", (raw or "").lower())
    names = (letters, letters.removeprefix("finishreason"), letters.removeprefix("reason"))
    end = next((_MEANINGS[name] for name in names if name in _MEANINGS), None)
    if end == BROKEN:
        words = f"the reply ended with {raw!r}"
        raise Transient("unfinished", words, billed=True, usage=usage_of(body))
    message = first.get("message")
    message = message if isinstance(message, dict) else {}
    return Choice(message, _text(_parts(message.get("content"), reasoning=False)) or "", raw, end)


def _first(body: Any) -> Row | None:
    choices = body.get("choices") if isinstance(body, dict) else None
    found = isinstance(choices, list) and choices and isinstance(choices[0], dict)
    return choices[0] if found and isinstance(choices, list) else None


def usage_of(body: Any) -> Row | None:
    """Return the usage that a body reports, also one that is no answer.

    None where it cannot be: every request has a prompt, and every text tokens.
    """
    usage = body.get("usage") if isinstance(body, dict) else None
    if (counts := token_counts(usage)) is None:
        return None
    message = (_first(body) or {}).get("message")
    parts = message.items() if isinstance(message, dict) else ()
    said = max((len(str(part)) for name, part in parts if part and name != "role"), default=0)
    cached, prompt, output = counts
    return usage if cached + prompt and said <= TOKEN_CHARACTERS * output else None


def tokens_of(usage: Row | None) -> int | None:
    """Return how many tokens an answer had; None where that is not known."""
    return usage["completion_tokens"] if usage else None


def text_of(body: Any, name: str) -> str | None:
    """Return a short text of a body, such as the model's name."""
    value = body.get(name)
    return value[:LONGEST_NAME] if isinstance(value, str) else None


def reasoning_of(message: Row) -> tuple[str, str] | None:
    """Return a reasoning that has a field or parts of its own, and the name of the field.

    In this order: `reasoning_details` (OpenRouter), `reasoning_content` (DeepSeek, SGLang),
    `reasoning` (vLLM, Ollama), parts of `content` (Mistral).
    """
    for name in ("reasoning_details", "reasoning_content", "reasoning", "content"):
        value = message.get(name)
        text = _text(_parts(value, reasoning=True) if name == "content" else value)
        if text and not is_blank(text):
            return text, name
    return None


def _parts(content: Any, *, reasoning: bool) -> Any:
    """Return the parts of a content that are its reasoning, or all others; a text has no parts."""
    if not isinstance(content, list):
        return None if reasoning else content
    return [part for part in content if _is_reasoning(part) == reasoning]


def _is_reasoning(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    return isinstance(kind, str) and kind.startswith(("thinking", "reasoning"))


def _divide(message: Row, content: str, transcript: str) -> tuple[str, str, str]:
    """Return reasoning, answer, and where the reasoning was found.

    That is a field of its own, or tags in the content: those of `<think>`, or of our own
    transcript when the teacher is a model that was trained on it.
    """
    if own_field := reasoning_of(message):
        # llama.cpp's deepseek-legacy leaves the block in the content as well.
        twice = content.lstrip().startswith(OPEN) and CLOSE in content
        return own_field[0], content.partition(CLOSE)[2] if twice else content, own_field[1]
    if CLOSE in content:
        # A template that primes the opening tag leaves only the closing one.
        before, _, after = content.rpartition(CLOSE)
        return before.replace(OPEN, "", 1), after, "tags"
    if OPEN in content:
        return "", "", "unclosed"
    if own := read(content, transcript):
        return own.reasoning, own.answer, "transcript"
    return "", content, "nowhere"


def _text(value: Any) -> str | None:
    """Return a text, or the joined texts of a list of parts; encrypted parts have none."""
    if isinstance(value, list):
        return "".join(_text(part) or "" for part in value if isinstance(part, dict)) or None
    if isinstance(value, dict):
        names = ("text", "thinking", "reasoning", "summary")
        return _text(next((value[name] for name in names if value.get(name)), None))
    return value if isinstance(value, str) else None
