"""The engine for OpenAI-compatible servers: requests, replies, and what each failure means.

Every outcome is one of three: ask again later, leave this sample out, or stop the run. An answer
is in the ledger before anything else happens to it, and on disk once a thread has scored it. A
redirect is never followed: key and prompt go to the configured address only. Nothing is made up: a
reply without an answer is rejected with its reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import math
import random
import re
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import httpx2
import msgspec

from chainforge.core import process
from chainforge.core.errors import InputError, Stopped
from chainforge.core.jsonl import Message, Row
from chainforge.core.secrets import read_secret, redact
from chainforge.core.transcript import is_blank
from chainforge.data.sft_dataset import REASONING_FIELDS
from chainforge.generate.budget import LIMITS, NOTHING, Amount, Ledger, Price, token_counts, usd
from chainforge.generate.settings import KEYS, Draw, Drawn, RequestArgs, SamplingArgs, Take, digest
from chainforge.generate.shards import rank

logger = logging.getLogger(__name__)

# Statuses after which no other request would succeed.
STOP = {
    401: "the key is not accepted: check {variable}",
    402: "the account has no balance left: top it up",
    403: "the account may not do this: check its rights and region",
    404: "there is no such model or address: check `model` and `base_url`",
}
RETRY = (408, 409, 425, 429)  # and all from 500 up
_FLAGGED = re.compile(r"flagged|moderation|content.{0,20}(policy|filter)", re.I)  # one prompt's 403
BROKEN_OFF = ("insufficient_system_resource", "abort", "aborted", "error")
STOP_WORD, LENGTH, FILTERED = "stop", "length", "content_filter"
_ENDS = {"length": LENGTH, "max_tokens": LENGTH, "content_filter": FILTERED, "safety": FILTERED}

CONNECT_SECONDS = 60.0
RETRY_SECONDS = 1.0  # before the first retry, then doubled up to the longest pause
LONGEST_PAUSE, LONGEST_RETRY_AFTER = 60.0, 600.0
SHUTDOWN_SECONDS = 120.0  # for pending answers, after a signal or an error
OUTAGE = 20  # failures in a row after which the server is only probed
SCORED_AT_ONCE = 64
MAX_REPLY_MIB = 8  # the longest answers of any model have 2
# A tokenizer makes at most one token of a byte; a chat template adds its own around each turn.
TURN_TOKENS, TEMPLATE_TOKENS = 16, 256
# vLLM and SGLang else fill these from the model's generation config.
NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0}
# The client adds headers about itself, and those of OPENAI_CUSTOM_HEADERS, to every server.
HEADERS = {"host", "authorization", "content-type", "content-length", "accept-encoding"}

Act = Literal["retry", "skip", "stop"]


@dataclass(eq=False)
class Failure(Exception):
    """A request without a usable answer, and what to do about it.

    `retry` it later, after `wait` seconds where the server said so; `skip` the sample, since asking
    again would buy the same; or `stop` the run. `said` is what the failure's row keeps of the
    reply, `paid` what it cost, None if unknown.
    """

    act: Act
    kind: str
    message: str
    said: Row = field(default_factory=dict)
    wait: float | None = None
    paid: Amount | None = None

    def __str__(self) -> str:
        return plain(self.message)


def plain(text: str) -> str:
    """Return a server's message on one line, shortened, printable and without secrets."""
    words = " ".join(redact(text).split())
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in words)[:600]


class _Choice(msgspec.Struct):
    message: Row
    finish_reason: str | None = None


class Reply(msgspec.Struct):
    """The body of an answer; servers add fields of their own."""

    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]
    usage: Row | None = None
    model: str | None = None
    id: str | None = None
    system_fingerprint: str | None = None

    @property
    def message(self) -> Row:
        """Return the message of the first choice."""
        return self.choices[0].message

    @property
    def content(self) -> str:
        """Return the message's text."""
        text = self.message.get("content")
        return text if isinstance(text, str) else ""

    @property
    def reasoning(self) -> tuple[str, str] | None:
        """Return a reasoning that has a field of its own, and the name of the field."""
        fields = ((self.message.get(name), name) for name in REASONING_FIELDS)
        return next(
            ((t, name) for t, name in fields if isinstance(t, str) and not is_blank(t)), None
        )

    @property
    def end(self) -> str:
        """Return how the answer ended: by `length`, a content filter, or else a `stop`."""
        return _ENDS.get((self.choices[0].finish_reason or "").lower(), STOP_WORD)

    def skip(self, kind: str, message: str) -> Failure:
        """Return the failure of an answer that cannot be used."""
        end = self.choices[0].finish_reason
        said = {"reply": self.message, "finish_reason": end, "usage": self.usage}
        return Failure("skip", kind, message, said)


def read_reply(body: str) -> Reply:
    """Read a body; raise a `Failure` for what is no chat completion, or was broken off."""
    try:
        reply = msgspec.json.decode(body, type=Reply)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        words = f"not a chat completion ({error}): {body[:200]!r}"
        raise Failure("retry", "malformed", words) from None
    if (end := reply.choices[0].finish_reason) in BROKEN_OFF:
        raise Failure("retry", "unfinished", f"the server broke the reply off ({end})")
    return reply


@dataclass(frozen=True)
class Endpoint:
    """A model at one or several servers, and what is sent with every prompt."""

    urls: tuple[str, ...]
    model: str
    max_new_tokens: int
    further: Row  # all other fields of a request
    instruction: str | None = None  # the system turn; None: the prompt's own
    limit: str = "max_tokens"  # what this server calls the limit of tokens
    seeded: bool = False  # whether the seed of each draw is sent
    variable: str = KEYS["openai"]
    price: Price | None = None

    @property
    def host(self) -> str:
        """Return the first server's host and port."""
        return urlsplit(self.urls[0]).netloc

    def messages(self, row: Row) -> list[Message]:
        """Return the turns to send: the prompt's, under the teacher's instruction if any."""
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["prompt"]]
        if self.instruction is None:
            return turns
        turns = [turn for turn in turns if turn["role"] != "system"]
        head = [{"role": "system", "content": self.instruction}] if self.instruction else []
        return head + turns

    def parameters(self, draw: Draw) -> Row:
        """Return everything of a request but its messages."""
        seed = {"seed": draw.seed} if self.seeded else {}
        return self.further | {"model": self.model, self.limit: self.max_new_tokens} | seed

    def key(self, draw: Draw) -> str:
        """Return the hash of a request: another model, prompt or setting never gets its answer."""
        sent = [sorted(self.urls), self.messages(draw.row), self.parameters(draw)]
        return digest([draw.row["id"], sent, draw.sample])

    def worst(self, row: Row) -> Amount:
        """Return the most that a request can cost."""
        turns = self.messages(row)
        size = sum(len(turn["content"].encode("utf-8", "replace")) for turn in turns)
        prompt = size + TURN_TOKENS * len(turns) + TEMPLATE_TOKENS
        money = self.price.worst(prompt, self.max_new_tokens) if self.price else None
        return Amount(money, prompt + self.max_new_tokens)


Reader = Callable[[Reply], Row]  # a reply to `completion` and other columns, or a `Failure`


class Client:
    """Send requests, each to the server where the fewest are under way."""

    def __init__(self, endpoint: Endpoint, read: Reader, timeout: float) -> None:
        import openai  # 0.6 s, which the offline teacher, the doctor and cards need not wait for

        self.endpoint, self.read, self.timeout = endpoint, read, timeout
        self.busy, self.faults = Counter[str](), Counter[str]()  # by address; faults in a row
        self.connected = False
        for name in ("httpx2", "httpcore2"):  # a line for every request
            logging.getLogger(name).setLevel(logging.WARNING)
        self.key = read_secret(endpoint.variable)
        try:
            self.http = httpx2.AsyncClient(
                timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
                event_hooks={"request": [self._keep_headers], "response": [_limit_size]},
            )
            self.servers = {
                url: openai.AsyncOpenAI(
                    api_key=self.key or "none", base_url=url, max_retries=0, http_client=self.http
                )
                for url in endpoint.urls
            }
        except (ValueError, ImportError, OSError, httpx2.InvalidURL) as error:
            raise InputError(
                f"no request can be sent: {plain(str(error))}. Check base_url, and the environment "
                "variables HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
            ) from None

    async def _keep_headers(self, request: httpx2.Request) -> None:
        for name in set(request.headers) - (HEADERS if self.key else HEADERS - {"authorization"}):
            del request.headers[name]
        request.headers["accept-encoding"] = "identity"  # unpacked, a reply may be of any size

    async def ask(self, draw: Draw) -> tuple[Row, Amount | None]:
        """Send one request; return the answer's columns and what it cost, None if unknown."""
        endpoint, sent = self.endpoint, datetime.now(UTC)
        url = min(endpoint.urls, key=lambda one: self.busy[one] + 2 ** self.faults[one])
        self.busy[url] += 1
        try:
            reply = read_reply(await self._post(url, draw))
        except Failure as error:
            self.faults[url] = min(self.faults[url] + (error.act == "retry"), 16)
            raise
        finally:
            self.busy[url] -= 1
        # A server that is passed over must be tried again later.
        self.faults = Counter({one: n - 1 for one, n in self.faults.items() if n and one != url})
        counts, price = token_counts(reply.usage), endpoint.price
        cost = price.cost(reply.usage, sent, datetime.now(UTC)) if price else None
        paid = Amount(cost, sum(counts)) if counts else None
        try:
            columns = self.read(reply)
        except Failure as error:
            error.paid = paid
            raise
        columns |= {"tokens": counts[2] if counts else None, "finish_reason": reply.end}
        if endpoint.instruction is None:
            return columns | {"served": reply.model}, paid
        columns |= {
            "source": endpoint.model,
            "model": reply.model,
            "system_fingerprint": reply.system_fingerprint,
            "response_id": reply.id,
            "host": urlsplit(url).netloc,
            "sampling": endpoint.parameters(draw),
            "usage": reply.usage,
            "cost": cost,
            "price_date": price.date if price else None,
            "time": sent.isoformat(timespec="seconds"),
        }
        return columns, paid

    async def _post(self, url: str, draw: Draw) -> str:
        """Send one request; return the body without secrets, raise a `Failure` if it fails."""
        import openai

        turns = {"messages": self.endpoint.messages(draw.row)}
        try:
            async with asyncio.timeout(self.timeout):  # in all; httpx counts each read alone
                response = await self.servers[url].post(
                    "/chat/completions",
                    body=turns | self.endpoint.parameters(draw),
                    cast_to=httpx2.Response,
                )
        except openai.APIStatusError as error:
            self.connected = True
            raise self._refusal(url, error.response, error.response.text[:400]) from None
        except (openai.APIError, httpx2.HTTPError, OSError) as error:
            raise self._not_answered(url, error.__cause__ or error) from None
        self.connected = True
        return redact(response.text)

    def _not_answered(self, url: str, error: BaseException) -> Failure:
        """Return the failure for a request that got no complete reply."""
        if isinstance(error, Failure):
            return error
        if isinstance(error, TimeoutError | httpx2.ReadTimeout | httpx2.WriteTimeout):
            return Failure("retry", "timeout", f"{url}: no answer within {self.timeout:g} s")
        words = f"{url}: {type(error).__name__}: {error}"
        if not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
            return Failure("retry", "connection", words)
        # Before the first connection the settings are at fault.
        act: Act = "retry" if self.connected else "stop"
        words += (
            "; check that a server is running at `base_url`, http or https, and HTTPS_PROXY and "
            "SSL_CERT_FILE in the environment"
        )
        return Failure(act, "connection", words, paid=NOTHING)

    def _refusal(self, url: str, response: httpx2.Response, words: str) -> Failure:
        """Return the failure for an error status: it ends the run, skips the sample, or retries."""
        status, advice = response.status_code, ""
        act: Act = "skip"
        if status < 400:
            place = response.headers.get("location", "elsewhere")
            act, advice = "stop", f"redirects are not followed; set `base_url` to {place}"
        elif status in STOP and not (status == 403 and _FLAGGED.search(words)):
            act, advice = "stop", STOP[status].format(variable=self.endpoint.variable)
        elif status in RETRY or status >= 500:
            act = "retry"
        elif status in (400, 422):
            names = ", ".join(name for name in self.endpoint.further if name != "n")
            advice = f"if it refuses every request, it may not know one of these fields: {names}; "
            advice += "`extra_body: {}` leaves out what it may"
        wait = response.headers.get("retry-after", "")
        return Failure(
            act,
            f"status_{status}",
            f"{url}: status {status}: {words}" + (advice and f"; {advice}"),
            wait=min(float(wait), LONGEST_RETRY_AFTER) if wait.isdecimal() else None,
            # Refused before any work; of other errors one cannot know whether they are billed.
            paid=NOTHING if status == 503 or (status < 500 and status != 408) else None,
        )


async def _limit_size(response: httpx2.Response) -> None:
    """Limit a reply's size, and leave it packed: unpacked, it might be of any size."""
    if "content-encoding" in response.headers:
        del response.headers["content-encoding"]
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _Limited(response.stream)


class _Limited(httpx2.AsyncByteStream):
    """A reply's body; raises a `Failure` when it has no end."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self.stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self.stream:
            size += len(part)
            if size > MAX_REPLY_MIB * 2**20:
                raise Failure("skip", "too_large", f"the reply has more than {MAX_REPLY_MIB} MiB")
            yield part

    async def aclose(self) -> None:
        await self.stream.aclose()


class Limiter:
    """Allow `level` requests at a time, from `start` up to `ceiling`; times are in seconds.

    Additive increase, multiplicative decrease, as in TCP. The level rises by one with each answer
    up to half of where it was refused last (429), and from there by one for as many answers as it
    has. A refusal cuts it, once for all that were sent before the cut, and to what the server still
    works on. In an outage one request at a time probes the server.
    """

    def __init__(self, ceiling: int, start: int = 10) -> None:
        self.ceiling, self.level = ceiling, float(min(start, ceiling))
        self.under_way = self.in_a_row = 0  # failures in a row
        self.outage_since: float | None = None
        self._threshold = float(ceiling)
        self._cut_at = self._held_until = -math.inf
        self._probes = self._used = 0  # most that were under way since the last cut

    def wait(self, now: float) -> float:
        """Return in how many seconds one more may be sent; infinity: not before an outcome."""
        return max(0.0, self._held_until - now) if self.under_way < int(self.level) else math.inf

    def send(self) -> None:
        """Count a request as under way."""
        self.under_way += 1
        self._used = max(self._used, self.under_way)

    def answered(self, sent: float) -> None:
        """Count an answer to what was sent at `sent`; rise when the level was in use."""
        if sent > self._cut_at and self._used >= self.level / 2:
            step = 1.0 if self.level < self._threshold else 1 / max(self.level, 10)
            self.level = min(self.level + step, self.ceiling)
        self.under_way -= 1
        self.in_a_row, self.outage_since = 0, None

    def refused(self, sent: float, now: float, asked: float | None) -> None:
        """Count a 429 for what was sent at `sent`; `asked` is the server's Retry-After."""
        if self.under_way == 1:  # it works on nothing else, so it is not their number
            self.failed(now, asked, outage=True)
            return
        self.under_way -= 1
        if sent > self._cut_at:
            self._cut_at, self._used = now, self.under_way
            self._threshold = self.level / 2
            self.level *= 0.9
        self.level = max(1.0, min(self.level, self.under_way))

    def failed(self, now: float, asked: float | None = None, outage: bool = False) -> None:
        """Count a failure other than a 429: the level is cut only in an outage."""
        self.under_way -= 1
        self.in_a_row += 1
        if self.in_a_row < OUTAGE and not outage:
            return
        if self.outage_since is None:
            logger.warning("the server is failing: probing it with one request at a time")
            self.outage_since, self._probes = now, 0
        elif now >= self._held_until:
            self._probes += 1
        self.level = 1.0
        pause = min(RETRY_SECONDS * 2 ** min(self._probes, 10), LONGEST_PAUSE)
        self._held_until = max(self._held_until, now + (pause if asked is None else asked))

    def gone(self, now: float, timeout: float) -> bool:
        """Return whether the server has failed, probes included, for longer than `timeout`."""
        since = self.outage_since
        return since is not None and self._probes > 0 and now - since >= timeout


@dataclass
class _Job:
    """A completion that is wanted from a server."""

    draw: Draw
    key: str
    attempts: int = 0
    faults: int = 0  # attempts that failed, refusals for the number of requests left out


class ApiEngine:
    """A model behind one or several servers; `fallback` answers where they do not."""

    def __init__(
        self,
        args: RequestArgs,
        endpoint: Endpoint,
        read: Reader,
        ledger: Path,
        ceiling: int,
        fallback: Callable[[Draw], Row] | None = None,
    ) -> None:
        self.args, self.endpoint, self.read, self.path = args, endpoint, read, ledger
        self.key, self.fallback = endpoint.key, fallback
        self.limits = {name: getattr(args, name, None) for name in LIMITS}
        self.limiter = Limiter(args.max_concurrency or ceiling)
        self.ledger: Ledger | None = None
        self.tokens = self.faults = 0  # faults: failed requests, those asked again included
        self.started = time.monotonic()

    def spending(self) -> Row:
        """Return what all runs have spent."""
        with Ledger(self.path) as ledger:
            return ledger.summary()

    def describe(self, share: float) -> str:
        """Return the cost so far and expected, concurrent requests, speed, and failures."""
        if self.ledger is None:
            return ""
        speed = self.tokens / max(time.monotonic() - self.started, 0.1)
        spent = self.ledger.spent.usd
        money = f"{usd(spent)} of ~{usd(spent / max(share, 0.01))}, " if spent else ""
        return (
            f"{money}{self.limiter.under_way}/{int(self.limiter.level)} at once, "
            f"{speed:,.0f} tok/s, {self.faults:,} faults"
        )

    def sample(self, draws: Sequence[Draw], take: Take) -> None:
        """Sample every draw; answers that an interrupted run paid for are used first."""
        client = self.client()  # may be refused, before the ledger's file is made
        with Ledger(self.path, self.limits) as ledger:
            asyncio.run(self.answer(draws, take, ledger, client))
            ledger.forget_answers()  # `take` has them on disk

    def client(self) -> Client:
        """Return a client for one event loop; raise `InputError` where none can be made."""
        return Client(self.endpoint, self.read, self.args.timeout)

    async def answer(
        self, draws: Sequence[Draw], take: Take, ledger: Ledger, client: Client
    ) -> None:
        """Sample every draw with a ledger that is open already, and keeps the answers."""
        self.ledger = ledger
        await _Run(self, client, ledger).run(draws, take)


class _Run:
    """The requests of one call of an engine, in one event loop."""

    def __init__(self, engine: ApiEngine, client: Client, ledger: Ledger) -> None:
        self.engine, self.client, self.ledger = engine, client, ledger
        self.limiter = engine.limiter
        self.jobs = deque[_Job]()
        self.later: list[tuple[float, int, _Job]] = []  # a heap: when to ask again
        self.tasks = set[asyncio.Task[None]]()
        self.arrived = asyncio.Queue[Drawn | None]()
        self.news = asyncio.Event()
        self.stop: BaseException | None = None
        self.signals = 0

    async def run(self, draws: Sequence[Draw], take: Take) -> None:
        """Run until every draw is answered, a limit or signal ends it, or requests only fail."""
        for draw in sorted(draws, key=lambda one: one.sample):  # prompts in order
            key = self.engine.key(draw)
            if key in self.ledger.answers:
                self.arrived.put_nowait((draw, self.ledger.answers[key]))
            else:
                self.jobs.append(_Job(draw, key))
        if threading.current_thread() is threading.main_thread():
            for number in process.stop_signals():  # until the loop closes
                asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        scoring = asyncio.create_task(self._score(take))
        scoring.add_done_callback(self._done)
        async with self.client.http:
            while self.stop is None and (self.jobs or self.later or self.tasks):
                self.news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._send_what_may()):
                        await self.news.wait()
            if self.tasks:
                await asyncio.wait(self.tasks, timeout=SHUTDOWN_SECONDS)
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
        self.arrived.put_nowait(None)
        await asyncio.wait({scoring})
        if self.stop is not None:
            raise self.stop

    def _on_signal(self, number: signal.Signals) -> None:
        process.leave_terminal()
        self.signals += 1
        words = f"by {number.name}; every answer so far is kept, run the same command again to "
        self._end(Stopped(f"{words}continue", 128 + number))
        for task in self.tasks if self.signals > 1 else ():
            task.cancel()

    def _end(self, error: BaseException) -> None:
        """End the run with this error: no further request is sent."""
        self.stop = self.stop or error
        self.news.set()

    def _done(self, task: asyncio.Task[None]) -> None:
        """Note that a task ended; an error in it, such as a full disk, ends the run."""
        self.tasks.discard(task)
        self.news.set()
        if not task.cancelled() and (error := task.exception()):
            self._end(error)

    def _send_what_may(self) -> float | None:
        """Send what may be sent; return the seconds until the next, None to await an outcome."""
        while self.stop is None:
            now = time.monotonic()
            again = bool(self.later) and self.later[0][0] <= now
            if not (again or self.jobs):
                return self.later[0][0] - now if self.later else None
            if wait := self.limiter.wait(now):
                return None if wait == math.inf else wait
            job = self.later[0][2] if again else self.jobs[0]
            worst = self.engine.endpoint.worst(job.draw.row)
            if limit := self.ledger.forbids(worst):
                if not self.tasks:  # which may cost less than was reserved for them
                    self._end(Stopped(self.ledger.stop_message(limit)))
                return None
            _ = heapq.heappop(self.later) if again else self.jobs.popleft()
            self.limiter.send()
            number = self.ledger.send(job.key, worst)
            task = asyncio.create_task(self._ask(job, number))
            self.tasks.add(task)
            task.add_done_callback(self._done)
        return None

    async def _ask(self, job: _Job, number: int) -> None:
        """Send one request and record its outcome."""
        sent = time.monotonic()
        job.attempts += 1
        try:
            answer, paid = await self.client.ask(job.draw)
        except asyncio.CancelledError:
            self.ledger.settle(number, job.key, "interrupted", None)
            raise
        except Failure as error:
            self.ledger.settle(number, job.key, error.kind, error.paid)
            self._failed(job, number, error, sent)
            return
        answer |= {"attempts": job.attempts, "request": job.key}
        self.ledger.settle(number, job.key, "answered", paid, answer)
        self.limiter.answered(sent)
        self.engine.tokens += answer["tokens"] or 0
        self.arrived.put_nowait((job.draw, answer))

    def _failed(self, job: _Job, number: int, error: Failure, sent: float) -> None:
        """Ask again later, leave the sample out, or end the run."""
        now, args = time.monotonic(), self.engine.args
        self.engine.faults += 1
        if error.kind == "status_429":
            self.limiter.refused(sent, now, error.wait)
        elif error.act == "retry":
            job.faults += 1
            self.limiter.failed(now)
        else:
            self.limiter.answered(sent)
        if error.act == "stop":
            self._end(InputError(f"{error}. Rows so far are kept"))
        elif error.act == "retry" and job.faults <= args.max_retries:
            pause = min(LONGEST_PAUSE, RETRY_SECONDS * 2.0 ** max(job.faults - 1, 0))
            wait = error.wait or pause * random.uniform(0.5, 1.0)
            heapq.heappush(self.later, (now + wait, number, job))
        else:
            self._lose(job, error)
        if self.limiter.gone(now, args.outage_timeout):
            words = f"{self.limiter.in_a_row} requests in a row failed, the last: {error}"
            self._end(InputError(f"{words} ({error.kind}). Run the same command again to continue"))

    def _lose(self, job: _Job, error: Failure) -> None:
        """Report a missing answer, and the fallback's answer if there is one."""
        # What a server refused costs nothing to ask for in the next run.
        rejected = error.act == "skip" and not error.kind.startswith("status_")
        row = error.said | {
            "request": job.key, "class": error.kind, "message": str(error),
            "attempts": job.attempts, "rejected": rejected, "completion": None,
        }  # fmt: skip
        self.arrived.put_nowait((job.draw, row))
        if error.act == "retry" and self.engine.fallback is not None:
            answer = self.engine.fallback(job.draw) | {"request": job.key}
            self.arrived.put_nowait((job.draw, answer))

    async def _score(self, take: Take) -> None:
        """Score and write answers in a thread as they arrive, until there are no more."""
        while True:
            batch = [await self.arrived.get()]
            while len(batch) < SCORED_AT_ONCE and not self.arrived.empty():
                batch.append(self.arrived.get_nowait())
            await asyncio.to_thread(take, [one for one in batch if one is not None])
            if batch[-1] is None:
                return


def policy_engine(args: SamplingArgs, policy: str, directory: Path) -> ApiEngine:
    """Return the engine `api`: servers whose model gets the prompt as it is."""
    extra = NEUTRAL | {"top_k": args.top_k or -1} if args.extra_body is None else args.extra_body
    further = {"temperature": args.temperature, "top_p": args.top_p, "n": 1} | extra
    further |= args.template_fields
    model = args.served_model or policy
    endpoint = Endpoint(tuple(args.urls), model, args.max_new_tokens, further, seeded=True)
    ledger = directory / f"requests.rank-{rank()}.jsonl"
    return ApiEngine(args, endpoint, read_completion, ledger, 256)


def read_completion(reply: Reply) -> Row:
    """Return a policy's completion, cut off or not; raise a `Failure` if there is none."""
    if found := reply.reasoning:
        words = f"the server took the reasoning out of the completion ({found[0]!r:.60}): start it "
        raise Failure("stop", "reasoning_parser", f"{words}without a reasoning parser")
    # A model may end its turn at once: that is an empty text. No text at all is no completion.
    if reply.message.get("content") is None or (not reply.content and reply.end == FILTERED):
        end = reply.choices[0].finish_reason
        raise reply.skip("no_answer", f"the reply contains no answer (finish_reason {end!r})")
    return {"completion": reply.content}
