"""A teacher behind an OpenAI-compatible API: one request, its outcome, and what it cost.

The official client sends it. Retries, pauses and limits are the collector's business. Bodies are
read up to a limit, and a redirect is never followed: key and prompt go to the address that was
given, and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.core.secrets import SHORTEST, forms
from chainforge.core.transcript import write
from chainforge.generate.endpoint import KEYS, STANDARD, Endpoint, key_of, price_of
from chainforge.generate.ledger import NOTHING, Amount
from chainforge.generate.prices import token_counts
from chainforge.generate.replies import (
    Choice,
    Failure,
    Fatal,
    Refused,
    Rejected,
    Reply,
    Transient,
    choice_of,
    parse_body,
    read_reply,
    tokens_of,
)
from chainforge.generate.validation import validate

if TYPE_CHECKING:
    import httpx2
    import openai

    from chainforge.generate.settings import TeacherArgs

logger = logging.getLogger(__name__)

# No other request would fare better: the run stops, and says what to do.
FATAL = {
    401: "The key is not accepted: check {variable}",
    402: "The account has no balance left: top it up",
    403: "The account may not do this: check its rights and region",
    404: "There is no such model or address: check `model` and `base_url`",
    407: "The proxy wants a password: check HTTPS_PROXY and HTTP_PROXY",
}
PASSING = (408, 409, 425, 429)
CONNECT_SECONDS = 60.0
LARGEST_BODY = 32 * 2**20  # bytes: more than twice the longest answer of any model
LARGEST_ERROR = 2**16
MOST_WORDS = 400  # characters of a server's message
_NO_MODEL = re.compile(r"model\W.{0,40}not (exist|found|available)|(no such|unknown) model", re.I)
# A 403 with which a service refuses one prompt.
_FLAGGED = re.compile(r"\bflagged\b|moderation|content.{0,20}(policy|filter|risk)", re.I)
_UNKNOWN_FIELD = re.compile(
    r"\b(extra|unexpected|unknown|unrecogni[sz]ed|unsupported|not (permitted|allowed|supported))\b",
    re.I,
)


class ApiTeacher:
    """Ask a server, read the reasoning wherever it puts it, and write the transcript ourselves."""

    metered = True

    def __init__(self, args: TeacherArgs, transcript: str) -> None:
        self.args, self.transcript, self.kind = args, transcript, args.teacher
        self.variable = KEYS[args.teacher]
        self.key = key_of(args)
        self.endpoint = Endpoint.of(args)
        self.price = price_of(args, self.endpoint)
        self.unknown_ends: set[str] = set()
        self.heard = False  # whether a server has answered at this address
        import openai

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
        self.client = self._open()

    def _open(self) -> openai.AsyncOpenAI:
        import httpx2
        import openai

        seconds = self.args.timeout
        try:
            return openai.AsyncOpenAI(
                api_key=self.key or "none",
                base_url=self.endpoint.address,
                max_retries=0,
                # Of each read, not in all; `_post` sets the deadline.
                timeout=httpx2.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)),
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

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()

    def request_key(self, row: Row, index: int) -> str:
        """Return the hash of the request and of the answer's number."""
        return self.endpoint.request_key(row, index)

    def worst(self, row: Row, *, longer: bool) -> Amount:
        """Return the most that a request can cost."""
        prompt, limit = self.endpoint.most_tokens(row, longer)
        return Amount(self.price.worst(prompt, limit) if self.price else None, prompt + limit)

    async def ask(self, row: Row, index: int, *, longer: bool = False) -> tuple[Row, Amount | None]:
        """Send one request; return the Sample's columns and what it cost, None when unknown.

        Raises `Transient`, `Rejected` or `Fatal`, each with what it cost.
        """
        sent, started = datetime.now(UTC), time.monotonic()
        try:
            body = await self._post(row, longer)
            with reading():
                reply, completion = self._read(body, row)
        except Failure as error:
            raise self._settled(error, sent) from None
        columns = {
            "completion": completion,
            "source": self.endpoint.model,
            "teacher": self.kind,
            "model": reply.model,
            "system_fingerprint": reply.fingerprint,
            "response_id": reply.response,
            "host": self.endpoint.host,
            "sampling": self.endpoint.parameters(longer),
            "prompt_hash": self.endpoint.prompt_hash(row),
            **reply.end,
            "tokens": tokens_of(reply.usage),
            "usage": reply.usage,
            "cost": self._usd(reply.usage, sent),
            "price_date": self.price.date if self.price else None,
            "latency": round(time.monotonic() - started, 3),
            "time": sent.isoformat(timespec="seconds"),
            "client": self.version,
            "reasoning_source": reply.found,
        }
        return columns, self._paid(reply.usage, sent)

    def _read(self, body: Any, row: Row) -> tuple[Reply, str]:
        """Return what a body says, and the transcript of it."""
        reply = read_reply(body, self._choice(body), self.transcript)
        validate(reply, row, self.args)
        try:
            return reply, write(reply.reasoning, reply.answer, self.transcript)
        except InputError as error:
            raise Rejected("tags", str(error), usage=reply.usage) from None

    def _choice(self, body: Any) -> Choice:
        """Return a body's first choice; name an end that is not known in the log, once."""
        choice = choice_of(body)
        word = repr(choice.raw) if choice.raw else "none"
        if choice.end is None and word not in self.unknown_ends and len(self.unknown_ends) < 20:
            self.unknown_ends.add(word)
            logger.warning("%s: unknown finish_reason (%s): complete answers are kept, others "
                           "are rejected", self.endpoint.model, word)  # fmt: skip
        return choice

    def _settled(self, error: Failure, sent: datetime) -> Failure:
        """Complete a failure: what it cost, and a message without the key."""
        if error.paid is None:
            error.paid = self._paid(error.usage, sent)
        error.args = (self._clean(str(error), 2 * MOST_WORDS),)
        if isinstance(error, Rejected):
            error.said = (error.said or {}) | {"usage": error.usage}
        return error

    def _paid(self, usage: Row | None, sent: datetime) -> Amount | None:
        counts = token_counts(usage)
        return None if counts is None else Amount(self._usd(usage, sent), sum(counts))

    def _usd(self, usage: Row | None, sent: datetime) -> float | None:
        return self.price.cost(usage, sent, datetime.now(UTC)) if self.price else None

    async def _post(self, row: Row, longer: bool) -> Any:
        """Send one request and return the body; raise a `Failure` for what goes wrong."""
        import httpx2
        import openai

        try:
            async with (
                asyncio.timeout(self.args.timeout),
                self.client.chat.completions.with_streaming_response.create(
                    model=self.endpoint.model,
                    messages=self.endpoint.messages(row),  # type: ignore[arg-type]
                    extra_body=self.endpoint.parameters(longer),
                    extra_headers=self.headers,  # type: ignore[arg-type]
                ) as response,
            ):
                data = await _read_body(response.http_response, LARGEST_BODY)
        except TimeoutError:
            raise Transient("timeout", f"no answer within {self.args.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise self._not_sent(error.__cause__ or error) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, UnicodeError) as error:
            raise self._not_sent(error) from None
        if len(data) > LARGEST_BODY:
            words = f"the reply is larger than {LARGEST_BODY >> 20} MiB"
            raise Rejected("too_large", words)
        return parse_body(data, self._without_key)

    async def _check(self, response: httpx2.Response) -> None:
        """Raise a `Failure` for a status that is no success; the client would read all of it."""
        self.heard = True
        if not response.is_success:
            raise self._judged(response, await _read_body(response, LARGEST_ERROR))

    def _not_sent(self, error: BaseException) -> Failure:
        """Judge an error of sending: of the settings, of the row, or in passing."""
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

    def _judged(self, response: httpx2.Response, data: bytes) -> Failure:
        """Judge by the status whether the run, this row, or only this try is lost."""
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
            advice = FATAL[fatal].format(variable=self.variable)
            failure = Fatal(kind, f"{self.endpoint.address}: {said}. {advice}")
        elif status in PASSING or status >= 500:
            wait = _retry_after(response)
            failure = Transient(kind, said, wait=wait, refused=status == 429)
        else:
            failure = Refused(kind, said + self._hint(text))
        # Refused before any work; of other errors one cannot know whether they are billed.
        failure.paid = NOTHING if status == 503 or (status < 500 and status != 408) else None
        return failure

    def _hint(self, text: str) -> str:
        """Return what to do about fields of `extra_body` that a server says it does not know."""
        ours = STANDARD + (("thinking",) if self.kind == "deepseek" else ())
        sent = [name for name in self.endpoint.further if name not in ours]
        named = [name for name in sent if re.search(rf"\b{re.escape(name)}\b", text)]
        if not named and not _UNKNOWN_FIELD.search(text):
            return ""
        fields = ", ".join(named or sent)
        advice = "leave them out of `extra_body` (`extra_body: {}` sends none of them)"
        return f". Fields that the server may not know: {fields}; {advice}" if fields else ""

    def _clean(self, text: str, most: int = MOST_WORDS) -> str:
        """Return a foreign message on one line, cut, printable, and without the key."""
        words = " ".join(self._without_key(text).split())
        return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in words)[:most]

    def _without_key(self, text: str) -> str:
        for form in forms(self.key) if len(self.key) >= SHORTEST else ():
            text = text.replace(form, "***")
        return text


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Reject a reply that cannot be read: none, however odd, ends the run."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        words = f"a reply that cannot be read: {type(error).__name__}: {error}"
        raise Rejected("unreadable", words) from None


async def _read_body(response: httpx2.Response, most: int) -> bytes:
    """Return a body, or what comes of a larger one: a little more than `most` bytes."""
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
    """Return what to do where no request can be sent as the settings are; else None.

    `heard` says that one could: then a name that is not known may be so in passing.
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
            return (
                "Check `base_url` (http or https?), and SSL_CERT_FILE where the server has a "
                "certificate of its own"
            )
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
