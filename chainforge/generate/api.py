"""The engine for OpenAI-compatible servers: requests, replies, and what each failure means.

The official client sends each request. Bodies are read up to a limit, and a redirect is never
followed: key and prompt go to the configured address only. Nothing is made up: a reply without an
answer is rejected with its reason.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Message, Row
from chainforge.core.secrets import SHORTEST, forms, read_secret
from chainforge.core.transcript import is_blank
from chainforge.data.datasets import REASONING_FIELDS
from chainforge.generate.budget import NOTHING, Amount, Ledger, Limits, Price, token_counts, usd
from chainforge.generate.dispatch import (
    Dispatcher,
    Failure,
    Fatal,
    Job,
    Limiter,
    Refused,
    Rejected,
    Transient,
    last_words,
)
from chainforge.generate.settings import (
    KEYS,
    Draw,
    RequestArgs,
    SamplingArgs,
    Take,
    read_address,
)
from chainforge.generate.shards import rank

if TYPE_CHECKING:
    import httpx2
    import openai

logger = logging.getLogger(__name__)

# No other request would succeed: the run stops, and says what to do.
FATAL = {
    401: "The key is not accepted: check {variable}",
    402: "The account has no balance left: top it up",
    403: "The account may not do this: check its rights and region",
    404: "There is no such model or address: check `model` and `base_url`",
    407: "The proxy requires a password: check HTTPS_PROXY and HTTP_PROXY",
}
TRANSIENT = (408, 409, 425, 429)
CONNECT_SECONDS = 60.0
LARGEST_BODY = 32 * 2**20  # bytes: more than twice the longest answer of any model
LARGEST_ERROR = 2**16
LONGEST_MESSAGE = 400  # characters of a server's message
LONGEST_NAME = 200
DEEPEST = 50  # levels of a reply; a real one has fewer than ten
LARGEST_INTEGER = 2**53  # JSON promises no more digits than these
FIRST_LEVEL = 10  # requests at a time, to begin with
LONGER = 2  # an answer that was cut off is asked for once more, with so many times the tokens
# A tokenizer makes at most one token of a byte; a chat template adds its own around each turn.
TURN_TOKENS, TEMPLATE_TOKENS = 16, 256
TOKEN_CHARACTERS = 40  # of a text have a token at least: on average they have four
STANDARD = ("temperature", "top_p", "n", "seed", "thinking")  # fields that no hint need name
# vLLM and SGLang else fill these from the model's generation config.
NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0}

_NO_MODEL = re.compile(r"model\W.{0,40}not (exist|found|available)|(no such|unknown) model", re.I)
# A 403 with which a service refuses one prompt.
_FLAGGED = re.compile(r"\bflagged\b|moderation|content.{0,20}(policy|filter|risk)", re.I)
_UNKNOWN_FIELD = re.compile(
    r"\b(extra|unexpected|unknown|unrecogni[sz]ed|unsupported|not (permitted|allowed|supported))\b",
    re.I,
)

# What servers call the end of a reply, without case and punctuation: OpenAI, vLLM, SGLang, TGI,
# llama.cpp, DeepSeek, Mistral, and gateways to Anthropic, Google, Cohere, Amazon, Zhipu and xAI.
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
_LETTERS = re.compile(r"[^a-z]")
_MEANINGS = {_LETTERS.sub("", word): end for end, words in _ENDS.items() for word in words.split()}


def digest(value: Any) -> str:
    """Return the hash of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True)
class Endpoint:
    """A server, a model, and what is sent with every prompt."""

    address: str
    model: str
    max_new_tokens: int
    further: Row  # all other fields of a request
    instruction: str | None = None  # the system turn; None: the prompt's own
    limit: str = "max_tokens"  # what this server calls the limit of tokens
    seeded: bool = False  # whether the seed of each draw is sent
    variable: str = KEYS["openai"]

    @property
    def host(self) -> str:
        """Return the server's host and port."""
        return urlsplit(self.address).netloc

    def messages(self, row: Row) -> list[Message]:
        """Return the turns to send: the prompt's, under the teacher's instruction if any."""
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["prompt"]]
        if self.instruction is None:
            return turns
        turns = [turn for turn in turns if turn["role"] != "system"]
        head = [{"role": "system", "content": self.instruction}] if self.instruction else []
        return head + turns

    def parameters(self, *, longer: bool = False, seed: int | None = None) -> Row:
        """Return everything of a request but its messages."""
        limit = self.max_new_tokens * (LONGER if longer else 1)
        seeds = {"seed": seed} if self.seeded else {}
        return self.further | {"model": self.model, self.limit: limit} | seeds

    def most_tokens(self, row: Row, longer: bool = False) -> tuple[int, int]:
        """Return the most tokens that a prompt and its answer can have."""
        turns = self.messages(row)
        size = sum(len(turn["content"].encode("utf-8", "replace")) for turn in turns)
        prompt = size + TURN_TOKENS * len(turns) + TEMPLATE_TOKENS
        return prompt, self.max_new_tokens * (LONGER if longer else 1)


def request_key(endpoints: Sequence[Endpoint], draw: Draw) -> str:
    """Return the hash of a request: another model, prompt or setting never gets its answer."""
    asked = sorted(
        json.dumps([one.address, one.messages(draw.row), one.parameters(seed=draw.seed)])
        for one in endpoints
    )
    return digest([draw.row["id"], asked, draw.sample])[:24]


Reader = Callable[["Choice", Row | None], Row]  # a reply and its usage to `completion` and others


class Server:
    """One server: sends requests, and judges what comes back."""

    def __init__(
        self, endpoint: Endpoint, read: Reader, timeout: float, price: Price | None = None
    ) -> None:
        import openai

        self.endpoint, self.read, self.timeout, self.price = endpoint, read, timeout, price
        self.key = read_secret(endpoint.variable)
        self.under_way = 0
        self.faults = 0  # in a row
        self.heard = False  # whether a server has answered at this address
        self.unknown_ends: set[str] = set()
        self.version = f"openai {openai.__version__}"
        for name in ("httpx2", "httpcore2"):  # a line for every request
            logging.getLogger(name).setLevel(logging.WARNING)
        # The client sends headers from the environment, which are OpenAI's, to any server.
        lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")
        ambient = [line.partition(":")[0].strip() for line in lines]
        ambient += ["OpenAI-Organization", "OpenAI-Project"]
        none = openai.Omit()
        self.headers: dict[str, str | openai.Omit] = dict.fromkeys(ambient, none)
        self.headers["Authorization"] = f"Bearer {self.key}" if self.key else none
        self.client = self.open()

    def open(self) -> openai.AsyncOpenAI:
        """Return a client; raise `InputError` where the environment allows none."""
        import httpx2
        import openai

        try:
            return openai.AsyncOpenAI(
                api_key=self.key or "none",
                base_url=self.endpoint.address,
                max_retries=0,
                # Of each read, not in all; `_post` sets the deadline.
                timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, CONNECT_SECONDS)),
                http_client=httpx2.AsyncClient(
                    limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
                    follow_redirects=False,
                    event_hooks={"response": [self._check]},
                ),
            )
        except (ValueError, ImportError, OSError, httpx2.InvalidURL) as error:
            raise InputError(
                f"no request can be sent: {self._clean(str(error))}. Check the environment "
                "variables HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
            ) from None

    async def ask(self, job: Job) -> tuple[Row, Amount | None]:
        """Send one request; return the answer's columns and what it cost, None if unknown."""
        sent, started = datetime.now(UTC), time.monotonic()
        try:
            body = await self._post(job)
            try:
                choice = self._choice(body)
                usage = usage_of(body)
                columns = self.read(choice, usage)
            except Failure:
                raise
            except Exception as error:  # no reply, however odd, ends the run
                words = f"a reply that cannot be read: {type(error).__name__}: {error}"
                raise Rejected("unreadable", words) from None
        except Failure as error:
            if error.paid is None:
                error.paid = self._paid(error.usage, sent)
            error.args = (self._clean(str(error), 2 * LONGEST_MESSAGE),)
            if isinstance(error, Rejected):
                error.said = (error.said or {}) | {"usage": error.usage}
            raise error from None
        columns |= {"tokens": usage["completion_tokens"] if usage else None, **choice.ended()}
        if self.endpoint.instruction is None:
            return columns | {"served": _name(body, "model")}, self._paid(usage, sent)
        columns |= {
            "source": self.endpoint.model,
            "model": _name(body, "model"),
            "system_fingerprint": _name(body, "system_fingerprint"),
            "response_id": _name(body, "id"),
            "host": self.endpoint.host,
            "sampling": self.endpoint.parameters(longer=job.longer, seed=job.draw.seed),
            "prompt_hash": digest(self.endpoint.messages(job.draw.row))[:16],
            "usage": usage,
            "cost": self.price.cost(usage, sent, datetime.now(UTC)) if self.price else None,
            "price_date": self.price.date if self.price else None,
            "latency": round(time.monotonic() - started, 3),
            "time": sent.isoformat(timespec="seconds"),
            "client": self.version,
        }
        return columns, self._paid(usage, sent)

    def _paid(self, usage: Row | None, sent: datetime) -> Amount | None:
        counts = token_counts(usage)
        if counts is None:
            return None
        cost = self.price.cost(usage, sent, datetime.now(UTC)) if self.price else None
        return Amount(cost, sum(counts))

    def _choice(self, body: Any) -> Choice:
        """Return a body's first choice; log an unknown finish_reason, once."""
        choice = choice_of(body)
        word = repr(choice.raw) if choice.raw else "none"
        if choice.end is None and word not in self.unknown_ends and len(self.unknown_ends) < 20:
            self.unknown_ends.add(word)
            logger.warning("%s: unknown finish_reason (%s): complete answers are kept, others "
                           "are rejected", self.endpoint.model, word)  # fmt: skip
        return choice

    async def _post(self, job: Job) -> Any:
        """Send one request and return the body; raise a `Failure` for what goes wrong."""
        import httpx2
        import openai

        try:
            async with (
                asyncio.timeout(self.timeout),
                self.client.chat.completions.with_streaming_response.create(
                    model=self.endpoint.model,
                    messages=self.endpoint.messages(job.draw.row),  # type: ignore[arg-type]
                    extra_body=self.endpoint.parameters(longer=job.longer, seed=job.draw.seed),
                    extra_headers=self.headers,  # type: ignore[arg-type]
                ) as response,
            ):
                data = await _read_body(response.http_response, LARGEST_BODY)
        except TimeoutError:
            raise Transient("timeout", f"no answer within {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise self._not_sent(error.__cause__ or error) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, UnicodeError) as error:
            raise self._not_sent(error) from None
        if len(data) > LARGEST_BODY:
            words = f"the reply is larger than {LARGEST_BODY >> 20} MiB"
            raise Rejected("too_large", words)
        return parse_body(data, self._without_key)

    async def _check(self, response: httpx2.Response) -> None:
        """Raise a `Failure` for an error status; the client would read all of the body."""
        self.heard = True
        if not response.is_success:
            raise self._status_failure(response, await _read_body(response, LARGEST_ERROR))

    def _not_sent(self, error: BaseException) -> Failure:
        """Return what an error of sending means: wrong settings, a bad row, or a transient."""
        import httpx2

        said = f"{self.endpoint.address}: {type(error).__name__}: {self._clean(str(error))}"
        failure: Failure
        if isinstance(error, UnicodeEncodeError) and error.encoding == "utf-8":  # of the body
            failure = Rejected("unsendable", f"the prompt is not valid text: {error.reason}")
        elif advice := _wrong_settings(error, self.heard):
            failure = Fatal("settings", f"{said}. {advice}")
        elif isinstance(error, httpx2.TimeoutException):
            failure = Transient("timeout", said)
        else:
            failure = Transient("connection", said)
        # Nothing was sent, so nothing can be billed.
        before = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError)
        unsent = not isinstance(failure, Transient) or isinstance(error, before)
        failure.paid = NOTHING if unsent else None
        return failure

    def _status_failure(self, response: httpx2.Response, data: bytes) -> Failure:
        """Return what a status means: the run, this row, or only this try is lost."""
        status = response.status_code
        text = data[:LARGEST_ERROR].decode("utf-8", "replace")
        words = _words(text)
        said = self._clean(f"status {status}: {words}")
        kind = f"status_{status}"
        fatal = 404 if status == 400 and _NO_MODEL.search(words) else status
        failure: Failure
        if response.is_redirect:
            place = self._clean(response.headers.get("location", "elsewhere"))
            advice = f"Set `base_url` to where the API is ({place}): redirects are not followed"
            failure = Fatal(kind, f"{self.endpoint.address}: status {status}. {advice}")
        elif fatal in FATAL and not (status == 403 and _FLAGGED.search(words)):
            advice = FATAL[fatal].format(variable=self.endpoint.variable)
            failure = Fatal(kind, f"{self.endpoint.address}: {said}. {advice}")
        elif status in TRANSIENT or status >= 500:
            failure = Transient(kind, said)
            failure.wait, failure.refused = _retry_after(response), status == 429
        else:
            failure = Refused(kind, said + self._hint(text))
        # Refused before any work; of other errors one cannot know whether they are billed.
        failure.paid = NOTHING if status == 503 or (status < 500 and status != 408) else None
        return failure

    def _hint(self, text: str) -> str:
        """Return what to do about fields of `extra_body` that a server does not know."""
        sent = [name for name in self.endpoint.further if name not in STANDARD]
        named = [name for name in sent if re.search(rf"\b{re.escape(name)}\b", text)]
        if not named and not _UNKNOWN_FIELD.search(text):
            return ""
        fields = ", ".join(named or sent)
        advice = "leave them out of `extra_body` (`extra_body: {}` sends none of them)"
        return f". Fields that the server may not know: {fields}; {advice}" if fields else ""

    def _clean(self, text: str, most: int = LONGEST_MESSAGE) -> str:
        """Return a foreign message on one line, cut, printable, and without the key."""
        words = " ".join(self._without_key(text).split())
        return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in words)[:most]

    def _without_key(self, text: str) -> str:
        for form in forms(self.key) if len(self.key) >= SHORTEST else ():
            text = text.replace(form, "***")
        return text


async def _read_body(response: httpx2.Response, most: int) -> bytes:
    """Return a body, or the beginning of a larger one: a little more than `most` bytes."""
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > most:
            break
    return bytes(data)


def _words(text: str) -> str:
    """Return the message of an error's body, whatever the server calls it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "errors", "message", "detail", "msg"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _wrong_settings(error: BaseException, heard: bool) -> str | None:
    """Return what to do where no request can be sent with these settings; else None.

    Once a server was `heard`, an unknown host name may be transient.
    """
    import httpx2

    if isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol | UnicodeError):
        return "Check `base_url`"
    if isinstance(error, httpx2.ProxyError) and "407" in str(error):
        return FATAL[407]
    if isinstance(error, httpx2.LocalProtocolError) and "header" in str(error).lower():
        return "A header cannot be sent: check the key"
    passing = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
    for cause in _causes(error) if isinstance(error, httpx2.ConnectError) else ():
        if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME and not heard:
            return "No such host is known: check `base_url`, or the proxy's name in HTTPS_PROXY"
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, passing):
            return "Check `base_url` (http or https?), and SSL_CERT_FILE for a private certificate"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _retry_after(response: httpx2.Response) -> float | None:
    """Return the seconds that a server asks to wait for, where it says so in seconds."""
    try:
        seconds = float(response.headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return seconds if 0 <= seconds < float("inf") else None


def parse_body(data: bytes, hide: Callable[[str], str]) -> Any:
    """Decode a body; `hide` removes secrets from each text.

    What JSON does not know, and no file of ours could hold, becomes null or `?`: NaN, huge numbers,
    half characters. Raises `Transient` for a body that is not JSON, such as a proxy's page or a cut
    body, and `Rejected` for one that is nested like an attack.
    """
    try:
        return _plain(json.loads(data, parse_int=_integer), hide)
    except RecursionError:
        raise Rejected("malformed", "a reply that is nested too deeply") from None
    except ValueError as error:
        said = data[:LONGEST_NAME].decode("utf-8", "replace")
        raise Transient("malformed", f"a reply that is not JSON ({error}): {said!r}") from None


def _integer(digits: str) -> int | None:
    return int(digits) if len(digits) < 20 and abs(int(digits)) <= LARGEST_INTEGER else None


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


@dataclass(frozen=True)
class Choice:
    """The first choice of a reply: its message, the text of that, and why it ended."""

    message: Row
    content: str
    raw: str | None  # the server's own word; None where it gave none
    end: str | None  # one of STOP, LENGTH, FILTERED; None where the word is unknown

    @property
    def said(self) -> Row:
        """Return what the row of a failure keeps of the reply."""
        return {"reply": self.message, "finish_reason": self.raw}

    def ended(self) -> Row:
        """Return the end for a Sample's row: an unknown end of a complete answer is a stop."""
        end = self.end or STOP
        return {"finish_reason": end} | ({} if self.raw == end else {"finish_reason_raw": self.raw})


def choice_of(body: Any) -> Choice:
    """Return the first choice of a body; raise `Transient` without one, or if it was broken off."""
    first = _first(body)
    if first is None:
        said = (isinstance(body, dict) and body.get("error")) or body
        words = f"a reply without choices: {json.dumps(said):.200}"
        raise Transient("no_choices", words, usage=usage_of(body))
    raw = first.get("finish_reason")
    raw = None if raw in (None, "", "null") else str(raw)[:LONGEST_NAME]
    letters = _LETTERS.sub("", (raw or "").lower())
    names = (letters, letters.removeprefix("finishreason"), letters.removeprefix("reason"))
    end = next((_MEANINGS[name] for name in names if name in _MEANINGS), None)
    if end == BROKEN:
        failure = Transient("unfinished", f"the reply ended with {raw!r}", usage=usage_of(body))
        failure.billed = True
        raise failure
    message = first.get("message")
    message = message if isinstance(message, dict) else {}
    return Choice(message, _text(_parts(message.get("content"), reasoning=False)) or "", raw, end)


def _first(body: Any) -> Row | None:
    choices = body.get("choices") if isinstance(body, dict) else None
    found = isinstance(choices, list) and choices and isinstance(choices[0], dict)
    return choices[0] if found and isinstance(choices, list) else None


def usage_of(body: Any) -> Row | None:
    """Return the usage that a body reports, also one that is no answer.

    None for an impossible one: every request has a prompt, and every text tokens.
    """
    usage = body.get("usage") if isinstance(body, dict) else None
    if (counts := token_counts(usage)) is None:
        return None
    message = (_first(body) or {}).get("message")
    parts = message.items() if isinstance(message, dict) else ()
    said = max((len(str(part)) for name, part in parts if part and name != "role"), default=0)
    cached, prompt, output = counts
    return usage if cached + prompt and said <= TOKEN_CHARACTERS * output else None


def _name(body: Any, key: str) -> str | None:
    """Return a short text of a body, such as the model's name."""
    value = body.get(key)
    return value[:LONGEST_NAME] if isinstance(value, str) else None


def reasoning_of(message: Row) -> tuple[str, str] | None:
    """Return a reasoning that has a field or parts of its own, and the name of the field."""
    for name in ("reasoning_details", *REASONING_FIELDS, "content"):
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


def _text(value: Any) -> str | None:
    """Return a text, or the joined texts of a list of parts; encrypted parts have none."""
    if isinstance(value, list):
        return "".join(_text(part) or "" for part in value if isinstance(part, dict)) or None
    if isinstance(value, dict):
        names = ("text", "thinking", "reasoning", "summary")
        return _text(next((value[name] for name in names if value.get(name)), None))
    return value if isinstance(value, str) else None


class ApiEngine:
    """A model behind one or several servers; each request goes where the fewest are under way.

    `strict`: a completion that is missing at the end is an error, and asked for in the next run.
    """

    def __init__(
        self,
        args: RequestArgs,
        servers: Sequence[Server],
        ledger: Path,
        ceiling: int,
        *,
        limits: Limits | None = None,
        strict: bool = True,
        fallback: Callable[[Draw], Row] | None = None,
    ) -> None:
        self.args, self.servers, self.ledger_path = args, servers, ledger
        self.limits, self.strict, self.fallback = limits, strict, fallback
        ceiling = args.max_concurrency or ceiling
        self.limiter = Limiter(ceiling, FIRST_LEVEL, args.retry_wait)
        self._ledger: Ledger | None = None
        self._dispatcher: Dispatcher | None = None

    def spending(self) -> Row:
        """Return what all runs have spent."""
        with Ledger(self.ledger_path) as ledger:
            return ledger.summary()

    def key(self, draw: Draw) -> str:
        """Return what makes a draw the same request in another run."""
        return request_key([server.endpoint for server in self.servers], draw)

    def sample(self, draws: Sequence[Draw], take: Take) -> None:
        """Sample every draw; answers that an interrupted run paid for are used first."""
        with Ledger(self.ledger_path, self.limits) as ledger:
            self._ledger = ledger
            self._dispatcher = run = Dispatcher(
                self.args, self.ask, self.worst, ledger, take, self.limiter,
                strict=self.strict, fallback=self.fallback,
            )  # fmt: skip
            jobs = []
            for draw in draws:
                if (key := self.key(draw)) in ledger.answers:
                    run.arrive(draw, ledger.answers[key])
                else:
                    jobs.append(Job(draw, key))
            asyncio.run(self._run(run, jobs))
            ledger.forget_answers()  # `take` has them on disk
        if run.lost and self.strict:
            raise InputError(
                f"{len(run.lost)} of {len(draws)} completions are missing. {last_words(run.lost)} "
                "Run the same command again to ask for these alone"
            )

    async def _run(self, run: Dispatcher, jobs: Sequence[Job]) -> None:
        for server in self.servers:
            server.client = server.open()  # a client belongs to one event loop
        try:
            await run.run(jobs)
        finally:
            for server in self.servers:
                await server.client.close()

    def worst(self, job: Job) -> Amount:
        """Return the most that a request can cost."""
        prompt, limit = self.servers[0].endpoint.most_tokens(job.draw.row, job.longer)
        price = self.servers[0].price
        return Amount(price.worst(prompt, limit) if price else None, prompt + limit)

    async def ask(self, job: Job) -> tuple[Row, Amount | None]:
        """Ask the server that is least busy; one that failed is passed over for a while."""
        server = min(self.servers, key=lambda one: one.under_way + (2**one.faults - 1))
        server.under_way += 1
        try:
            answer = await server.ask(job)
        except Transient as error:
            server.faults = min(server.faults + (not error.refused), 16)
            raise
        else:
            for other in self.servers:  # one that is passed over must be tried again some day
                other.faults = max(0, other.faults - 1) if other is not server else 0
            return answer
        finally:
            server.under_way -= 1

    def describe(self, share: float) -> str:
        """Return cost so far and as foreseen, requests at once, speed, and failures."""
        words = [] if self._dispatcher is None else [self._dispatcher.describe()]
        if self._ledger is not None and self.servers[0].price:
            told, unsure = self._ledger.told.usd or 0.0, self._ledger.unsure.usd
            words.insert(0, usd(told) + (f" of ~{usd(told / share)}" if 0 < share < 1 else ""))
            if unsure:
                words.append(f"{usd(unsure)} at most for lost requests")
        return ", ".join(words)


def policy_engine(args: SamplingArgs, policy: str, directory: Path) -> ApiEngine:
    """Return the engine `api`: servers whose model gets the prompt as it is."""
    extra = NEUTRAL | {"top_k": args.top_k or -1} if args.extra_body is None else args.extra_body
    further = {"temperature": args.temperature, "top_p": args.top_p, "n": 1} | extra
    model = args.served_model or policy
    servers = [
        Server(
            Endpoint(read_address(url), model, args.max_new_tokens, further, seeded=True),
            read_completion,
            args.timeout,
        )
        for url in args.urls
    ]
    return ApiEngine(args, servers, directory / f"requests.rank-{rank()}.jsonl", 256)


def read_completion(choice: Choice, usage: Row | None) -> Row:
    """Return a policy's completion, cut off or not; raise a `Failure` if there is none."""
    if parsed := reasoning_of(choice.message):
        raise Fatal(
            "reasoning_parser",
            "the server took the reasoning out of the completion "
            f"({parsed[0]!r:.60}): start it without a reasoning parser",
        )
    # A model may end its turn at once: that is an empty text. No text at all is no completion.
    empty = choice.message.get("content") == "" and choice.end in (STOP, LENGTH)
    if not choice.content and not empty:
        words = f"the reply contains no answer (finish_reason {choice.raw!r})"
        raise Rejected("no_answer", words, usage=usage, said=choice.said)
    return {"completion": choice.content}
