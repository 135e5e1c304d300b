"""The judge's own program: compare answers in forked children that the kernel kills in time.

`chainforge.rewards.judges` starts it as `python -c "...worker.main(...)"`; a trainer never
imports it. It imports the parsers once and forks a child per worker from there, single-threaded,
so a fork is safe and a killed child is replaced in milliseconds. Being a program of its own, it
imports neither torch nor the user's `__main__`, which multiprocessing's spawn and forkserver would
both run again in every child.

A child arms timers whose signals it does not handle: the kernel ends it even inside one long
multiplication of C code, where neither a thread nor a Python signal handler gets a turn. The limit
counts the processor's time, so that a busy or suspended machine changes no verdict; a second one,
by the clock, ends a child that waits for something.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import lru_cache
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import IO, Any

from chainforge.rewards.judges import Job
from chainforge.rewards.scorers import scorer_of

# Enough of LaTeX's grammar to fill the parser's caches before the first fork.
_WARM_UP = (r"\frac{1}{2}", r"2\sqrt{3}", "x^2+3x-1", "(1,2)", "y=2x+3", r"\{1,2\}", "[1,2)",
            r"(-\infty,1)\cup(2,\infty)", "3+4i", r"48^\circ", r"12.5\%")  # fmt: skip


def main(workers: int, limit: float, patience: float, memory: int, kinds: Collection[str]) -> None:
    """Serve batches until standard input ends: a line of jobs in, a line of verdicts out.

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
            _say(out, {"verdicts": crew.judge(json.loads(line))})
    except BrokenPipeError:
        pass
    except Exception as error:
        _say(out, {"error": f"{type(error).__name__}: {error}"})


def _say(out: IO[str], message: Any) -> None:
    """Write one message."""
    out.write(json.dumps(message) + "\n")
    out.flush()


class Crew:
    """The children and who is busy with what; used by one thread."""

    def __init__(self, workers: int, limit: float, patience: float, memory: int) -> None:
        self._limits = (limit, patience, memory)
        self._fork = get_context("fork")
        self._children: dict[Connection, Any] = {}
        self._workers = workers
        self._ready: set[str] = set()

    def prepare(self, kinds: Collection[str]) -> None:
        """Import here what these kinds of jobs need, so that no child pays for it in its limit."""
        kinds = set(kinds) - self._ready
        if not kinds:
            return
        if "math" in kinds:
            for text in _WARM_UP:
                _judge_math(text, text + "+0", tell=bool)
        if "reasoning_gym" in kinds:
            import reasoning_gym  # noqa: F401
        self._ready.update(kinds)
        for connection, child in list(self._children.items()):
            child.kill()
            self._dismiss(connection)
        for _ in range(self._workers):
            self._hire()

    def _hire(self) -> Connection:
        ours, theirs = self._fork.Pipe()
        # A child must not hold the other ends, else it would not see this process die.
        args = (theirs, [*self._children, ours], *self._limits)
        child = self._fork.Process(target=_work, args=args, daemon=True)
        child.start()
        theirs.close()
        self._children[ours] = child
        return ours

    def _dismiss(self, connection: Connection) -> int | None:
        """Reap a child; return its exit code."""
        child = self._children.pop(connection)
        connection.close()
        child.join()
        return child.exitcode  # type: ignore[no-any-return]

    def judge(self, jobs: list[Job]) -> list[bool | str]:
        """Return a verdict per job, in order: true, false, or why there is none.

        `gold`: the gold answer cannot be read; `timeout`, `memory`, `crash`: the answer's doing.
        """
        self.prepare({kind for kind, _, _ in jobs})
        verdicts: list[bool | str] = ["crash"] * len(jobs)
        idle = list(self._children)
        busy: dict[Connection, tuple[int, list[str]]] = {}
        waiting = list(reversed(list(enumerate(jobs))))
        while waiting or busy:
            while waiting and idle:
                connection = idle.pop()
                index, job = waiting.pop()
                busy[connection] = (index, [])
                connection.send(job)
            for ready in wait([*busy, sys.stdin.fileno()]):
                if not isinstance(ready, Connection):
                    os._exit(0)  # The trainer is gone: it never writes while a batch is out.
                index, stages = busy[ready]
                try:
                    message = ready.recv()
                except (EOFError, OSError):
                    del busy[ready]
                    verdicts[index] = _cause(self._dismiss(ready), stages)
                    idle.append(self._hire())
                    continue
                if isinstance(message, tuple):
                    stages.append(message[0])
                    continue
                verdicts[index] = message
                del busy[ready]
                idle.append(ready)
        return verdicts


_EXPIRED = (signal.SIGPROF, signal.SIGALRM)


def _cause(code: int | None, stages: list[str]) -> str:
    """Name why a child died; before the gold was read, it is the gold's doing."""
    if "gold" not in stages:
        return "gold"
    return "timeout" if code is not None and -code in _EXPIRED else "crash"


def _work(
    connection: Connection, others: list[Connection], limit: float, patience: float, memory: int
) -> None:
    """Judge jobs until the pipe closes or the kernel ends this process."""
    for other in others:
        other.close()
    _confine(memory)
    timers = ((signal.ITIMER_PROF, limit), (signal.ITIMER_REAL, patience))
    for expired in _EXPIRED:
        signal.signal(expired, signal.SIG_DFL)
    gc.freeze()
    while True:
        try:
            kind, answer, reference = connection.recv()
        except EOFError:
            os._exit(0)
        for timer, most in timers:
            signal.setitimer(timer, most)
        try:
            verdict: bool | str = _JUDGES[kind](answer, reference, connection.send)
        except MemoryError:
            verdict = "memory"
        except Exception:
            # An answer that a parser or scorer chokes on is not the gold answer.
            verdict = False
        for timer, _ in timers:
            signal.setitimer(timer, 0)
        connection.send(verdict)


def _confine(memory: int) -> None:
    """Limit memory, and forbid what judging never needs.

    Some scorers of reasoning-gym hand the model's text to sympy's `parse_expr`, which evaluates
    it. The audit hook is no sandbox, but it stops files, programs and sockets.
    """
    import resource

    for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # macOS knows no RLIMIT_AS
            resource.setrlimit(what, (most, most))
    sys.dont_write_bytecode = True
    sys.addaudithook(_forbid)


_FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "signal.", "urllib.")
_ALLOWED = {"os.listdir", "os.scandir", "os.walk"}


def _forbid(event: str, args: tuple[Any, ...]) -> None:
    """Raise for an audit event outside the business of comparing two answers."""
    if event == "open":
        _, mode, flags = args
        if set("wax+") & set(mode or "") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError("a judged answer may not write files")
    elif event.startswith(_FORBIDDEN) and event not in _ALLOWED:
        raise PermissionError(f"a judged answer may not cause {event}")


def _judge_math(answer: str, gold: str, tell: Callable[[Any], object]) -> bool | str:
    """Compare with math-verify, both boxed, its own timeouts off (they would need the alarm)."""
    from math_verify import verify

    golds = _parse(gold)
    if not golds:
        return "gold"
    tell(("gold",))
    answers = _parse(answer)
    if not verify(list(golds), list(answers), timeout_seconds=None):
        return False
    return not _far(answers[0], golds[0])


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


def _judge_scored(answer: str, entry: str, tell: Callable[[Any], object]) -> bool | str:
    """Ask the data set's own scorer; only the full score is correct, part of it is not."""
    question = json.loads(entry)
    scorer = scorer_of(question["metadata"]["source_dataset"])
    tell(("gold",))
    return bool(scorer(answer, question) >= 1.0)


_JUDGES: dict[str, Callable[..., bool | str]] = {
    "math": _judge_math,
    "reasoning_gym": _judge_scored,
}
