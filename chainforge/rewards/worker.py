"""The judge's own program: compare answers in confined children that it ends in time.

`chainforge.rewards.judges` starts it as `python -c "...worker.main(...)"`; a trainer never
imports it. It imports the parsers once and forks a child per worker from there, single-threaded,
so a fork is safe and a killed child is replaced in milliseconds. Being a program of its own, it
imports neither torch nor the user's `__main__`, which multiprocessing's spawn and forkserver would
both run again in every child.

A child is not trusted. It says one byte at a time, which is checked; it holds no descriptor but
its two pipes; and its time is taken from outside, where nothing that runs in it can stop the
clock. The limit counts the processor's time, so that a busy or suspended machine changes no
verdict; a second one, by the clock, ends a child that waits for something.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import IO, Any

import psutil

from chainforge.rewards.confinement import confine
from chainforge.rewards.judges import Job
from chainforge.rewards.scorers import scorer_of

# Enough of LaTeX's grammar to fill the parser's caches before the first fork.
_WARM_UP = (r"\frac{1}{2}", r"2\sqrt{3}", "x^2+3x-1", "(1,2)", "y=2x+3", r"\{1,2\}", "[1,2)",
            r"(-\infty,1)\cup(2,\infty)", "3+4i", r"48^\circ", r"12.5\%")  # fmt: skip

# What a child may say. The first is no verdict: what comes after it is the answer's doing.
_GOLD_READ = b"g"
_VERDICTS: dict[bytes, bool | str] = {b"1": True, b"0": False, b"m": "memory", b"?": "gold"}
_MAX_DESCRIPTOR = 65_536


def main(workers: int, limit: float, patience: float, memory: int, kinds: Collection[str]) -> None:
    """Serve batches until standard input ends: a line of jobs in, a line per verdict out.

    `kinds` are the jobs to be ready for; another kind is made ready for when it comes.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # A stray print of a library must not enter the protocol.
    logging.disable(logging.CRITICAL)
    try:
        crew = Crew(workers, limit, patience, memory)
        crew.prepare(kinds)
        _say(out, {"ready": True})
        while line := sys.stdin.buffer.readline():
            for index, verdict in crew.judge(json.loads(line)):
                _say(out, {"index": index, "verdict": verdict})
    except BrokenPipeError:
        pass
    except Exception as error:
        _say(out, {"error": f"{type(error).__name__}: {error}"})


def _say(out: IO[str], message: Any) -> None:
    """Write one message."""
    out.write(json.dumps(message) + "\n")
    out.flush()


@dataclass
class _Child:
    """A worker: where it takes jobs, where it says verdicts, and since when it has this job."""

    process: psutil.Process
    jobs: int
    verdicts: int
    index: int = 0
    gold_read: bool = False
    started: float = 0.0
    started_cpu: float = 0.0

    def take(self, index: int, job: Job) -> None:
        """Send a job."""
        self.index, self.gold_read = index, False
        self.started, self.started_cpu = time.monotonic(), self.cpu()
        with suppress(BrokenPipeError):  # It died: that is seen at the other pipe.
            data = memoryview(json.dumps(job).encode() + b"\n")
            while data:
                data = data[os.write(self.jobs, data) :]

    def cpu(self) -> float:
        """Return the seconds of a processor that it has used."""
        try:
            times = self.process.cpu_times()
        except psutil.Error:  # It died: that is seen at its pipe.
            return 0.0
        return float(times.user + times.system)

    def end(self) -> None:
        """Kill and reap it, whatever it does."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        os.waitpid(self.process.pid, 0)
        os.close(self.jobs)
        os.close(self.verdicts)


class Crew:
    """The children and who is busy with what; used by one thread."""

    def __init__(self, workers: int, limit: float, patience: float, memory: int) -> None:
        self._limit, self._patience, self._memory = limit, patience, memory
        self._workers = workers
        self._idle: list[_Child] = []
        self._ready: set[str] = set()

    def prepare(self, kinds: Collection[str]) -> None:
        """Make here what these jobs need: `math`, or the data set of a scorer.

        No child pays for it in its limit, and none needs to read its files.
        """
        kinds = set(kinds) - self._ready
        if not kinds and self._idle:
            return
        for kind in kinds - {"math"}:
            with suppress(Exception):  # Its jobs fail in a child: the entry is at fault.
                scorer_of(kind)
        if "math" in kinds:
            for text in _WARM_UP:
                list(_judge_math(text, text + "+0"))
        self._ready |= kinds
        for child in self._idle:
            child.end()
        gc.freeze()
        self._idle = [self._hire() for _ in range(self._workers)]

    def _hire(self) -> _Child:
        theirs, jobs = os.pipe()
        verdicts, answers = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _work(theirs, answers, self._memory)
            finally:
                os._exit(1)
        os.close(theirs)
        os.close(answers)
        os.read(verdicts, 1)  # It is confined: from here on its time is a job's.
        return _Child(psutil.Process(pid), jobs, verdicts)

    def judge(self, jobs: list[Job]) -> Iterator[tuple[int, bool | str]]:
        """Yield a verdict per job with its index: true, false, or why there is none.

        `gold`: the gold answer cannot be read; `timeout`, `memory`, `crash`: the answer's doing.
        """
        self.prepare({_kind(job) for job in jobs})
        busy: dict[int, _Child] = {}
        waiting = list(reversed(list(enumerate(jobs))))
        while waiting or busy:
            while waiting and self._idle:
                child = self._idle.pop()
                child.take(*waiting.pop())
                busy[child.verdicts] = child
            for child in self._wait(busy):
                verdict, reusable = self._hear(child)
                if verdict is None:
                    continue
                del busy[child.verdicts]
                yield child.index, verdict
                if not reusable:
                    child.end()
                self._idle.append(child if reusable else self._hire())

    def _wait(self, busy: dict[int, _Child]) -> list[_Child]:
        """Wait until a child speaks or may have used up its time."""
        soonest = min(map(self._remaining, busy.values()))
        descriptors = [sys.stdin.fileno(), *busy]
        readable, _, _ = select.select(descriptors, (), (), max(0.0, soonest) + 0.01)
        if sys.stdin.fileno() in readable:
            os.killpg(0, signal.SIGKILL)  # The trainer is gone: it never writes during a batch.
        return [
            child for end, child in busy.items() if end in readable or self._remaining(child) < 0
        ]

    def _remaining(self, child: _Child) -> float:
        """Return for how many seconds a child surely stays within its limits."""
        waited = time.monotonic() - child.started
        if waited < self._limit:  # One thread uses no more of a processor than passes by the clock.
            return self._limit - waited
        used = child.cpu() - child.started_cpu
        return min(self._limit - used, self._patience - waited)

    def _hear(self, child: _Child) -> tuple[bool | str | None, bool]:
        """Return what came of a job, None if nothing yet, and whether the child may have another.

        One that died, ran out of time or memory, or spoke out of turn may not.
        """
        overdue = self._remaining(child) < 0
        said = b"" if overdue else os.read(child.verdicts, 1)
        if said == _GOLD_READ and not child.gold_read:
            child.gold_read = True
            return None, True
        if said in _VERDICTS:
            is_quiet = not select.select([child.verdicts], (), (), 0)[0]
            return _VERDICTS[said], is_quiet and said != b"m"
        # Before the gold answer was read, it is the gold answer's doing.
        return ("gold" if not child.gold_read else "timeout" if overdue else "crash"), False


def _kind(job: Job) -> str:
    """Return what a job needs: `math`, or the name of a data set."""
    kind, _, reference = job
    return kind if kind == "math" else str(json.loads(reference)["metadata"]["source_dataset"])


def _work(jobs: int, verdicts: int, memory: int) -> None:
    """Judge jobs until the pipe closes or this process is ended."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    kept = sorted((2, jobs, verdicts, _MAX_DESCRIPTOR))
    for low, high in pairwise(kept):
        os.closerange(low + 1, high)
    confine(memory)
    os.write(verdicts, b"!")
    for line in os.fdopen(jobs, "rb"):
        kind, answer, reference = json.loads(line)
        judge = _judge_math if kind == "math" else _judge_scored
        said = b"?"
        try:
            for said in judge(answer, reference):
                os.write(verdicts, said)
        except MemoryError:
            os.write(verdicts, b"m")
        except Exception:
            # An answer that a parser or scorer chokes on is not the gold answer.
            os.write(verdicts, b"?" if said == b"?" else b"0")


def _judge_math(answer: str, gold: str) -> Iterator[bytes]:
    """Compare with math-verify, both boxed, its own timeouts off (they would need the alarm)."""
    from math_verify import verify

    if golds := _parse(gold):
        yield _GOLD_READ
        answers = _parse(answer)
        same = verify(list(golds), list(answers), timeout_seconds=None)
        yield b"1" if same and not _far(answers[0], golds[0]) else b"0"
    else:
        yield b"?"


def _far(answer: Any, gold: Any) -> bool:
    """Whether two numbers differ by a millionth; math-verify takes all tiny ones for 0."""
    if not all(getattr(value, "is_number", False) for value in (answer, gold)):
        return False
    try:
        mine, theirs = complex(answer.evalf(15)), complex(gold.evalf(15))
    except (TypeError, ValueError, OverflowError):  # infinite, or a symbol that is a number
        return False
    return abs(mine - theirs) > 1e-6 * abs(theirs)


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[Any, ...]:
    """Parse one boxed expression; empty when it cannot be read."""
    from math_verify import LatexExtractionConfig, parse

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    return tuple(parse(f"\\boxed{{{text}}}", extraction_config=config, parsing_timeout=None))


def _judge_scored(answer: str, entry: str) -> Iterator[bytes]:
    """Ask the data set's scorer; only the full score is correct, part of it is not."""
    question = json.loads(entry)
    scorer = scorer_of(question["metadata"]["source_dataset"])
    yield _GOLD_READ
    yield b"1" if scorer(answer, question) >= 1.0 else b"0"
