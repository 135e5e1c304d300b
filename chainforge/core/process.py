"""Run a recipe as a process that ends in good order."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable

from chainforge.core.errors import InputError


def run(main: Callable[[], None]) -> None:
    """Run a recipe: wrong input is one message and exit code 2, any other failure exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Exception as error:
        traceback.print_exc()
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
