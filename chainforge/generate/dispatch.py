"""Send many requests at once: how many, which again and when, and when to stop.

One loop sends; before every request it looks at the limiter, the breaker and the budget. An answer
is in the ledger before anything else happens to it, and on disk once a thread has scored it.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import math
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from chainforge.core import process
from chainforge.core.errors import Failed, InputError, Stopped
from chainforge.core.jsonl import Row
from chainforge.generate.budget import Amount, Ledger
from chainforge.generate.settings import Draw, Drawn, RequestArgs, Take

logger = logging.getLogger(__name__)

MAX_USELESS = 20  # unusable answers, or failures, in a row that stop the run
MAX_BILLED = 3  # tries of a prompt whose reply the server begins and breaks off
MAX_PAUSE = 60.0  # seconds
TICK = 0.5
SCORED_AT_ONCE = 64
SHOWN = 200  # characters of an answer, in a message


class Failure(Exception):
    """A request without a usable answer; `said` is what the failure's row keeps of the reply."""

    def __init__(
        self, kind: str, message: str, *, usage: Row | None = None, said: Row | None = None
    ) -> None:
        super().__init__(message)
        self.kind, self.usage, self.said = kind, usage, said
        self.paid: Amount | None = None  # None: the server did not say what it cost


class Transient(Failure):
    """It may succeed later: after `wait` seconds where the server said so.

    `refused` is a 429; `billed` says that the server worked on it, so each retry costs again.
    """

    wait: float | None = None
    refused = billed = False


class Rejected(Failure):
    """The answer cannot be used, and asking again would buy the same; `too_short`: cut off."""

    too_short = False


class Refused(Rejected):
    """The server refused the request; the row is at fault only if the server accepts others."""


class Fatal(Failure):
    """No other request would succeed: the run stops. The message says what to do."""


@dataclass(eq=False)
class Job:
    """One answer to ask for."""

    draw: Draw
    key: str  # the hash of the request
    asked: int = 0
    faults: int = 0  # transient failures, refusals for the number of requests left out
    billed: int = 0
    longer: bool = False  # ask with a larger limit of tokens


# Send a request: the answer's columns and what it cost, None if unknown. Raises `Failure`.
Ask = Callable[[Job], Awaitable[tuple[Row, Amount | None]]]


class Dispatcher:
    """The requests of one call of an engine.

    `worst` returns the most that a request can cost; `fallback` answers where the server does not.
    """

    def __init__(
        self,
        args: RequestArgs,
        ask: Ask,
        worst: Callable[[Job], Amount],
        ledger: Ledger,
        take: Take,
        limiter: Limiter,
        *,
        strict: bool,
        fallback: Callable[[Draw], Row] | None = None,
    ) -> None:
        self.args, self.ask, self.worst, self.ledger, self.take = args, ask, worst, ledger, take
        self.limiter, self.strict, self.fallback = limiter, strict, fallback
        self.breaker = Breaker(MAX_USELESS, args.retry_wait, args.outage_timeout)
        self.lost: list[Row] = []
        self.faults: Counter[str] = Counter()  # failed requests, those asked again included
        self.tokens, self.started = 0, time.monotonic()
        self.under_way: set[asyncio.Task[None]] = set()
        self.stop: Exception | None = None
        # Whether a refused request is the row's fault shows once the server answers another.
        self._heard = ledger.told.tokens > 0
        self._refused: list[tuple[Job, Refused]] = []
        self._useless = 0  # answers in a row
        self._last_fault = ""
        self._gone = self._closed = False
        self._arrived: list[Drawn] = []
        self._later: list[tuple[float, int, Job]] = []
        self._number = self._signals = 0

    async def run(self, jobs: Sequence[Job]) -> None:
        """Work until everything is answered, a limit or a signal ends it, or nothing works."""
        self._fresh = deque(sorted(jobs, key=lambda job: job.draw.sample))  # prompts in order
        self._news, self._arrival = asyncio.Event(), asyncio.Event()
        scoring = asyncio.create_task(self._score())
        with process.on_signals(self._on_signal):
            try:
                await self._send_all()
                await self._drain()
            finally:
                for task in self.under_way:
                    task.cancel()
                await asyncio.gather(*self.under_way, return_exceptions=True)
                refusal = self._settle_refused()
                self.stop = self.stop or refusal
                self._closed = True
                self._arrival.set()
                await asyncio.gather(scoring, return_exceptions=True)
        if self.stop is not None:
            raise self.stop

    def arrive(self, draw: Draw, columns: Row) -> None:
        """Queue an answer, or a failure, for scoring."""
        self._arrived.append((draw, columns))
        if hasattr(self, "_arrival"):
            self._arrival.set()

    async def _score(self) -> None:
        """Score and write what arrives, in a thread; a reward that fails stops the run."""
        try:
            while self._arrived or not self._closed:
                self._arrival.clear()
                if not self._arrived:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(TICK):
                            await self._arrival.wait()
                batch = self._arrived[:SCORED_AT_ONCE]
                del self._arrived[: len(batch)]
                await asyncio.to_thread(self.take, batch)
        except Exception as error:
            self.stop = self.stop or error
            self._news.set()

    async def _send_all(self) -> None:
        while self.stop is None:
            now = time.monotonic()
            if self.breaker.hopeless(now) and not self.under_way:
                self._give_up()
                continue
            pause = self._obstacle(now)
            job = self._next(now) if pause is None else None
            if job is None:
                if not (self._fresh or self._later or self.under_way):
                    return
                await self._wait(self._until_retry(now) if pause is None else pause)
            elif self._gone:
                self._lose(job, Transient("not_asked", "not asked: the server was gone"))
                await asyncio.sleep(0)
            elif limit := self.ledger.forbids(worst := self.worst(job)):
                self._ask_later(job, now)
                if self.under_way:
                    await self._wait(math.inf)  # these may cost less than was reserved
                else:
                    self.stop = Stopped(self.ledger.stop_message(limit, worst))
            else:
                self._send(job, worst)
                await asyncio.sleep(0)

    def _next(self, now: float) -> Job | None:
        """Return the next job that can be sent now: due retries first, then the others."""
        if self._later and (self._gone or self._later[0][0] <= now):
            return heapq.heappop(self._later)[2]
        return self._fresh.popleft() if self._fresh else None

    def _ask_later(self, job: Job, due: float) -> None:
        self._number += 1
        heapq.heappush(self._later, (due, self._number, job))

    def _until_retry(self, now: float) -> float:
        return max(0.0, self._later[0][0] - now) if self._later else math.inf

    def _obstacle(self, now: float) -> float | None:
        """Return None when one more request may be sent, else in how many seconds to look."""
        if self._gone:
            return None
        waits = (self.breaker.wait(now, len(self.under_way)), self.limiter.wait(now))
        return max((wait for wait in waits if wait is not None), default=None)

    async def _wait(self, seconds: float) -> None:
        """Wait for news, at most this long."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if seconds == math.inf else max(seconds, 0.001)):
                await self._news.wait()

    def _send(self, job: Job, worst: Amount) -> None:
        job.asked += 1
        number = self.ledger.send(job.key, worst)
        task = asyncio.create_task(self._attempt(job, number, self.limiter.send()))
        self.under_way.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.under_way.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            failed = error if isinstance(error, Exception) else Failed(repr(error))
            self.stop = self.stop or failed
        self._news.set()

    async def _attempt(self, job: Job, number: int, ticket: Ticket) -> None:
        """Send one request and handle its outcome."""
        try:
            answer, paid = await self.ask(job)
        except Failure as error:
            self.ledger.settle(number, job.key, error.kind, error.paid)
            self._failed(job, error, ticket, time.monotonic())
        except asyncio.CancelledError:
            self.ledger.settle(number, job.key, "interrupted", None)
            raise
        else:
            answer |= {"attempts": job.asked, "request": job.key}
            self.ledger.settle(number, job.key, "answered", paid, answer)
            self.tokens += answer.get("tokens") or 0
            self._answered(ticket)
            self._useless = 0
            self._server_answers()
            self.arrive(job.draw, answer)

    def _answered(self, ticket: Ticket) -> None:
        self.limiter.answered(ticket, time.monotonic())
        self.breaker.answered()

    def _failed(self, job: Job, error: Failure, ticket: Ticket, now: float) -> None:
        self.faults[error.kind] += 1
        self._last_fault = f"{error} ({error.kind})"
        if isinstance(error, Transient):
            self._retry(job, error, ticket, now)
            return
        self._answered(ticket)
        if isinstance(error, Fatal):
            self.stop = self.stop or InputError(f"{error}. Rows so far are kept")
        elif isinstance(error, Rejected):
            if not isinstance(error, Refused) and error.kind != "unsendable":
                self._server_answers()
            self._reject(job, error)

    def _retry(self, job: Job, error: Transient, ticket: Ticket, now: float) -> None:
        """Ask again later, or record the failure when it was asked often enough."""
        asked = None if error.wait is None else min(error.wait, self.args.max_retry_after)
        if error.refused:
            self.limiter.refused(ticket, now, asked)
            pause = self.args.retry_wait * random.uniform(0.25, 1.0)
            if self.limiter.level == 1:  # fewer is not possible, so it is not their number
                self.breaker.failed(now)
        else:
            self.limiter.failed()
            self.breaker.failed(now)
            job.faults += 1
            job.billed += error.billed
            pause = min(MAX_PAUSE, self.args.retry_wait * 2 ** (job.faults - 1))
            pause *= random.uniform(0.75, 1.0)
        if job.faults > self.args.max_retries or job.billed >= MAX_BILLED:
            self._lose(job, error)
        else:
            self._ask_later(job, now + (pause if asked is None else asked))

    def _reject(self, job: Job, error: Rejected) -> None:
        """Record an unusable answer; ask once more for one that was cut off."""
        if error.too_short and not job.longer:
            job.longer = True
            self._ask_later(job, 0.0)
            return
        self._useless += 1
        if not isinstance(error, Refused):
            self._lose(job, error)
        elif job.longer:
            words = f"cut off, and a larger limit was refused: {error}"
            self._lose(job, Rejected("truncated", words))
        else:
            self._refused.append((job, error))
        if self._useless >= MAX_USELESS and self.stop is None:
            self.stop = self._settle_refused() or InputError(
                f"{MAX_USELESS} answers in a row were of no use. {last_words(self.lost)} "
                "Run the same command again to continue"
            )

    def _server_answers(self) -> None:
        self._heard = True
        self._settle_refused()

    def _settle_refused(self) -> InputError | None:
        """Record refused requests; return the error if the server has answered nothing at all.

        Then the settings are at fault, and the rows are asked for again.
        """
        refused, self._refused = self._refused, []
        for job, error in refused:
            if self._heard:
                self._lose(job, error)
            else:
                self._lose(job, Transient(error.kind, str(error)), replaceable=False)
        if self._heard or not refused:
            return None
        return InputError(f"the server refused every request: {refused[-1][1]}")

    def _lose(self, job: Job, error: Failure, *, replaceable: bool = True) -> None:
        """Record that there is no answer, and let the fallback give one."""
        rejected = isinstance(error, Rejected)
        row = (error.said or {}) | {
            "request": job.key, "class": error.kind, "message": str(error), "attempts": job.asked,
            "rejected": rejected and not self.strict, "completion": None,
        }  # fmt: skip
        self.lost.append(row)
        self.arrive(job.draw, row)
        if self.fallback is not None and replaceable and not rejected:
            self.arrive(job.draw, self.fallback(job.draw) | {"request": job.key})

    def _give_up(self) -> None:
        """Stop, or let the fallback answer the rest, once the server counts as gone."""
        if self.fallback is not None:
            logger.warning("the server is gone: the offline teacher writes the rest")
            self._gone, self.breaker.open_since = True, None
            return
        self.stop = InputError(
            f"{self.breaker.in_a_row} requests in a row failed, the last: {self._last_fault}. "
            "Run the same command again to continue"
        )

    async def _drain(self) -> None:
        """Wait for pending answers, at most `shutdown_timeout` after a signal or an error."""
        end = time.monotonic() + self.args.shutdown_timeout
        if self.under_way:
            logger.info("waiting up to %g s for %d pending answers",
                        self.args.shutdown_timeout, len(self.under_way))  # fmt: skip
        while self.under_way and self._signals < 2 and (left := end - time.monotonic()) > 0:
            await self._wait(min(left, TICK))

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        name = signal.Signals(number).name
        words = f"by {name}; every answer so far is kept, run the same command again to continue"
        self.stop = self.stop or Stopped(words, 128 + number)
        self._news.set()

    def describe(self) -> str:
        """Return the state of the connection: requests at once, speed, failures, waiting."""
        speed = self.tokens / max(time.monotonic() - self.started, 0.1)
        words = [f"{len(self.under_way)}/{self.limiter.level} at once", f"{speed:,.0f} tok/s"]
        held = self.limiter.wait(time.monotonic()) or 0.0
        if self.breaker.open_since is not None:
            words.append("waiting for the server")
        elif 1 <= held < math.inf:
            words.append(f"refused (429), waiting {held:.0f} s")
        if self.faults:
            words.append(f"{self.faults.total():,} faults")
        return ", ".join(words)


def last_words(lost: Sequence[Row]) -> str:
    """Return the commonest reason for having no answer, with a reply that shows it."""
    if not lost:
        return "See failures.jsonl."
    kind = Counter(row["class"] for row in lost).most_common(1)[0][0]
    row = [row for row in lost if row["class"] == kind][-1]
    reply = row.get("reply") or row
    names = ("reasoning_content", "reasoning", "content", "answer")
    said = " ".join(text for name in names if isinstance(text := reply.get(name), str) and text)
    shown = f" One answer: {said[:SHOWN]!r}{'...' if len(said) > SHOWN else ''}." if said else ""
    return f"{kind}: {row['message']}.{shown} See failures.jsonl."


CUT = 0.8
SATURATED = 0.8  # an answer says something about the level only when about so much was in use
STEP = 0.25  # most by which the level rises at once beyond what is known to be granted
MOST_ROUNDS = 64
REMEMBERED = 64  # answers and refusals by which a random refusal is recognised
FEW = 8
RANDOM = 0.25  # at a real limit more of the requests are refused


@dataclass(frozen=True)
class Ticket:
    """One request under way."""

    cut: int  # the number of cuts before it was sent
    full: int  # how often the level was in use before
    used: int = 0  # how many were under way with it


class Limiter:
    """Allow `level` requests at a time, from `start` up to `ceiling`; times are in seconds.

    Additive increase, multiplicative decrease. The level rises by one with each answer until the
    first refusal (429), as TCP's slow start does. From then on it returns quickly to about where
    the limit is, and goes beyond by one at first, further with each step that is granted, more
    rarely with each that is refused. After a cut it does not rise for `cool_down` seconds, or as
    long as the server asks. Busy providers also refuse at random: a refusal where most others were
    granted lowers the level by one only.
    """

    def __init__(self, ceiling: int, start: int = 8, cool_down: float = 1.0) -> None:
        self.ceiling, self.cool_down = ceiling, cool_down
        self.level = min(start, ceiling)
        self.under_way = 0
        self.refused_at: int | None = None  # so many were granted when one more was not
        self._cuts = self._full = 0
        self._cuts_in_a_row = 0  # each of which was refused again
        self._clean = 0
        self._rounds = 4  # of `level` clean answers, before the next step
        self._step = 1
        self._recovered = False  # whether the level came back to `refused_at` since the cut
        self._debt = 0  # answers that do not count, for requests that failed otherwise
        self._frozen_until = self._held_until = 0.0
        self._lately: deque[tuple[int, bool]] = deque(maxlen=REMEMBERED)  # used, granted

    def wait(self, now: float) -> float | None:
        """Return None when one more may be sent, else in how many seconds to look again."""
        if now < self._held_until:
            return self._held_until - now
        return None if self.under_way < self.level else math.inf

    def send(self) -> Ticket:
        """Count a request as under way."""
        self.under_way += 1
        ticket = Ticket(self._cuts, self._full, self.under_way)
        if self.under_way >= SATURATED * self.level:
            self._full += 1
        return ticket

    def answered(self, ticket: Ticket, now: float) -> None:
        """Count an answer; rise when it was clean and the level was in use."""
        self.under_way -= 1
        self._lately.append((ticket.used, True))
        clean = ticket.cut == self._cuts
        if clean:
            self._cuts_in_a_row = 0
        if self._debt > 0:
            self._debt -= 1
        elif clean and self._full > ticket.full and now >= self._frozen_until:
            self._rise()

    def failed(self) -> None:
        """Count a failure that is not the level's fault: the rise pauses, nothing is cut."""
        self.under_way -= 1
        self._debt = min(self._debt + 1, self.level)
        self._clean = 0

    def refused(self, ticket: Ticket, now: float, asked: float | None) -> None:
        """Count a 429; cut once for all that were sent before the cut.

        `asked` is the server's Retry-After. When the lower level is refused too, the rate of the
        requests is too high, not their number: then all of them wait.
        """
        # With much of the level unused it is not known how many would have been granted.
        used = self.under_way if self.under_way >= SATURATED * self.level else self.level
        self.under_way -= 1
        granted = max(1, used - 1)
        self._lately.append((ticket.used, False))
        if ticket.cut < self._cuts:  # of the same burst as the one that was answered by a cut
            if self.refused_at is not None:
                self.refused_at = min(self.refused_at, max(granted, self.level))
            return
        if self._at_random(ticket.used):
            self.refused_at = max(granted, self.refused_at or self.level)
            self.level = max(1, self.level - 1)
            self._frozen_until = max(self._frozen_until, now + (asked or 0.0))
            return
        if self.refused_at is None:
            self.refused_at = granted
        elif granted >= self.refused_at:  # that was a step beyond: the next one can wait longer
            self._rounds = min(2 * self._rounds, MOST_ROUNDS)
        elif granted >= CUT * self.refused_at:  # about there: others under way blur the count
            self.refused_at = granted
        elif not self._recovered:  # twice far below: the limit moved; once may be by chance
            self.refused_at = max(granted, math.floor(CUT * self.refused_at))
        self._recovered, self._step, self._clean = False, 1, 0
        self._cuts += 1
        self._cuts_in_a_row += 1
        self.level = max(1, math.floor(CUT * min(self.level, used)))
        self._frozen_until = now + max(self.cool_down, asked or 0.0)
        if self._cuts_in_a_row > 1:
            pause = min(MAX_PAUSE, self.cool_down * 2 ** min(self._cuts_in_a_row - 2, 10))
            self._held_until = now + (pause if asked is None else asked)

    def _at_random(self, used: int) -> bool:
        """Return whether most requests with as many beside them were granted lately."""
        alike = [granted for others, granted in self._lately if others >= used]
        return len(alike) >= FEW and alike.count(False) < RANDOM * len(alike)

    def _rise(self) -> None:
        if self.refused_at is None or self.level < self.refused_at:
            self.level = min(self.level + 1, self.ceiling)
            self._recovered = self.level == self.refused_at
            return
        self._clean += 1
        if self._clean >= self._rounds * self.level:
            self._clean = 0
            if self.level > self.refused_at:  # the last step was granted all along
                self.refused_at = self.level
                self._rounds = max(1, self._rounds // 2)
                self._step = min(2 * self._step, max(1, math.floor(STEP * self.level)))
            self.level = min(self.level + self._step, self.ceiling)


class Breaker:
    """Stop sending while everything fails; let one request at a time probe the server.

    After `timeout` seconds of that the server counts as gone.
    """

    def __init__(self, threshold: int, first_pause: float, timeout: float) -> None:
        self.threshold, self.first_pause, self.timeout = threshold, first_pause, timeout
        self.in_a_row = self.probes = 0
        self.open_since: float | None = None
        self._next = 0.0

    def wait(self, now: float, under_way: int) -> float | None:
        """Return None when one more may be sent, else in how many seconds to look again."""
        if self.open_since is None:
            return None
        if under_way:
            return math.inf
        return None if now >= self._next else self._next - now

    def answered(self) -> None:
        """Record that the server answers."""
        self.in_a_row = self.probes = 0
        self.open_since = None

    def failed(self, now: float) -> None:
        """Count a failure; open after `threshold` in a row, and pause longer after each probe."""
        self.in_a_row += 1
        if self.in_a_row < self.threshold:
            return
        if self.open_since is None:
            self.open_since = now
        elif now >= self._next:
            self.probes += 1
        self._next = now + min(MAX_PAUSE, self.first_pause * 2**self.probes)

    def hopeless(self, now: float) -> bool:
        """Return whether the server has been gone for longer than `timeout`."""
        since = self.open_since
        return since is not None and self.probes > 0 and now - since >= self.timeout
