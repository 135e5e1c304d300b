"""Ask for many answers at once, and write each down as it arrives.

One loop sends; it looks at the limiter, the breaker and the budget before every request. An
answer is in the ledger before anything else happens to it, and in `samples.jsonl` once it has
been judged, which a thread does meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from chainforge.core import process
from chainforge.core.errors import Failed, InputError, Stopped
from chainforge.core.jsonl import Row
from chainforge.generate.budget import budget_message
from chainforge.generate.jobs import Job
from chainforge.generate.ledger import Amount, Ledger
from chainforge.generate.limiter import Breaker, Limiter, Ticket
from chainforge.generate.outcomes import MOST_BILLED, PATIENCE, Outcomes
from chainforge.generate.replies import Failure, Fatal, Refused, Rejected, Transient

if TYPE_CHECKING:
    from chainforge.generate.settings import TeacherArgs
    from chainforge.generate.teacher import Teacher

logger = logging.getLogger(__name__)

LONGEST_WAIT = 60.0
TICK = 0.5
FIRST = 10  # requests at a time, to begin with


class Collector:
    """A collection under way."""

    def __init__(
        self,
        args: TeacherArgs,
        teacher: Teacher,
        outcomes: Outcomes,
        ledger: Ledger,
    ) -> None:
        self.args, self.teacher, self.outcomes = args, teacher, outcomes
        self.jobs, self.results = outcomes.jobs, outcomes.results
        self.ledger, self.intake = ledger, outcomes.intake
        ceiling = args.ceiling()
        start = FIRST if teacher.metered else ceiling
        self.limiter = Limiter(ceiling, start, args.retry_wait)
        self.breaker = Breaker(PATIENCE, args.retry_wait, args.outage_timeout)
        self.under_way: set[asyncio.Task[None]] = set()
        self.stop: Exception | None = None
        self._gone = False  # the server, as far as the breaker can tell
        self._news = asyncio.Event()
        self._signals = 0

    async def run(self, tell: Callable[[Collector], None]) -> None:
        """Work until everything is answered, a limit or a signal ends it, or nothing goes."""
        judge = asyncio.create_task(self._judge())
        clock = asyncio.create_task(self._tick(tell))
        with process.on_signals(self._asked_to_stop):
            try:
                await self._send_all()
                await self._let_end()
            finally:
                clock.cancel()
                for task in self.under_way:
                    task.cancel()
                await asyncio.gather(*self.under_way, return_exceptions=True)
                self.intake.close()
                await asyncio.gather(judge, clock, return_exceptions=True)
                await self.teacher.close()
                refusal = self.outcomes.settle()
                self.stop = self.stop or refusal
                tell(self)
        if self.stop is not None:
            raise self.stop

    async def _judge(self) -> None:
        """Judge what arrives; a reward that fails stops the run, as everywhere."""
        try:
            await self.intake.judge(self._news.set)
        except Exception as error:
            self.stop = self.stop or error
            self._news.set()

    async def _send_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self.stop is None:
            now = loop.time()
            if self.breaker.hopeless(now) and not self.under_way:
                self._give_up()
                continue
            pause = self._obstacle(now)
            job = None if pause is not None else self.jobs.next(math.inf if self._gone else now)
            if job is None:
                if self.jobs.empty() and not self.under_way and not self.intake.pending:
                    return
                await self._wait(self._next_look(now) if pause is None else pause)
            elif self._gone:
                self.outcomes.not_asked(job)
                await asyncio.sleep(0)
            elif limit := self.ledger.forbids(worst := self._worst(job)):
                self.jobs.back(job, now)
                if not self.under_way and not self.intake.pending:
                    self._out_of(limit, worst)
                else:
                    await self._wait(math.inf)  # what is under way may cost less than was reserved
            else:
                self._send(job, worst)
                await asyncio.sleep(0)

    def _obstacle(self, now: float) -> float | None:
        """Return None when one more request may be sent, else in how many seconds to look."""
        if self._gone:
            return None
        waits = (self.breaker.wait(now, len(self.under_way)), self.limiter.wait(now))
        return max((wait for wait in waits if wait is not None), default=None)

    def _next_look(self, now: float) -> float:
        due = self.jobs.due()
        return math.inf if due is None else max(0.0, due - now)

    async def _wait(self, seconds: float) -> None:
        """Wait for news, or so long."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if seconds == math.inf else max(seconds, 0.001)):
                await self._news.wait()

    def _worst(self, job: Job) -> Amount:
        return self.teacher.worst(job.row, longer=job.longer)

    def _send(self, job: Job, worst: Amount) -> None:
        job.asked += 1
        number = self.ledger.send(job.key, worst) if self.teacher.metered else 0
        task = asyncio.create_task(self._attempt(job, number, self.limiter.send()))
        self.under_way.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.under_way.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.stop = self.stop or (
                error if isinstance(error, Exception) else Failed(repr(error))
            )
        self._news.set()

    async def _attempt(self, job: Job, number: int, ticket: Ticket) -> None:
        """Send one request and see to what comes of it."""
        now = asyncio.get_running_loop().time
        try:
            answer, paid = await self.teacher.ask(job.row, job.index, longer=job.longer)
        except Failure as error:
            self._settle(number, job, error.kind, error.paid)
            if isinstance(error, Transient):
                self._transient(job, error, ticket, now())
            else:
                self._answered(ticket, now())
                if isinstance(error, Fatal):
                    self.stop = self.stop or InputError(f"{error}. Rows so far are kept")
                    self.results.fault(error.kind)
                elif isinstance(error, Rejected):
                    if not isinstance(error, Refused) and error.kind != "unsendable":
                        self.outcomes.answered()
                    refusal = self.outcomes.reject(job, error)
                    self.stop = self.stop or refusal
        except asyncio.CancelledError:
            self._settle(number, job, "interrupted", None)
            raise
        else:
            answer = {**answer, "attempts": job.asked, "request": job.key}
            self._settle(number, job, "answered", paid, answer)
            self._answered(ticket, now())
            self.outcomes.in_vain = 0
            self.outcomes.answered()
            self.intake.arrive(job, answer)

    def _settle(
        self, number: int, job: Job, outcome: str, paid: Amount | None, answer: Row | None = None
    ) -> None:
        if self.teacher.metered:
            self.ledger.settle(number, job.key, outcome, paid, answer)
            self.results.count_tokens(answer)

    def _answered(self, ticket: Ticket, now: float) -> None:
        self.limiter.answered(ticket, now)
        self.breaker.answered()

    def _transient(self, job: Job, error: Transient, ticket: Ticket, now: float) -> None:
        """Ask again later, or record the failure when it was asked often enough."""
        self.results.fault(error.kind, str(error))
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
            pause = min(LONGEST_WAIT, self.args.retry_wait * 2 ** (job.faults - 1))
            pause *= random.uniform(0.75, 1.0)
        if job.faults > self.args.max_retries or job.billed >= MOST_BILLED:
            self.outcomes.lose(job, error, rejected=False)
        else:
            self.jobs.back(job, now + (pause if asked is None else asked))

    def _give_up(self) -> None:
        """Stop, or let the offline teacher write the rest, once the server counts as gone."""
        if self.outcomes.fallback is not None:
            logger.warning("the server is gone: the offline teacher writes the rest")
            self._gone, self.breaker.open_since = True, None
            return
        self.stop = InputError(
            f"{self.breaker.in_a_row} requests in a row failed, the last: "
            f"{self.results.last_fault}; see {self.results.failures_path}. Running again goes on "
            "from here"
        )

    def _out_of(self, limit: str, worst: Amount) -> None:
        """End the run because one more request might break a limit."""
        self.stop = Stopped(budget_message(self.args, limit, worst, self.ledger, self.results))

    async def _tick(self, tell: Callable[[Collector], None]) -> None:
        while True:
            tell(self)
            await asyncio.sleep(TICK)

    async def _let_end(self) -> None:
        """Wait for what is under way, as long as one may after a signal or an error."""
        end = asyncio.get_running_loop().time() + self.args.shutdown_timeout
        if self.under_way:
            logger.info("waiting up to %g s for %d answers under way", self.args.shutdown_timeout,
                        len(self.under_way))  # fmt: skip
        while self.under_way and self._signals < 2:
            left = end - asyncio.get_running_loop().time()
            if left <= 0:
                return
            await self._wait(min(left, TICK))

    def _asked_to_stop(self, number: int) -> None:
        self._signals += 1
        name = signal.Signals(number).name
        words = f"by {name}; every answer so far is kept, and the same command goes on from here"
        self.stop = self.stop or Stopped(words, 128 + number)
        self._news.set()
