"""Which answers are asked for, in which order, and when a prompt has enough of them."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from dataclasses import dataclass

from chainforge.core.jsonl import Row


@dataclass(eq=False)
class Job:
    """One answer to ask for: the `index`-th to a prompt."""

    row: Row
    index: int
    key: str  # the hash of the request
    asked: int = 0  # requests sent
    faults: int = 0  # of them, those that failed in passing; refusals for their number left out
    billed: int = 0  # of them, those that the server worked on
    longer: bool = False

    @property
    def prompt(self) -> str:
        """The identity of the prompt."""
        return str(self.row["id"])


class Jobs:
    """Hand out jobs: those that wait for a retry first, then first answers before second ones.

    With `until_correct` a prompt never has more requests under way than right answers wanting.
    """

    def __init__(self, jobs: list[Job], until_correct: int | None, right: Counter[str]) -> None:
        self._fresh = deque(sorted(jobs, key=lambda job: job.index))  # stable: prompts in order
        self._later: list[tuple[float, int, Job]] = []
        self._parked: dict[str, deque[Job]] = defaultdict(deque)
        self._open: Counter[str] = Counter()  # under way, waiting for a retry or for a verdict
        self._right, self._wanted = right, until_correct
        self._number = 0
        self.unneeded = 0

    def next(self, now: float) -> Job | None:
        """Return the next job that can be sent now."""
        if self._later and self._later[0][0] <= now:
            return heapq.heappop(self._later)[2]
        while self._fresh:
            job = self._fresh.popleft()
            if self._wanted is None:
                return job
            right = self._right[job.prompt]
            if right >= self._wanted:
                self.unneeded += 1
            elif right + self._open[job.prompt] >= self._wanted:
                self._parked[job.prompt].append(job)
            else:
                self._open[job.prompt] += 1
                return job
        return None

    def back(self, job: Job, due: float) -> None:
        """Take a job back, to be handed out again at a time."""
        self._number += 1
        heapq.heappush(self._later, (due, self._number, job))

    def due(self) -> float | None:
        """Return when the next retry is due."""
        return self._later[0][0] if self._later else None

    def started(self, job: Job) -> None:
        """Note that a job is under way that was not handed out here."""
        self._open[job.prompt] += 1

    def done(self, job: Job, right: bool | None) -> None:
        """Note what came of a job, and let the next of its prompt go."""
        self._right[job.prompt] += bool(right)
        self._open[job.prompt] -= 1
        parked = self._parked.pop(job.prompt, None)
        if parked:
            self._fresh.extendleft(reversed(parked))

    def empty(self) -> bool:
        """True when nothing is left to hand out, now or later."""
        return not (self._fresh or self._later or self._parked)
