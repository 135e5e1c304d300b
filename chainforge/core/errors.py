"""The one error that is meant for users."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong input: the message says what was wrong, where (file, key, row) and what to do.

    Command lines print it without a traceback and exit with code 2.
    """
