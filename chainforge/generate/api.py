"""The engine for OpenAI-compatible servers: requests, replies, and what each failure means.

Every outcome is one of three: ask again later, leave this row out, or stop the run. An answer is in
the ledger before anything else happens to it, and on disk once a thread has scored it. A redirect
is never followed: key and prompt go to the configured address only. Nothing is made up: a reply
without an answer is rejected with its reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import random
import re
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import httpx2
import msgspec

from chainforge.core import process
from chainforge.core.errors import InputError, Stopped
from chainforge.core.jsonl import Message, Row
from chainforge.core.secrets import read_secret, redact
from chainforge.core.transcript import is_blank
from chainforge.data.datasets import REASONING_FIELDS
from chainforge.generate.budget import NOTHING, Amount, Ledger, Price, token_counts, usd
from chainforge.generate.settings import KEYS, Draw, Drawn, RequestArgs, SamplingArgs, Take
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
MAX_USELESS = 20  # unusable answers, or failures, in a row that stop the run
SCORED_AT_ONCE = 64
# A tokenizer makes at most one token of a byte; a chat template adds its own around each turn.
TURN_TOKENS, TEMPLATE_TOKENS = 16, 256
# vLLM and SGLang else fill these from the model's generation config.
NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0}
# The client adds headers about itself, and those of OPENAI_CUSTOM_HEADERS, to every server.
HEADERS = {"host", "authorization", "content-type", "content-length", "accept", "accept-encoding"}


@dataclass(eq=False)
class Failure(Exception):
    """A request without a usable answer, and what to do about it.

    `retry` it later, after `wait` seconds where the server said so; `skip` the row, since asking
    again would buy the same; or `stop` the run. `said` is what the failure's row keeps of the
    reply, `paid` what it cost, None if unknown.
    """

    act: Literal["retry", "skip", "stop"]
    kind: str
    message: str
    said: Row = field(default_factory=dict)
    wait: float | None = None
    paid: Amount | None = None

    def __str__(self) -> str:
        return plain(self.message)


def plain(text: str) -> str:
    """Return a foreign message on one line, cut, printable, and without secrets."""
    words = " ".join(redact(text).split())
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in words)[:600]


def digest(value: Any) -> str:
    """Return the hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


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
        try:
            self.http = httpx2.AsyncClient(
                timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
                event_hooks={"request": [self._keep_headers]},
            )
        except (ValueError, ImportError, OSError, httpx2.InvalidURL) as error:
            raise InputError(
                f"no request can be sent: {plain(str(error))}. Check the environment variables "
                "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
            ) from None
        self.key = read_secret(endpoint.variable)
        self.servers = {
            url: openai.AsyncOpenAI(
                api_key=self.key or "none", base_url=url, max_retries=0, http_client=self.http
            )
            for url in endpoint.urls
        }

    async def _keep_headers(self, request: httpx2.Request) -> None:
        for name in set(request.headers) - (HEADERS if self.key else HEADERS - {"authorization"}):
            del request.headers[name]

    async def ask(self, draw: Draw) -> tuple[Row, Amount | None]:
        """Send one request; return the answer's columns and what it cost, None if unknown."""
        url = min(self.endpoint.urls, key=lambda one: self.busy[one] + 2 ** self.faults[one])
        self.busy[url] += 1
        sent = datetime.now(UTC)
        try:
            reply = read_reply(await self._post(url, draw))
        except Failure as error:
            self.faults[url] = min(self.faults[url] + (error.act == "retry"), 16)
            raise
        finally:
            self.busy[url] -= 1
        # A server that is passed over must be tried again some day.
        self.faults = Counter({one: n - 1 for one, n in self.faults.items() if n and one != url})
        counts, price = token_counts(reply.usage), self.endpoint.price
        cost = price.cost(reply.usage, sent, datetime.now(UTC)) if price else None
        paid = Amount(cost, sum(counts)) if counts else None
        try:
            columns = self.read(reply)
        except Failure as error:
            error.paid = paid
            raise
        columns |= {"tokens": counts[2] if counts else None, "finish_reason": reply.end}
        if self.endpoint.instruction is None:
            return columns | {"served": reply.model}, paid
        columns |= {
            "source": self.endpoint.model,
            "model": reply.model,
            "system_fingerprint": reply.system_fingerprint,
            "response_id": reply.id,
            "host": urlsplit(url).netloc,
            "sampling": self.endpoint.parameters(draw),
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
            raise self._refusal(url, error.response) from None
        except (openai.APIError, httpx2.HTTPError, OSError) as error:
            raise self._not_answered(url, error.__cause__ or error) from None
        self.connected = True
        return redact(response.text)

    def _not_answered(self, url: str, error: BaseException) -> Failure:
        """Return what it means that no status came back."""
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
            words = (
                f"{url}: {type(error).__name__}: {error}; check that a server is running at "
                "`base_url`, http or https, and HTTPS_PROXY and SSL_CERT_FILE in the environment"
            )
            # Before the first connection the settings are at fault.
            act: Literal["retry", "stop"] = "retry" if self.connected else "stop"
            return Failure(act, "connection", words, paid=NOTHING)
        if isinstance(error, TimeoutError | httpx2.TimeoutException):
            return Failure("retry", "timeout", f"{url}: no answer within {self.timeout:g} s")
        return Failure("retry", "connection", f"{url}: {type(error).__name__}: {error}")

    def _refusal(self, url: str, response: httpx2.Response) -> Failure:
        """Return what an error status means: the run, this row, or only this try is lost."""
        status, words = response.status_code, response.text[:400]
        kind, said = f"status_{status}", f"status {status}: {words}"
        # Refused before any work; of other errors one cannot know whether they are billed.
        paid = NOTHING if status == 503 or (status < 500 and status != 408) else None
        if response.is_redirect:
            place = response.headers.get("location", "elsewhere")
            said = f"{url}: status {status}: redirects are not followed; set `base_url` to {place}"
            return Failure("stop", kind, said, paid=paid)
        if status in STOP and not (status == 403 and _FLAGGED.search(words)):
            advice = STOP[status].format(variable=self.endpoint.variable)
            return Failure("stop", kind, f"{url}: {said}; {advice}", paid=paid)
        if status in RETRY or status >= 500:
            wait = response.headers.get("retry-after", "")
            seconds = min(float(wait), LONGEST_RETRY_AFTER) if wait.isdigit() else None
            return Failure("retry", kind, said, wait=seconds, paid=paid)
        return Failure("skip", kind, said, paid=paid)


class Limiter:
    """Allow `level` requests at a time, from `start` up to `ceiling`; times are in seconds.

    Additive increase, multiplicative decrease. The level rises by one with each answer until the
    first refusal (429), as TCP's slow start does, and then by one for as many answers as it has. A
    refusal cuts it, once for all that were sent before the cut. When the lower level is refused
    too, all requests wait. After many failures in a row, an outage, one request at a time probes
    the server.
    """

    def __init__(self, ceiling: int, start: int = 10, pause: float | None = None) -> None:
        self.ceiling, self.level = ceiling, min(start, ceiling)
        self.pause = RETRY_SECONDS if pause is None else pause
        self.under_way = self.in_a_row = 0  # failures in a row
        self.outage_since: float | None = None
        self._cuts = self._cuts_in_a_row = self._clean = self._probes = 0
        self._used = 0  # most that were under way since the last cut
        self._doubling = True
        self._held_until = 0.0

    def wait(self, now: float) -> float | None:
        """Return None when one more may be sent, else in how many seconds to look again."""
        if now < self._held_until:
            return self._held_until - now
        return None if self.under_way < self.level else math.inf

    def send(self) -> int:
        """Count a request as under way; return a ticket, to be given back with its outcome."""
        self.under_way += 1
        self._used = max(self._used, self.under_way)
        return self._cuts

    def answered(self, ticket: int) -> None:
        """Count an answer; rise when the level was in use."""
        self.under_way -= 1
        self.in_a_row, self.outage_since = 0, None
        if ticket != self._cuts:
            return
        self._cuts_in_a_row = 0
        self._clean += self._used >= self.level / 2
        if self._clean >= (1 if self._doubling else max(self.level, 10)):
            self._clean, self.level = 0, min(self.level + 1, self.ceiling)

    def refused(self, ticket: int, now: float, asked: float | None) -> None:
        """Count a 429; `asked` is the server's Retry-After."""
        self.under_way -= 1
        if ticket != self._cuts:  # of the burst that was answered by a cut
            self.level = max(1, min(self.level, self.under_way))
            return
        if self.level == 1:  # fewer is not possible, so it is not their number
            self._count_failure(now)
        self._cuts += 1
        self._cuts_in_a_row += 1
        self._clean, self._doubling = 0, False
        self._used = self.under_way
        self.level = max(1, math.floor((0.9 if self._cuts_in_a_row == 1 else 0.7) * self.level))
        if self._cuts_in_a_row > 1:
            pause = self.pause * 2 ** min(self._cuts_in_a_row - 2, 10)
            self._hold(now, min(pause, LONGEST_PAUSE) if asked is None else asked)

    def failed(self, now: float) -> None:
        """Count a failure that is not the level's fault: nothing is cut but in an outage."""
        self.under_way -= 1
        self._count_failure(now)

    def _count_failure(self, now: float) -> None:
        self.in_a_row += 1
        if self.in_a_row < MAX_USELESS:
            return
        if self.outage_since is None:
            logger.warning("the server is failing: probing it with one request at a time")
            self.outage_since, self._probes = now, 0
        elif now >= self._held_until:
            self._probes += 1
        self.level, self._doubling = 1, True
        self._hold(now, min(self.pause * 2 ** min(self._probes, 10), LONGEST_PAUSE))

    def _hold(self, now: float, seconds: float) -> None:
        self._held_until = max(self._held_until, now + seconds)

    def gone(self, now: float, timeout: float) -> bool:
        """Return whether the server has failed, probes included, for longer than `timeout`."""
        since = self.outage_since
        return since is not None and self._probes > 0 and now - since >= timeout


class ApiEngine:
    """A model behind one or several servers.

    `strict`: a completion that is missing at the end is an error, and asked for in the next run.
    `fallback` answers where the server does not.
    """

    def __init__(
        self,
        args: RequestArgs,
        endpoint: Endpoint,
        read: Reader,
        ledger: Path,
        ceiling: int,
        *,
        strict: bool = True,
        fallback: Callable[[Draw], Row] | None = None,
    ) -> None:
        self.args, self.endpoint, self.read, self.ledger_path = args, endpoint, read, ledger
        self.strict, self.fallback = strict, fallback
        names = ("max_usd", "max_tokens_total", "max_requests")
        self.limits = {name: getattr(args, name, None) for name in names}
        self.limiter = Limiter(args.max_concurrency or ceiling)
        self._run: _Run | None = None
        Client(endpoint, read, args.timeout)  # refuses wrong settings before any work

    def spending(self) -> Row:
        """Return what all runs have spent."""
        with Ledger(self.ledger_path) as ledger:
            return ledger.summary()

    def sample(self, draws: Sequence[Draw], take: Take) -> None:
        """Sample every draw; answers that an interrupted run paid for are used first."""
        with Ledger(self.ledger_path, self.limits) as ledger:
            self._run = run = _Run(self, ledger, take)
            asyncio.run(run.run(draws))
            ledger.forget_answers()  # `take` has them on disk
        if run.lost and self.strict:
            raise InputError(
                f"{len(run.lost)} of {len(draws)} completions are missing. {last_words(run.lost)} "
                "Run the same command again to ask for these alone"
            )

    def describe(self, share: float) -> str:
        """Return cost so far and as foreseen, requests at once, speed, and failures."""
        if (run := self._run) is None:
            return ""
        speed = run.tokens / max(time.monotonic() - run.started, 0.1)
        spent = (run.ledger.told + run.ledger.unsure).usd
        money = "" if not spent else f"{usd(spent)} of ~{usd(spent / max(share, 0.01))}, "
        return (
            f"{money}{self.limiter.under_way}/{self.limiter.level} at once, {speed:,.0f} tok/s, "
            f"{run.faults.total():,} faults"
        )


class _Run:
    """The requests of one call of an engine."""

    def __init__(self, engine: ApiEngine, ledger: Ledger, take: Take) -> None:
        self.engine, self.ledger, self.take = engine, ledger, take
        self.args, self.limiter = engine.args, engine.limiter
        self.lost: list[Row] = []
        self.faults = Counter[str]()  # failed requests, those asked again included
        self.tokens, self.started = 0, time.monotonic()
        self.stop: Exception | None = None
        # Whether a refused request is the row's fault shows once the server answers another.
        self._heard = ledger.told.tokens > 0
        self._useless = self._signals = 0
        self._arrived: deque[Drawn] = deque()
        self._scoring: set[asyncio.Future[None]] = set()
        self._scorer = ThreadPoolExecutor(1)

    async def run(self, draws: Sequence[Draw]) -> None:
        """Work until everything is answered, a limit or a signal ends it, or nothing works."""
        endpoint, args = self.engine.endpoint, self.args
        self._news, self._turn = asyncio.Event(), asyncio.Lock()
        self._stopping: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.client = Client(endpoint, self.engine.read, args.timeout)  # of this event loop
        jobs: deque[tuple[Draw, str]] = deque()
        for draw in sorted(draws, key=lambda one: one.sample):  # prompts in order
            if (key := endpoint.key(draw)) in self.ledger.answers:
                self._arrive(draw, self.ledger.answers[key])
            else:
                jobs.append((draw, key))
        count = min(len(jobs), self.limiter.ceiling)
        self._workers = [asyncio.create_task(self._work(jobs)) for _ in range(count)]
        working = asyncio.gather(*self._workers, return_exceptions=True)
        either: set[asyncio.Future[Any]] = {working, self._stopping}
        with self._scorer, _on_signals(self._on_signal):
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait({working}, timeout=SHUTDOWN_SECONDS)
            finally:
                for task in self._workers:
                    task.cancel()
                await working
                while self._scoring:
                    await asyncio.wait(self._scoring)
                await self.client.http.aclose()
        if self.stop is None and self.lost and not self._heard:
            self.stop = self._refused_all()
        if self.stop is not None:
            raise self.stop

    def _end(self, error: Exception) -> None:
        """Let no further request begin."""
        if self.stop is None:
            self.stop = error
            self._stopping.set_result(None)
            self._news.set()

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        name = signal.Signals(number).name
        words = f"by {name}; every answer so far is kept, run the same command again to continue"
        self._end(Stopped(words, 128 + number))
        for task in self._workers if self._signals > 1 else ():
            task.cancel()

    async def _work(self, jobs: deque[tuple[Draw, str]]) -> None:
        """Take jobs one after the other, and ask for each until it is answered or lost."""
        try:
            while jobs and self.stop is None:
                await self._obtain(*jobs.popleft())
        except Exception as error:  # a full disk, say
            self._end(error)

    async def _obtain(self, draw: Draw, key: str) -> None:
        worst, faults, attempts = self.engine.endpoint.worst(draw.row), 0, 0
        while await self._permit(worst):
            attempts += 1
            number, ticket = self.ledger.send(key, worst), self.limiter.send()
            try:
                answer, paid = await self.client.ask(draw)
            except asyncio.CancelledError:
                self.ledger.settle(number, key, "interrupted", None)
                raise
            except Failure as error:
                self.ledger.settle(number, key, error.kind, error.paid)
                faults += error.kind != "status_429"
                again = self._failed(error, ticket, faults)
                self._news.set()
                if not again:
                    self._lose(draw, key, error, attempts)
                    return
                await asyncio.wait({self._stopping}, timeout=error.wait or _pause(faults))
            else:
                answer |= {"attempts": attempts, "request": key}
                self.ledger.settle(number, key, "answered", paid, answer)
                self.limiter.answered(ticket)
                self._heard, self._useless = True, 0
                self.tokens += answer["tokens"] or 0
                self._news.set()
                self._arrive(draw, answer)
                return

    async def _permit(self, worst: Amount) -> bool:
        """Wait until one more request may be sent; return False if none may any more."""
        async with self._turn:
            while self.stop is None:
                self._news.clear()
                wait = self.limiter.wait(time.monotonic())
                limit = self.ledger.forbids(worst) if wait is None else None
                if wait is None and limit is None:
                    return True
                if limit is not None and not self.limiter.under_way:
                    self._end(Stopped(self.ledger.stop_message(limit)))
                # Those under way may cost less than was reserved for them.
                seconds = None if wait in (None, math.inf) else wait
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._news.wait()
        return False

    def _failed(self, error: Failure, ticket: int, faults: int) -> bool:
        """Count a failure; return whether to ask again."""
        now = time.monotonic()
        self.faults[error.kind] += 1
        if error.act != "retry":
            self.limiter.answered(ticket)
        elif error.kind == "status_429":
            self.limiter.refused(ticket, now, error.wait)
        else:
            self.limiter.failed(now)
        if error.act == "stop":
            self._end(InputError(f"{error}. Rows so far are kept"))
        if self.limiter.gone(now, self.args.outage_timeout):
            self._end(
                InputError(
                    f"{self.limiter.in_a_row} requests in a row failed, the last: {error} "
                    f"({error.kind}). Run the same command again to continue"
                )
            )
        return error.act == "retry" and faults <= self.args.max_retries

    def _lose(self, draw: Draw, key: str, error: Failure, attempts: int) -> None:
        """Record that there is no answer, and let the fallback give one."""
        if error.act == "stop":
            return
        refused = error.kind.startswith("status_")
        self._heard = self._heard or (error.act == "skip" and not refused)
        rejected = error.act == "skip" and self._heard and not self.engine.strict
        row = error.said | {
            "request": key, "class": error.kind, "message": str(error), "attempts": attempts,
            "rejected": rejected, "completion": None,
        }  # fmt: skip
        self.lost.append(row)
        self._arrive(draw, row)
        if error.act == "retry":
            if self.engine.fallback is not None:
                self._arrive(draw, self.engine.fallback(draw) | {"request": key})
            return
        self._useless += 1
        if self._useless >= MAX_USELESS:
            words = f"{MAX_USELESS} answers in a row were of no use. {last_words(self.lost)}"
            again = InputError(f"{words} Run the same command again to continue")
            self._end(again if self._heard else self._refused_all() or again)

    def _refused_all(self) -> InputError | None:
        """Return the error for settings that the server does not take, as no answer came."""
        refused = [row for row in self.lost if row["class"] in ("status_400", "status_422")]
        if not refused:
            return None
        fields = ", ".join(name for name in self.engine.endpoint.further if name != "n")
        return InputError(
            f"the server refused every request: {refused[-1]['message']}. It may not know one of "
            f"these fields: {fields}; `extra_body: {{}}` leaves out what it may"
        )

    def _arrive(self, draw: Draw, columns: Row) -> None:
        """Let a thread score and write an answer, or a failure; an error there ends the run."""
        self._arrived.append((draw, columns))
        future = asyncio.get_running_loop().run_in_executor(self._scorer, self._score)
        self._scoring.add(future)
        future.add_done_callback(self._scored)

    def _score(self) -> None:
        """Score what has arrived; the calls for the rest of a batch find nothing."""
        count = min(len(self._arrived), SCORED_AT_ONCE)
        if batch := [self._arrived.popleft() for _ in range(count)]:
            self.take(batch)

    def _scored(self, future: asyncio.Future[None]) -> None:
        self._scoring.discard(future)
        if not future.cancelled() and isinstance(error := future.exception(), Exception):
            self._end(error)


def _pause(faults: int) -> float:
    """Return the seconds before a retry."""
    pause = min(LONGEST_PAUSE, RETRY_SECONDS * 2.0 ** max(faults - 1, 0))
    return pause * random.uniform(0.5, 1.0)


def last_words(lost: Sequence[Row]) -> str:
    """Return the commonest reason for having no answer, with a reply that shows it."""
    if not lost:
        return "See failures.jsonl."
    kind = Counter(row["class"] for row in lost).most_common(1)[0][0]
    row = [row for row in lost if row["class"] == kind][-1]
    said = (row.get("reply") or {}).get("content")
    shown = f" One answer: {said[:200]!r}." if said and isinstance(said, str) else ""
    return f"{kind}: {row['message']}.{shown} See failures.jsonl."


def policy_engine(args: SamplingArgs, policy: str, directory: Path) -> ApiEngine:
    """Return the engine `api`: servers whose model gets the prompt as it is."""
    extra = NEUTRAL | {"top_k": args.top_k or -1} if args.extra_body is None else args.extra_body
    further = {"temperature": args.temperature, "top_p": args.top_p, "n": 1} | extra
    model = args.served_model or policy
    endpoint = Endpoint(tuple(args.urls), model, args.max_new_tokens, further, seeded=True)
    ledger = directory / f"requests.rank-{rank()}.jsonl"
    return ApiEngine(args, endpoint, read_completion, ledger, 256)


def read_completion(reply: Reply) -> Row:
    """Return a policy's completion, cut off or not; raise a `Failure` if there is none."""
    if reasoning := reasoning_of(reply.message):
        raise Failure(
            "stop",
            "reasoning_parser",
            f"the server took the reasoning out of the completion ({reasoning[0]!r:.60}): start it "
            "without a reasoning parser",
        )
    # A model may end its turn at once: that is an empty text. No text at all is no completion.
    if reply.message.get("content") is None or (not reply.content and reply.end == FILTERED):
        end = reply.choices[0].finish_reason
        raise reply.skip("no_answer", f"the reply contains no answer (finish_reason {end!r})")
    return {"completion": reply.content}


def reasoning_of(message: Row) -> tuple[str, str] | None:
    """Return a reasoning that has a field of its own, and the name of the field."""
    for name in REASONING_FIELDS:
        text = message.get(name)
        if isinstance(text, str) and not is_blank(text):
            return text, name
    return None


@contextlib.contextmanager
def _on_signals(call: Callable[[int], None]) -> Iterator[None]:
    """Give the stop signals to a function, while an event loop runs in the main thread."""
    loop = asyncio.get_running_loop()

    def note(number: int) -> None:
        process.leave_terminal()
        call(number)

    main = threading.current_thread() is threading.main_thread()
    numbers = process.stop_signals() if main else []
    for number in numbers:
        loop.add_signal_handler(number, note, int(number))
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
