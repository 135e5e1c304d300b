"""Take answers in: judge them in a thread, while others arrive, and write them down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from chainforge.core.jsonl import Row, sample
from chainforge.generate.jobs import Job, Jobs
from chainforge.generate.results import Results

# Verdicts are made side by side over a batch, and appended together.
AT_ONCE = 64


class Intake:
    """Answers on their way to `samples.jsonl`; `finish` judges a batch of Samples."""

    def __init__(
        self, jobs: Jobs, results: Results, finish: Callable[[list[Row]], list[Row]]
    ) -> None:
        self.jobs, self.results, self.finish = jobs, results, finish
        self.pending = 0
        self._arrived: list[tuple[Job, Row]] = []
        self._news = asyncio.Event()
        self._closed = False

    def arrive(self, job: Job, answer: Row) -> None:
        """Take in the columns of an answer."""
        columns = {key: value for key, value in answer.items() if key != "completion"}
        self._arrived.append((job, sample(job.row, answer["completion"], job.index, **columns)))
        self.pending += 1
        self._news.set()

    def close(self) -> None:
        """Let `judge` end once everything is written."""
        self._closed = True
        self._news.set()

    async def judge(self, told: Callable[[], None]) -> None:
        """Judge and write until closed; `told` is called after each batch."""
        while self._arrived or not self._closed:
            self._news.clear()
            batch = self._arrived[:AT_ONCE]
            if not batch:
                await self._news.wait()
                continue
            del self._arrived[: len(batch)]
            try:
                rows = await asyncio.to_thread(self.finish, [row for _, row in batch])
                self.results.keep(rows)
                for (job, _), row in zip(batch, rows, strict=True):
                    self.jobs.done(job, row.get("correct"))
            finally:
                self.pending -= len(batch)
                told()
