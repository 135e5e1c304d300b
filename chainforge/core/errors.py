"""The errors that are meant for users."""

from __future__ import annotations

# A stage that a limit of its own ended: not done, not failed, and the same command goes on.
PAUSED = 3


class InputError(ValueError):
    """Wrong input: the message says what was wrong, where (file, key, row) and what to do.

    Command lines print it without a traceback and exit with code 2.
    """


class Failed(RuntimeError):
    """The work failed for a reason that is known: the message says what was seen, what to do.

    Command lines print it without a traceback and exit with code 1.
    """


class Stopped(Exception):
    """The work ended early and in good order: what was made is kept, and it can go on.

    Command lines print it without a traceback and exit with `code`: `PAUSED` for a limit, 128 and
    the signal's number where a signal asked for it.
    """

    def __init__(self, message: str, code: int = PAUSED) -> None:
        super().__init__(message)
        self.code = code


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says, or its kind where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
