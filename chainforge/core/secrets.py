"""Recognise secrets, refuse them in settings, and leave them out of what is written.

Secrets come from the environment alone, in variables with names such as TOKEN, KEY or PASSWORD, and
from a login to the Hub.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote, quote_plus

from chainforge.core.errors import InputError

SHORTEST = 8  # a shorter value, such as the EMPTY of a local server, is part of other words
LOGIN = "the Hub login"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of OPENAI_API_KEY_2, or of apiKey
_SECRET = re.compile(
    r"KEYS?|PASS|PWD|CREDS?|AUTH|PAT|PIN"
    r"|\w*(TOKENS?|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?|APIKEYS?|ACCESSKEYS?)"
)
# The last word of a variable that holds where a secret is, or how long; and a shell's folders.
_ABOUT = re.compile(
    r"DIR|FILE|HOST|LENGTH|METHOD|MODE|NAME|PATH|PORT|SIZE|SOCK|STORE|TTL|TYPE|URI|URL"
)
_FOLDERS = ("PWD", "OLDPWD")
_COMMON = ("password", "required", "disabled", "optional", "changeme", "localhost")

# Of settings; a model's special tokens have such names, too, and so have counts of tokens.
_KEY = re.compile(
    r"(?:^|[_.-])(?:api[_-]?keys?|(?:access|private|secret)[_-]?keys?(?:[_-]id)?|secrets?|token"
    r"|pass(?:word|wd|phrase)?|pwd|credentials?|(?:proxy[_-]?)?authorization|auth|bearer|cookie)$",
    re.IGNORECASE,
)
_SPECIAL = re.compile(
    r"(?:bos|eos|pad|unk|sep|cls|mask|image|video|audio|begin|end|start|stop|think|fim)\w*_token",
    re.IGNORECASE,
)
_MARK = re.compile(r"<.*>|\[.*\]")
_LOOKS = re.compile(
    r"\b(?:sk-[\w-]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|://[^/@\s:\[]*:(?!\d+/)[^@\s]+@)"  # the password in an address
)


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Return whether an environment variable is a secret: OPENAI_API_KEY_2, MYSQL_PWD."""
    words = [word.upper() for word in _WORDS.findall(name)]
    if name.upper() in _FOLDERS or not words or _ABOUT.fullmatch(words[-1]):
        return False
    return any(map(_SECRET.fullmatch, words))


def is_secret_key(key: Any) -> bool:
    """Return whether a setting of this name is a secret."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(key))
    return bool(_KEY.search(name) and not _SPECIAL.fullmatch(name))


def check_settings(value: Any, where: str, known: Mapping[str, str] | None = None) -> None:
    """Raise `InputError` for a setting that is, or holds, a secret; its value is never repeated."""
    known = secrets() if known is None else known
    if isinstance(value, Mapping):
        for key, item in value.items():
            text = isinstance(item, str) and item.strip() and not _MARK.fullmatch(item)
            if is_secret_key(key) and text:
                _refuse(f"{where}: {key}")
            check_settings(item, f"{where}: {key}", known)
    elif isinstance(value, list | tuple):
        for item in value:
            check_settings(item, where, known)
    elif isinstance(value, str):
        name = next((name for name, one in known.items() if one in value), None)
        if name or _LOOKS.search(value):
            _refuse(where, f" (it holds the value of {name})" if name else "")


def _refuse(where: str, why: str = "") -> None:
    raise InputError(
        f"{redact(where)}: a secret must not be in a file or on a command line, where others can "
        f"read it{why}; remove it, and set HF_TOKEN, OPENAI_API_KEY or the like in the environment"
    )


def secrets() -> dict[str, str]:
    """Return the values that must not be written down, by the names of their variables."""
    found = {
        name: value.strip()
        for name, value in os.environ.items()
        if is_secret_name(name) and _is_secret_value(value.strip())
    }
    if (login := _login()) and login not in found.values():
        found[LOGIN] = login
    return found


def _is_secret_value(value: str) -> bool:
    if len(value) < SHORTEST or value.lower() in _COMMON:
        return False
    plain_address = re.match(r"\w+://[^@]*$", value)
    return not (plain_address or (os.sep in value and os.path.exists(value)))


@lru_cache(maxsize=1)
def _login() -> str | None:
    """Return the token of a Hub login, from where `hf auth login` writes it."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    try:
        value = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return value if len(value) >= SHORTEST else None


def read_secret(variable: str) -> str:
    """Return a key from the environment, without blanks around it; empty where it is not set.

    Raises `InputError` for what cannot be sent as a key, such as two lines or a quoted value. The
    message names the variable and never repeats the value.
    """
    value = os.environ.get(variable, "").strip()
    faults = {
        "a line break": len(value.splitlines()) > 1,
        "a quotation mark": any(mark in value for mark in "\"'`\u2018\u2019\u201c\u201d"),
        "a blank": any(map(str.isspace, value)),
        "a character that is not printable ASCII": not (value.isascii() and value.isprintable()),
    }
    if found := next((fault for fault, there in faults.items() if there), None):
        raise InputError(
            f"{variable}: the value contains {found}, which no key does; set it to the key alone, "
            "on one line and without quotation marks"
        )
    return value


@lru_cache(maxsize=256)
def forms(value: str) -> tuple[str, ...]:
    """Return how a value may be written: plain, escaped (also twice), in an address, in base64."""
    lines = [line.strip() for line in value.splitlines() if len(line.strip()) >= SHORTEST]
    found: dict[str, None] = {}
    for one in dict.fromkeys([value, *lines]):
        data = one.encode("utf-8", "surrogateescape")
        once = [one, *_escaped(one), repr(data)[2:-1]]
        twice = [other for text in once for other in _escaped(text)]
        encoded = [quote(data, safe=""), quote_plus(data), *_in_base64(data)]
        found |= dict.fromkeys([*once, *twice, *encoded])
    return tuple(found)


def _escaped(text: str) -> list[str]:
    """Return a text as JSON, Python and HTML escape it."""
    page = html.escape(text)
    return [
        *(json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (True, False)),
        repr(text)[1:-1],
        page,
        page.replace("&quot;", "&#34;").replace("&#x27;", "&#39;"),
    ]


def _in_base64(data: bytes) -> Iterator[str]:
    """Yield the base64 of a value, for each of its possible places in what is encoded."""
    for before in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            text = encode(bytes(before) + data).decode()
            end = len(text) if (before + len(data)) % 3 == 0 else -4
            part = text[4 if before else 0 : end]
            if len(part) >= SHORTEST:
                yield part


def redact(text: str) -> str:
    """Return a text with the names of secret variables where their values were."""
    for name, value in secrets().items():
        for form in forms(value):
            text = text.replace(form, f"[{name}]")
    return text


class Redacted:
    """A stream of text that redacts what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text without secrets."""
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write lines without secrets."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redact_output() -> None:
    """Redact stdout and stderr from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Redacted):
            setattr(sys, name, Redacted(stream))
