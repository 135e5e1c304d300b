"""Score answers in confined processes that can be killed: math-verify and reasoning-gym's scorers.

The trainer holds a `VerifierPool`, which works from any thread, touches no signal handler or timer
of its process, and ends with it. The pool's program (`main`) imports the parsers once and forks a
child per worker from there: single-threaded, so a fork is safe and a killed child is replaced in
milliseconds. It imports neither torch nor the user's `__main__`, which multiprocessing's spawn and
forkserver would both run again in every child.

A child is not trusted. It writes one byte at a time, which is checked; it holds no descriptor but
its two pipes; and its time is taken from outside, where nothing that runs in it can stop the
clock. The limit counts processor time, so that a busy or suspended machine changes no verdict; a
second limit, on elapsed time, ends a child that waits for something.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from typing import Any

from chainforge.rewards.confinement import confine, program
from chainforge.rewards.scorers import scorer_of

logger = logging.getLogger(__name__)

Job = tuple[str, str, str]
"""Kind (`math` or `reasoning_gym`), the answer, and the gold answer or the entry's JSON."""
Verdict = bool | str
"""True, False, or why there is neither: `gold` (the gold answer cannot be read), `lost`,
`timeout`, `memory`, `crash`."""

_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "PYTHONPATH", "PYTHONHOME",
                "PYTHONUSERBASE", "LD_LIBRARY_PATH")  # fmt: skip
_PATIENCE = 15  # times the limit: a busy machine takes longer for a second of a processor


def cores() -> int:
    """Return how many of the machine's cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """Return this process's share of the machine's cores, 1 to 4."""
    return max(1, min(4, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class VerifierPool:
    """A verifying program of `workers` children, started when first needed or by `start`.

    A verdict may take `limit` seconds of a processor, and `memory` bytes. `scored` counts jobs.
    """

    def __init__(
        self, workers: int | None = None, limit: float = 2.0, memory: int = 2 * 1024**3
    ) -> None:
        self.settings = (workers or default_workers(), limit, memory)
        self.scored = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._forget()
        atexit.register(self.close)
        # A fork (a data loader's worker) inherits the pipes but must start a program of its own.
        os.register_at_fork(after_in_child=self._forget)

    def score(self, jobs: Sequence[Job]) -> list[Verdict]:
        """Return a verdict per job, in order.

        If the program itself dies, the jobs that are left are scored one by one, and one over which
        it dies alone is `lost`. Raises `RuntimeError` when it cannot start.
        """
        verdicts: dict[int, Verdict] = {}
        with self._lock:
            self.scored += len(jobs)
            try:
                self._ask(jobs, range(len(jobs)), verdicts)
                for index in range(len(jobs)):
                    if index not in verdicts:
                        self._ask(jobs, [index], verdicts)
            except BaseException:
                # Ctrl-C or an alarm in mid-batch: its verdicts must not answer the next batch.
                self._stop()
                raise
        return [verdicts.get(index, "lost") for index in range(len(jobs))]

    def start(self, kinds: Collection[str]) -> subprocess.Popen[bytes]:
        """Start the program, unless it runs, and do not wait: it imports while others work."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
                self._is_ready = False
                # A session of its own: Ctrl-C reaches the trainer only, which then closes the pipe.
                self._process = subprocess.Popen(
                    program(__name__, *self.settings, tuple(kinds)),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                    start_new_session=True,
                )
            return self._process

    def close(self) -> None:
        """End the program and its children; a later `score` starts it again."""
        with self._lock:
            self._stop()

    def _ask(
        self, jobs: Sequence[Job], indices: Sequence[int], verdicts: dict[int, Verdict]
    ) -> None:
        """Score these jobs and fill in the results, as many as come before the program dies."""
        some = [jobs[index] for index in indices]
        if not some:
            return
        process = self.start({job[0] for job in some})
        assert process.stdin is not None
        assert process.stdout is not None
        if not self._is_ready:
            line = process.stdout.readline() or b'{"error": "it ended"}'
            if error := json.loads(line).get("error"):
                raise RuntimeError(f"the verifier pool ({sys.executable}) does not start: {error}")
            self._is_ready = True
        try:
            process.stdin.write(json.dumps(some).encode() + b"\n")
            process.stdin.flush()
            for _ in some:
                place, verdict = json.loads(process.stdout.readline())
                verdicts[indices[place]] = verdict
        except (OSError, ValueError) as error:
            logger.warning("the verifier pool died (%s); starting it again", error)
            self._stop()

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.communicate()

    def _forget(self) -> None:
        """Leave the parent's program alone, after a fork in the child."""
        self._lock = threading.RLock()
        self._process = None


# From here on: the program, and its children.

# Enough of LaTeX's grammar to fill the parser's caches before the first fork.
_WARM_UP = (r"\frac{1}{2}", r"2\sqrt{3}", "x^2+3x-1", "(1,2)", "y=2x+3", r"\{1,2\}", "[1,2)",
            r"(-\infty,1)\cup(2,\infty)", "3+4i", r"48^\circ", r"12.5\%")  # fmt: skip

# What a child may write. The first is no verdict: what comes after it is the answer's doing.
_GOLD_READ = b"g"
_VERDICTS: dict[bytes, Verdict] = {b"1": True, b"0": False, b"m": "memory", b"?": "gold"}
_MAX_DESCRIPTOR = 65_536


def main(workers: int, limit: float, memory: int, kinds: Collection[str]) -> None:
    """Serve batches until standard input ends: a line of jobs in, a line per verdict out.

    `kinds` are the jobs to prepare for; another kind is prepared for when it comes.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # A stray print of a library must not enter the protocol.
    logging.disable(logging.CRITICAL)

    def send(message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    try:
        crew = Crew(workers, limit, memory)
        crew.prepare(kinds)
        send({})
        while line := sys.stdin.buffer.readline():
            for verdict in crew.score(json.loads(line)):
                send(verdict)
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}"})


class _Child:
    """A worker: where it takes jobs, where it writes verdicts, and since when it has this job."""

    def __init__(self, memory: int) -> None:
        import psutil

        theirs, self.jobs = os.pipe()
        self.verdicts, answers = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _work(theirs, answers, memory)
            finally:
                os._exit(1)
        os.close(theirs)
        os.close(answers)
        self.process, self.gone = psutil.Process(pid), psutil.Error
        os.read(self.verdicts, 1)  # It is confined: from here on its time is a job's.

    def take(self, index: int, job: Job) -> None:
        """Send a job."""
        self.index, self.gold_read = index, False
        self.started, self.started_cpu = time.monotonic(), self.cpu()
        with suppress(BrokenPipeError), open(self.jobs, "wb", closefd=False) as pipe:
            pipe.write(json.dumps(job).encode() + b"\n")

    def cpu(self) -> float:
        """Return the seconds of a processor that it has used."""
        with suppress(self.gone):  # It died: that is seen at its pipe.
            return float(sum(self.process.cpu_times()[:2]))
        return 0.0

    def remaining(self, limit: float) -> float:
        """Return for how many seconds it surely stays within its limits."""
        waited = time.monotonic() - self.started
        if waited < limit:  # One thread uses no more of a processor than elapses.
            return limit - waited
        return min(limit - (self.cpu() - self.started_cpu), _PATIENCE * limit - waited)

    def hear(self, limit: float) -> tuple[Verdict | None, bool]:
        """Return what came of a job, None if nothing yet, and whether it may have another.

        One that died, ran out of time or memory, or wrote out of turn may not.
        """
        overdue = self.remaining(limit) < 0
        heard = b"" if overdue else os.read(self.verdicts, 1)
        if heard == _GOLD_READ and not self.gold_read:
            self.gold_read = True
            return None, True
        if heard in _VERDICTS:
            is_quiet = not select.select([self.verdicts], (), (), 0)[0]
            return _VERDICTS[heard], is_quiet and heard != b"m"
        # Before the gold answer was read, it is the gold answer's doing.
        return ("gold" if not self.gold_read else "timeout" if overdue else "crash"), False

    def end(self) -> None:
        """Kill and reap it, whatever it does."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        os.waitpid(self.process.pid, 0)
        os.close(self.jobs)
        os.close(self.verdicts)


class Crew:
    """The children and who is busy with what; used by one thread."""

    def __init__(self, workers: int, limit: float, memory: int) -> None:
        self._workers, self._limit, self._memory = workers, limit, memory
        self._idle: list[_Child] = []
        self._ready: set[str] = set()

    def prepare(self, kinds: Collection[str]) -> None:
        """Load what these jobs need, `math` or a data set's scorer, before the children are forked.

        No child pays for it in its limit, and none needs to read its files.
        """
        new = {*kinds} - self._ready
        if not new and self._idle:
            return
        for kind in new:
            with suppress(Exception):  # Its jobs fail in a child: the entry is at fault.
                _warm_up() if kind == "math" else scorer_of(kind)
        self._ready |= new
        for child in self._idle:
            child.end()
        gc.freeze()
        self._idle = [_Child(self._memory) for _ in range(self._workers)]

    def score(self, jobs: list[Job]) -> Iterator[tuple[int, Verdict]]:
        """Yield a verdict per job with its index, as they come."""
        self.prepare({_kind(job) for job in jobs})
        busy: dict[int, _Child] = {}
        waiting = list(enumerate(jobs))[::-1]
        while waiting or busy:
            while waiting and self._idle:
                child = self._idle.pop()
                child.take(*waiting.pop())
                busy[child.verdicts] = child
            for child in self._wait(busy):
                verdict, reusable = child.hear(self._limit)
                if verdict is None:
                    continue
                del busy[child.verdicts]
                yield child.index, verdict
                if not reusable:
                    child.end()
                self._idle.append(child if reusable else _Child(self._memory))

    def _wait(self, busy: dict[int, _Child]) -> list[_Child]:
        """Wait until a child writes or may have used up its time."""
        soonest = min(child.remaining(self._limit) for child in busy.values())
        descriptors = [sys.stdin.fileno(), *busy]
        readable, _, _ = select.select(descriptors, (), (), max(0.0, soonest) + 0.01)
        if sys.stdin.fileno() in readable:
            os.killpg(0, signal.SIGKILL)  # The trainer is gone: it never writes during a batch.
        late = [end for end, child in busy.items() if child.remaining(self._limit) < 0]
        return [child for end, child in busy.items() if end in readable or end in late]


def _kind(job: Job) -> str:
    """Return what a job needs: `math`, or the name of a data set."""
    kind, _, reference = job
    return kind if kind == "math" else str(json.loads(reference)["metadata"]["source_dataset"])


def _work(jobs: int, verdicts: int, memory: int) -> None:
    """Score jobs until the pipe closes or this process is ended."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    for low, high in pairwise(sorted((2, jobs, verdicts, _MAX_DESCRIPTOR))):
        os.closerange(low + 1, high)
    confine(memory)
    os.write(verdicts, b"!")
    for line in os.fdopen(jobs, "rb"):
        kind, answer, reference = json.loads(line)
        verify = _verify_math if kind == "math" else _verify_entry
        written = b"?"
        try:
            for written in verify(answer, reference):
                os.write(verdicts, written)
        except MemoryError:
            os.write(verdicts, b"m")
        except Exception:
            # An answer that a parser or scorer chokes on is not the gold answer.
            os.write(verdicts, b"?" if written == b"?" else b"0")


def _warm_up() -> list[bytes]:
    return [said for text in _WARM_UP for said in _verify_math(text, text + "+0")]


def _verify_math(answer: str, gold: str) -> Iterator[bytes]:
    """Compare with math-verify, both boxed, its own timeouts off (they would need the alarm)."""
    from math_verify import verify

    if not (golds := _parse(gold)):
        yield b"?"
        return
    yield _GOLD_READ
    answers = _parse(answer)
    same = verify(list(golds), list(answers), timeout_seconds=None)
    yield b"1" if same and not _far(answers[0], golds[0]) else b"0"


def _far(answer: Any, gold: Any) -> bool:
    """Return whether two numbers differ by a millionth; math-verify takes all tiny ones for 0."""
    if not all(getattr(value, "is_number", False) for value in (answer, gold)):
        return False
    with suppress(TypeError, ValueError, OverflowError):  # infinite, or a symbol that is a number
        mine, theirs = complex(answer.evalf(15)), complex(gold.evalf(15))
        return abs(mine - theirs) > 1e-6 * abs(theirs)
    return False


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[Any, ...]:
    """Parse one boxed expression; empty when it cannot be read."""
    from math_verify import LatexExtractionConfig, parse

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    return tuple(parse(f"\\boxed{{{text}}}", extraction_config=config, parsing_timeout=None))


def _verify_entry(answer: str, entry: str) -> Iterator[bytes]:
    """Ask the data set's scorer; only the full score is correct, part of it is not."""
    question = json.loads(entry)
    scorer = scorer_of(question["metadata"]["source_dataset"])
    yield _GOLD_READ
    yield b"1" if scorer(answer, question) >= 1.0 else b"0"
