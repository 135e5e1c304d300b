"""Define the errors that users read, and the hints in them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

# A stage that its own limit ended: not done, not failed, and the same command resumes it.
PAUSED = 3


class InputError(ValueError):
    """Wrong input: one message without a traceback (file, key or row, and the fix); exit code 2."""


class Failed(RuntimeError):
    """Work that failed for a known reason: one message without a traceback; exit code 1."""


class Stopped(Exception):
    """Work that ended early in good order, and can resume: one message, and exit with `code`.

    That is `PAUSED` for a limit, and 128 and the signal's number where a signal asked for it.
    """

    def __init__(self, message: str, code: int = PAUSED) -> None:
        super().__init__(message)
        self.code = code


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its kind where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


_PLAIN = {"Object missing required field (.*)": r"the key '\1' is missing", "object": "a mapping",
          "array": "a list", "str": "text", "int": "a whole number", "float": "a number",
          "bool": "true or false", "Expected": "expected", "got": "found"}  # fmt: skip


def plain(error: Exception) -> tuple[str, str]:
    """Return the place in a configuration and the fault of a `msgspec.ValidationError`."""
    text, _, place = str(error).replace(" | null", "").replace("`", "").partition(" - at $")
    for pattern, word in _PLAIN.items():
        text = re.sub(rf"\b{pattern}\b", word, text)
    return place, text


def refuse_unknown(given: Iterable[Any], known: Iterable[str], where: str = "") -> None:
    """Raise `InputError` for all keys of a mapping that are not known, each with a hint."""
    known = list(known)
    if odd := [key for key in given if key not in known]:
        lines = [f"{where}unknown key {key!r}; {hint(str(key), known)}" for key in odd]
        raise InputError("\n  ".join(lines))


def hint(word: str, words: Iterable[str]) -> str:
    """Return the end of an error message: the nearest word, or all that there are."""
    words = sorted(words)
    near = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(words)}"
