"""What has come of every answer that was asked for, on disk and counted.

`samples.jsonl` holds what can be trained on, right or wrong; `failures.jsonl` says of every other
answer why not. Both are only appended to, so a run that was cut asks for what is missing.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from pathlib import Path

from chainforge.core.jsonl import JsonLines, Row, read_rows
from chainforge.generate.jobs import Job
from chainforge.generate.replies import Failure, Rejected

SAMPLES, FAILURES = "samples.jsonl", "failures.jsonl"
RATE_SECONDS = 30.0
SHOWN = 200  # characters of an answer, in a message


class Results:
    """The rows of one directory."""

    def __init__(self, directory: Path, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.samples_path, self.failures_path = directory / SAMPLES, directory / FAILURES
        self.kept: dict[str, Row] = {}
        self.lost: dict[str, Row] = {}
        self.faults: Counter[str] = Counter()  # requests of this run, also those asked again
        self.last_fault = ""
        self.verdicts: Counter[bool | None] = Counter()
        self._tokens: deque[tuple[float, int]] = deque()
        self._started = time.monotonic()
        self._samples, self._failures = JsonLines(self.samples_path), JsonLines(self.failures_path)
        self._recall()

    def _recall(self) -> None:
        """Read what an earlier run left; what failed in passing is not lost, but asked again."""
        mine = {job.key for job in self.jobs}
        for row in read_rows(self.samples_path):
            if row.get("request") in mine and row["request"] not in self.kept:
                self._keep(row)
        for row in read_rows(self.failures_path):
            if row.get("request") in mine and row["rejected"]:
                self.lost[row["request"]] = row

    def missing(self) -> list[Job]:
        """Return what has no answer, good or rejected."""
        return [job for job in self.jobs if job.key not in self.kept and job.key not in self.lost]

    def right(self) -> Counter[str]:
        """Count the right answers of each prompt."""
        return Counter(row["id"] for row in self.kept.values() if row.get("correct"))

    def keep(self, rows: list[Row]) -> None:
        """Write Samples down."""
        self._samples.extend(rows)
        for row in rows:
            self._keep(row)

    def _keep(self, row: Row) -> None:
        self.kept[row["request"]] = row
        self.lost.pop(row["request"], None)  # the offline teacher stood in for it
        self.verdicts[row.get("correct")] += 1

    def lose(self, job: Job, error: Failure, *, rejected: bool) -> None:
        """Write down why there is no Sample."""
        row = {"request": job.key, "id": job.row["id"], "sample": job.index,
               "task": job.row["task"], "class": error.kind, "message": str(error),
               "rejected": rejected, "attempts": job.asked}  # fmt: skip
        if isinstance(error, Rejected) and error.said:
            row = error.said | row  # it was paid for, and says what went wrong
        self._failures.append(row)
        self.lost[job.key] = row

    def fault(self, kind: str, message: str = "") -> None:
        """Count a request that failed, whatever comes of its row."""
        self.faults[kind] += 1
        self.last_fault = f"{message} ({kind})" if message else kind

    def count_tokens(self, answer: Row | None) -> None:
        """Count the tokens of an answer that has just come."""
        self._tokens.append((time.monotonic(), int((answer or {}).get("tokens") or 0)))

    def tokens_per_second(self) -> float:
        """Return the rate of the last half minute."""
        now = time.monotonic()
        while self._tokens and self._tokens[0][0] < now - RATE_SECONDS:
            self._tokens.popleft()
        span = min(RATE_SECONDS, now - self._started)
        return sum(count for _, count in self._tokens) / max(span, 0.1)

    def done(self) -> int:
        """Count the answers that are settled, one way or the other."""
        return len(self.kept) + len(self.lost)

    def lost_classes(self) -> Counter[str]:
        """Count by class what was asked for and has no Sample."""
        return Counter(row["class"] for row in self.lost.values())

    def last_words(self) -> str:
        """Return the commonest reason for having no Sample, with one answer that shows it."""
        common = self.lost_classes().most_common(1)
        if not common:
            return f"See {self.failures_path}."
        row = [row for row in self.lost.values() if row["class"] == common[0][0]][-1]
        reply = row.get("reply") or row
        names = ("reasoning_content", "reasoning", "content", "answer")
        said = " ".join(text for name in names if isinstance(text := reply.get(name), str) and text)
        shown = (
            f" One answer: {said[:SHOWN]!r}{'...' if len(said) > SHOWN else ''}." if said else ""
        )
        return f"{row['class']}: {row['message']}.{shown} See {self.failures_path}."

    def rows(self) -> list[Row]:
        """Return the Samples, in the order of the prompts."""
        return [self.kept[job.key] for job in self.jobs if job.key in self.kept]

    def sync(self) -> None:
        """Force the rows to disk."""
        self._samples.sync()
        self._failures.sync()

    def close(self) -> None:
        """Force the rows to disk, and close the files."""
        self._samples.close()
        self._failures.close()
