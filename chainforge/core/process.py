"""Run a recipe as a process that ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from chainforge.core.disk import writing
from chainforge.core.errors import Failed, InputError, Stopped
from chainforge.core.launch import LAUNCHED, check_started
from chainforge.core.loading import loading_fault
from chainforge.core.redaction import redact_output
from chainforge.core.sharing import read_secret

CHAIN = "CHAINFORGE_CHAIN"  # set for the stages that `chainforge run` starts
_launcher: int | None = None  # the process that launched this one


def run(main: Callable[[], None]) -> None:
    """Run a recipe: wrong input is one message and exit code 2, any other failure exit code 1.

    A run that stopped early in good order says so and exits with its own code. A failure whose
    reason is known, a full disk for one, is one message too; any other shows its traceback. A
    model that a library could not load is wrong input.
    """
    redact_output()
    _watch_launcher()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        check_started()
        read_secret("HF_TOKEN")  # whatever asks the Hub sends it
        with writing(Path.cwd()):
            main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Stopped as error:
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("stopped: by SIGINT", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except Exception as error:
        if fault := loading_fault(error):
            print(f"error: {fault}", file=sys.stderr, flush=True)
            sys.exit(2)
        traceback.print_exc()
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask for an orderly stop; SIGHUP unless `nohup` ignores it."""
    found = [signal.SIGINT, signal.SIGTERM]
    hangup: signal.Signals | None = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        found.append(hangup)
    return found


def leave_terminal() -> None:
    """Write to nowhere from now on if the terminal is gone: what is printed would be an error."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            device = stat.S_ISCHR(os.fstat(descriptor).st_mode)
            if device and not os.isatty(descriptor):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def orphaned() -> bool:
    """Whether what launched this process has ended: what it makes then must not be signed."""
    return _launcher is not None and os.getppid() != _launcher


def _watch_launcher() -> None:
    """Have this process stop as on SIGTERM when `chainforge run`, accelerate or torchrun ends.

    Killed alone, a launcher leaves its processes at work, where nobody looks for them.
    """
    global _launcher
    if not any(key in os.environ for key in (CHAIN, LAUNCHED, "TORCHELASTIC_RUN_ID")):
        return  # started from a shell, which may well be closed
    _launcher = os.getppid()

    def watch() -> None:
        while not orphaned():
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def heed_signals(heed: Callable[[int], None]) -> Iterator[None]:
    """Give the stop signals to a function, while an event loop runs in the main thread."""
    loop = asyncio.get_running_loop()

    def note(number: int) -> None:
        leave_terminal()
        heed(number)

    heeded = []
    for number in stop_signals():
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # Windows, threads
            loop.add_signal_handler(number, note, int(number))
            heeded.append(number)
    try:
        yield
    finally:
        for number in heeded:
            loop.remove_signal_handler(number)
