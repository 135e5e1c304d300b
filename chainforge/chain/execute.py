"""Run one stage's command as a process of its own, and leave nothing running behind.

The stage and whatever it starts form one process group: Ctrl-C reaches all of it, and a watchdog
ends all of it when the chain's own process is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from chainforge.chain.plan import executable
from chainforge.core.errors import PAUSED
from chainforge.core.process import CHAIN, leave_terminal, stop_signals
from chainforge.core.secrets import redact, redact_file

POLL_SECONDS = 0.2
# How long what is left of a group may take to end after its leader has.
GRACE_SECONDS = 20
# How long processes may take to save and end whose launcher was killed.
ORPHAN_SECONDS = 600
STOPPED = (130, 143, 129)  # by SIGINT, SIGTERM and SIGHUP
# accelerate and torchrun end with 1 whatever the recipe ended with, but their last words say it.
_WORDS = re.compile(r"returned non-zero exit status (\d+)\.|exitcode\s*: (\d+)\b")
_TOLD = (2, 1, PAUSED, *STOPPED)  # of several processes the one that failed, not those it ended


_WATCHDOG = """
read -r _
kill -s TERM -- "-$1"
while [ "$2" -gt 0 ] && kill -s 0 -- "-$1" 2> /dev/null; do sleep 1; set -- "$1" $(($2 - 1)); done
kill -s KILL -- "-$1"
"""


class StageFailed(RuntimeError):
    """A stage that did not end well; the message is for the person who ran it."""


class Interrupted(Exception):
    """Somebody asked the chain to stop; `signal` says how."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


def execute(command: list[str], log: Path, watch: Callable[[], None]) -> int:
    """Run a printed command to its end; return the recipe's exit code.

    Output goes to the end of `log`. `watch` is called a few times a second. Raises `Interrupted`
    once the stage has ended because of SIGINT, SIGTERM or SIGHUP.
    """
    asked: list[int] = []
    with open(log, "ab") as output, _signals(asked):
        output.write(f"$ {redact(shlex.join(command))}\n".encode())
        output.flush()
        start = output.tell()
        process = subprocess.Popen(
            executable(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {CHAIN: "1"},  # a stage then draws no bars of its own
        )
        watchdog = _watchdog(process.pid)
        try:
            _wait(process, asked, watch)
            _let_end(process, asked, watch)
        finally:
            _end_group(process)
            watchdog.kill()
            watchdog.communicate()
    redact_file(log, start)  # of what a launcher or a library wrote itself
    if asked:
        raise Interrupted(asked[0])
    with open(log, "rb") as written:
        written.seek(start)
        text = written.read().decode("utf-8", "replace")
    return _code(process.returncode, text)


def _wait(process: subprocess.Popen[bytes], asked: list[int], watch: Callable[[], None]) -> None:
    """Wait for the process; pass on the first signal as it is, and kill on the second."""
    passed_on = 0
    while process.poll() is None:
        if len(asked) > passed_on:
            _signal_group(process.pid, asked[0] if passed_on == 0 else signal.SIGKILL)
            passed_on = len(asked)
        watch()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
    watch()


def _let_end(process: subprocess.Popen[bytes], asked: list[int], watch: Callable[[], None]) -> None:
    """Let the stage save what it has after a signal, until a second one.

    A launcher dies of the signal at once, while the recipe that it launched is still at work. When
    somebody killed the launcher alone, the recipe is asked to stop, and has a while to do so.
    """
    heard = len(asked)
    killed = process.returncode < 0 and not heard
    if killed:
        _signal_group(process.pid, signal.SIGTERM)
    end = time.monotonic() + (ORPHAN_SECONDS if killed else float("inf"))
    while (heard or killed) and len(asked) == heard and _works(process.pid):
        if time.monotonic() > end:
            break
        watch()
        time.sleep(POLL_SECONDS)
    if len(asked) > heard:
        _signal_group(process.pid, signal.SIGKILL)


def _works(group: int) -> bool:
    """Return whether a process of the group is alive, other than as a zombie."""
    if not _signal_group(group, 0) or not Path("/proc/self/stat").exists():
        return _signal_group(group, 0)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, number = path.read_text().rpartition(")")[2].split()[:3]
            if number == str(group) and state not in "ZX":
                return True
    return False


def _code(code: int, text: str) -> int:
    """Return the exit code of the recipe, where its launcher hides it."""
    if code != 1:
        return code
    told = {int(number) for match in _WORDS.findall(text) for number in match if number}
    return next((number for number in _TOLD if number in told), code)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Wait until nothing of the group is left; after a while, or after an error, kill it."""
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + GRACE_SECONDS
    while _signal_group(process.pid, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal_group(process.pid, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; False when there is no such group any more."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _watchdog(group: int) -> subprocess.Popen[bytes]:
    """Start a shell that stops the group as soon as this process is gone, and kills it in the end.

    It reads from a pipe whose other end only this process holds, so that even SIGKILL wakes it.
    """
    return subprocess.Popen(
        ["sh", "-c", _WATCHDOG, "watchdog", str(group), str(ORPHAN_SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@contextlib.contextmanager
def _signals(asked: list[int]) -> Iterator[None]:
    """Note SIGINT, SIGTERM and SIGHUP in `asked` instead of ending this process."""

    def note(number: int, frame: FrameType | None) -> None:
        leave_terminal()
        asked.append(number)

    before = {number: signal.signal(number, note) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
