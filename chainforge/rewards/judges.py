"""Ask the judging program for verdicts: started when first needed, restarted when it died.

The trainer's side of `chainforge.rewards.worker`. It works from any thread, touches no signal
handler or timer of this process, and ends with it.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Job = tuple[str, str, str]
"""Kind (`math` or `reasoning_gym`), the answer, and the gold answer or the entry's JSON."""

_ROOT = Path(__file__).resolve().parents[2]
_KEPT = {"PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "PYTHONPATH", "PYTHONHOME",
         "PYTHONUSERBASE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"}  # fmt: skip
_PATIENCE = 15  # By the clock: a busy machine takes longer for a second of a processor.
_START_LIMIT = 120.0  # Importing sympy takes half a second, or a minute on a cold network disk.


def default_workers() -> int:
    """Return this process's share of the machine's cores, 1 to 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(4, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _environment() -> dict[str, str]:
    """Return what Python needs to start, and no token."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT}
    return kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Judges:
    """A judging program of `workers` children.

    A verdict may take `limit` seconds of a processor, and `memory` bytes.
    """

    def __init__(
        self, workers: int | None = None, limit: float = 2.0, memory: int = 2 * 1024**3
    ) -> None:
        self.workers = workers or default_workers()
        self.limit = limit
        self.memory = memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._buffer = b""
        atexit.register(self.close)
        # A fork (a data loader's worker) inherits the pipes but must start a program of its own.
        os.register_at_fork(after_in_child=self._forget)

    def judge(self, jobs: Sequence[Job]) -> list[bool | str]:
        """Return a verdict per job, in order; see `worker.Crew.judge`.

        Where the program itself dies, the jobs that are left are judged one by one, and one over
        which it dies alone is `lost`. Raises `RuntimeError` when it cannot start.
        """
        if not jobs:
            return []
        verdicts: list[bool | str | None] = [None] * len(jobs)
        with self._lock:
            try:
                self._ask(jobs, range(len(jobs)), verdicts)
                for index in range(len(jobs)):
                    if verdicts[index] is None:
                        self._ask(jobs, [index], verdicts)
            except BaseException:
                # Ctrl-C or an alarm in mid-batch: its verdicts must not answer the next batch.
                self._stop()
                raise
        return ["lost" if verdict is None else verdict for verdict in verdicts]

    def begin(self, kinds: Sequence[str]) -> None:
        """Start the program, unless it runs, and do not wait: it imports while others work."""
        with self._lock:
            if kinds and not self._running():
                self._open(kinds)

    def close(self) -> None:
        """End the program and its children; a later `judge` starts it anew."""
        with self._lock:
            self._stop()

    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self, kinds: Sequence[str]) -> None:
        """Wait until the program is ready."""
        if not self._running():
            self._open(kinds)
        if self._is_ready:
            return
        started = self._read(_START_LIMIT)
        if started is None or "ready" not in started:
            self._stop()
            why = (started or {}).get("error", f"no answer from {sys.executable}")
            raise RuntimeError(f"the answer judges (math-verify) do not start: {why}")
        self._is_ready = True

    def _open(self, kinds: Sequence[str]) -> None:
        given = (self.workers, self.limit, _PATIENCE * self.limit, self.memory, tuple(kinds))
        code = (
            f"import sys; sys.path.insert(0, {str(_ROOT)!r}); "
            f"from chainforge.rewards.worker import main; main{given}"
        )
        self._buffer, self._is_ready = b"", False
        # -P: a file named sympy.py in the working directory is not sympy. A session of its own:
        # Ctrl-C reaches the trainer only, which then closes the pipe.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,
        )

    def _ask(
        self, jobs: Sequence[Job], indices: Sequence[int], verdicts: list[bool | str | None]
    ) -> None:
        """Have these jobs judged and fill in what comes; end a program that says nothing more."""
        some = [jobs[index] for index in indices]
        self._start(tuple({job[0]: None for job in some}))
        assert self._process is not None
        assert self._process.stdin is not None
        message: dict[str, Any] | None = None
        try:
            self._process.stdin.write(json.dumps(some).encode() + b"\n")
            self._process.stdin.flush()
            for _ in some:
                # It ends a job in time; making ready for a kind of jobs takes as long as to start.
                message = self._read(_PATIENCE * self.limit + _START_LIMIT)
                verdicts[indices[message["index"]]] = message["verdict"]  # type: ignore[index]
        except (OSError, TypeError, KeyError):
            logger.warning("the answer judges died (%s); starting them again", message)
            self._stop()

    def _read(self, limit: float) -> dict[str, Any] | None:
        """Read one message; None at the end of the pipe or of the time."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        deadline = time.monotonic() + limit
        while b"\n" not in self._buffer:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not poller.poll(1000 * remaining):
                return None
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        try:
            os.killpg(process.pid, 9)
        except (ProcessLookupError, PermissionError):
            process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.wait()

    def _forget(self) -> None:
        """After a fork, in the child: leave the parent's program alone."""
        self._lock = threading.Lock()
        self._process = None
        self._buffer = b""
