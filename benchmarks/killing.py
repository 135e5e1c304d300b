"""Run scripts in forks of one process that has the imports, and kill them at a chosen point."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def forked(
    command: list[str],
    log: Path,
    counter: Path,
    arm: Callable[[int, int | None], None],
    last: int | None = None,
    until: int | None = None,
) -> int:
    """Run a script in a fork of this process, which has the imports; return its exit code.

    It is killed where `arm` says so, by `last`, or once `counter` has `until` bytes.
    """
    warm()
    child = os.fork()
    if child == 0:
        become(command, log, counter, arm, last)
    gone, status = os.waitpid(child, os.WNOHANG if until else 0)
    while not gone:
        if counter.exists() and counter.stat().st_size >= (until or 0):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
        gone, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status)


def warm() -> None:
    """Import what every run needs, and run nothing of it."""
    import peft  # noqa: F401
    import torch
    import trl

    for name in ("SFTTrainer", "GRPOTrainer", "DistillationTrainer"):
        getattr(trl, name)
    torch.set_num_threads(1)


def become(
    command: list[str],
    log: Path,
    counter: Path,
    arm: Callable[[int, int | None], None],
    last: int | None,
) -> None:
    """Become the script from now on."""
    code: Any = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        arm(os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND), last)
        sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
