"""Run one stage's command as a process of its own, and leave nothing running behind.

The stage and whatever it starts form one process group: Ctrl-C reaches all of it, and a watchdog
ends all of it when the chain's own process is killed.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from chainforge.chain.plan import executable
from chainforge.core.errors import PAUSED, Failed, Stopped
from chainforge.core.process import CHAIN_VARIABLE, noting_stops
from chainforge.core.secrets import redact

POLL_SECONDS = 0.1
# How long what is left of a group may take to end, after its leader ended by itself, and when it
# has to save its work because its launcher was killed or a signal asked it to stop.
GRACE_SECONDS, SAVE_SECONDS = 20, 600
STOPPED = (130, 143, 129)  # by SIGINT, SIGTERM and SIGHUP
# accelerate and torchrun end with 1 whatever the recipe ended with, but their last words say it.
_WORDS = re.compile(r"returned non-zero exit status (\d+)\.|exitcode\s*: (\d+)\b")
_TOLD = (2, 1, PAUSED, *STOPPED)  # of several processes the one that failed, not those it ended
# How often a thread of OpenMP looks at a barrier before it sleeps (libgomp, of torch's wheels for
# Linux). By default it spins for milliseconds, on a core that the last thread may be waiting for.
BOUNDED_SPIN = {"GOMP_SPINCOUNT": "20000"}
_SPIN_SETTINGS = {*BOUNDED_SPIN, "OMP_WAIT_POLICY"}
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
# Reads from a pipe whose other end only the chain holds, so that even SIGKILL wakes it.
_WATCHDOG = """
read -r _
kill -s TERM -- "-$1"
while [ "$2" -gt 0 ] && kill -s 0 -- "-$1" 2> /dev/null; do sleep 1; set -- "$1" $(($2 - 1)); done
kill -s KILL -- "-$1"
"""


class StageFailed(Failed):
    """A stage that did not end well."""


def execute(
    command: list[str], log: Path, watch: Callable[[], None], *, on_cpu: bool = False
) -> int:
    """Run a command, as `plan` prints it, to its end; return the recipe's exit code.

    Output goes to the end of `log`. `watch` is called some times a second. A stage `on_cpu`, or on
    a machine without a GPU, gets `BOUNDED_SPIN`, unless the user has set how threads wait. Raises
    `Stopped` once the stage has ended because of SIGINT, SIGTERM or SIGHUP.
    """
    environment = os.environ | {CHAIN_VARIABLE: "1"}  # a stage then draws no bars of its own
    on_cpu = on_cpu or not any(map(os.path.exists, _GPU_DRIVERS))
    if on_cpu and not _SPIN_SETTINGS & environment.keys():
        environment |= BOUNDED_SPIN
    asked: list[int] = []
    with open(log, "ab") as output, noting_stops(asked.append):
        output.write(f"$ {redact(shlex.join(command))}\n".encode())
        output.flush()
        start = output.tell()
        process = subprocess.Popen(
            executable(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        words = ["sh", "-c", _WATCHDOG, "watchdog", str(process.pid), str(SAVE_SECONDS)]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        watchdog = subprocess.Popen(
            words, stdin=pipe, stdout=null, stderr=null, start_new_session=True
        )
        try:
            _wait(process, asked, watch)
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
            watchdog.kill()
            watchdog.communicate()
    redact_file(log, start)  # of what a launcher or a library wrote itself
    if asked:
        name = signal.Signals(asked[0]).name
        raise Stopped(f"by {name}; run the same command again to resume", 128 + asked[0])
    if process.returncode != 1:
        return process.returncode
    text = log.read_bytes()[start:].decode("utf-8", "replace")
    told = {int(number) for match in _WORDS.findall(text) for number in match if number}
    return next((number for number in _TOLD if number in told), 1)


def _wait(process: subprocess.Popen[bytes], asked: list[int], watch: Callable[[], None]) -> None:
    """Wait for the whole group; pass on the first signal as it is, and kill on the second.

    A launcher dies of the signal at once, while the recipe that it launched is still at work. When
    the launcher alone was killed, the recipe is asked to stop, and has `SAVE_SECONDS` for that.
    """
    passed_on, deadline = 0, math.inf
    while (code := process.poll()) is None or _works(process.pid):
        if len(asked) > passed_on:
            _signal_group(process.pid, asked[0] if passed_on == 0 else signal.SIGKILL)
            passed_on = len(asked)
        if code is not None and deadline == math.inf:
            killed = code < 0 and not asked
            deadline = time.monotonic() + (SAVE_SECONDS if killed or asked else GRACE_SECONDS)
            if killed:
                _signal_group(process.pid, signal.SIGTERM)
        if time.monotonic() > deadline:
            return
        watch()
        time.sleep(POLL_SECONDS)
    watch()


def _works(group: int) -> bool:
    """Return whether a process of the group is alive, other than as a zombie."""
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _signal_group(group: int, number: int) -> None:
    """Send a signal to a process group, if there still is one."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def redact_file(path: Path, start: int = 0) -> None:
    """Redact what a file holds from `start` on; it is rewritten only if it holds a secret."""
    with open(path, "rb+") as file:
        file.seek(start)
        text = file.read().decode("utf-8", "surrogateescape")
        clean = redact(text)
        if clean != text:
            file.seek(start)
            file.write(clean.encode("utf-8", "surrogateescape"))
            file.truncate()
