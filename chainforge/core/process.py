"""Run a recipe as a process that ends in good order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from chainforge.core.disk import writing
from chainforge.core.errors import Failed, InputError, Stopped
from chainforge.core.launch import check_started
from chainforge.core.loading import loading_fault
from chainforge.core.redaction import redact_output
from chainforge.core.sharing import read_secret


def run(main: Callable[[], None]) -> None:
    """Run a recipe: wrong input is one message and exit code 2, any other failure exit code 1.

    A run that stopped early in good order says so and exits with its own code. A failure whose
    reason is known, a full disk for one, is one message too; any other shows its traceback. A
    model that a library could not load is wrong input.
    """
    redact_output()
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


@contextlib.contextmanager
def heed_signals(heed: Callable[[int], None]) -> Iterator[None]:
    """Give SIGINT and SIGTERM to a function, while an event loop runs in the main thread."""
    loop = asyncio.get_running_loop()
    heeded = []
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread
            loop.add_signal_handler(number, heed, int(number))
            heeded.append(number)
    try:
        yield
    finally:
        for number in heeded:
            loop.remove_signal_handler(number)
