"""Start and end a recipe's process in good order."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable

from chainforge.core.errors import InputError


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent dies (Linux; elsewhere nothing).

    A stage whose chain was killed would otherwise go on alone and hold its directory.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def run(main: Callable[[], None]) -> None:
    """Run a recipe: wrong input is one message and exit code 2, any other failure exit code 1."""
    if os.environ.get("CHAINFORGE_CHAIN"):
        die_with_parent()
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Exception as error:
        traceback.print_exc()
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
