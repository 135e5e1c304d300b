"""Recognise secrets, refuse them in settings, and leave them out of what is written.

Secrets come from the environment alone, in variables with names such as TOKEN, KEY or PASSWORD, and
from a login to the Hub.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from chainforge.core.errors import InputError

# Words of a variable's name; the last one may say where a secret is, or how long.
_VARIABLE = re.compile(
    r"(?:.*_)?(?:KEYS?|PASS|PWD|CREDS?|AUTH|PAT|\w*(?:TOKENS?|SECRET|PASSWORD|PASSWD|CREDENTIALS?"
    r"|APIKEY))\d*(?:_.*)?"
)
_ABOUT = re.compile(
    r"(?:.*_)?(?:DIR|FILE|HOST|MODE|NAME|PATH|PORT|SIZE|SOCK|TTL|TYPE|URL)|PWD|OLDPWD"
)
# Of settings; a model's special tokens have such names, too.
_KEY = re.compile(
    r"(?:.*_)?(?:api_?key|(?:access|private|secret)_?key(?:_id)?|secret|token|pass(?:word|wd)?"
    r"|credentials?|authorization|auth)"
)
_SPECIAL = re.compile(r"(?:bos|eos|pad|unk|sep|cls|mask|image|video|audio|stop|think)\w*_token")
_LOOKS = re.compile(
    r"\b(?:sk-[\w-]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|://[^/@\s:\[]*:(?!\d+/)[^@\s]+@)"  # the password in an address
)
_STAGE_PARTS = ("model", "adapter", "dataset")


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Return whether an environment variable is a secret: OPENAI_API_KEY_2, MYSQL_PWD."""
    return bool(_VARIABLE.fullmatch(name.upper()) and not _ABOUT.fullmatch(name.upper()))


def is_secret_key(key: Any) -> bool:
    """Return whether a setting of this name is a secret."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(key)).replace("-", "_").lower()
    return bool(_KEY.fullmatch(name) and not _SPECIAL.fullmatch(name))


def check_settings(value: Any, where: str) -> None:
    """Raise `InputError` for a setting that is, or holds, a secret; its value is never repeated."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if is_secret_key(key) and isinstance(item, str) and item.strip():
                raise _refusal(f"{where}: {key}")
            check_settings(item, f"{where}: {key}")
    elif isinstance(value, list | tuple):
        for item in value:
            check_settings(item, where)
    elif isinstance(value, str) and (_LOOKS.search(value) or redact(value) != value):
        raise _refusal(where)


def _refusal(where: str) -> InputError:
    return InputError(
        f"{redact(where)}: a secret goes into no file and on no command line, where others read "
        "it; take it out, and set HF_TOKEN, OPENAI_API_KEY or the like in the environment"
    )


def secrets() -> dict[str, str]:
    """Return the values that must not be written down, by the names of their variables."""
    found = {name: os.environ[name].strip() for name in os.environ if is_secret_name(name)}
    found["the Hub login"] = _login()
    # A shorter value, such as the EMPTY of a local server, is part of other words.
    return {n: one for n, one in found.items() if len(one) >= 8 and not os.path.exists(one)}


@lru_cache(maxsize=1)
def _login() -> str:
    """Return the token of a Hub login, from where `hf auth login` writes it; empty without."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH", f"{home}/token")).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def read_secret(variable: str) -> str:
    """Return a key from the environment, without blanks around it; empty where it is not set.

    Raise `InputError` for what cannot be sent as a key, without repeating its value.
    """
    value = os.environ.get(variable, "").strip()
    if re.search(r"[^!-~]|[\"'`]", value):
        raise InputError(
            f"{variable}: the value contains a blank, a line break, a quotation mark or a "
            "character that is not ASCII; set it to the key alone"
        )
    return value


def forms(value: str) -> tuple[str, ...]:
    """Return how a value may be written: as it is, or escaped in JSON."""
    escaped = (json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    return tuple(dict.fromkeys([value, *escaped]))


def public(path: str) -> str:
    """Return a path as others may read it: of one from elsewhere only the end.

    A stage's `model/` keeps the stage's name.
    """
    if not path.startswith(("/", "~")) and ".." not in Path(path).parts:
        return path
    place = Path(os.path.normpath(path)).expanduser()
    if place.name in _STAGE_PARTS and (place.parent / "manifest.json").is_file():
        return f"{place.parent.name}/{place.name}"
    return place.name if place.name not in ("", "..") else "elsewhere"


def public_settings(value: Any) -> Any:
    """Return settings as others may read them: no key or token, and paths as `public` has them."""
    if isinstance(value, Mapping):
        return {key: public_settings(one) for key, one in value.items() if not is_secret_key(key)}
    if isinstance(value, list | tuple):
        return [public_settings(one) for one in value]
    if not isinstance(value, str):
        return value
    if "\n" not in value and (value.count("/") > 1 or value.startswith(("../", "~/"))):
        value = re.sub(r"(?<=://)[^/@\s]+@", "", public(value))
    return value.replace(f"{Path.home()}/", "~/")


def redact(text: str) -> str:
    """Return a text with the names of secret variables where their values were."""
    for name, value in secrets().items():
        for form in forms(value):
            text = text.replace(form, f"[{name}]")
    return text


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


class Redacted:
    """A stream of text that redacts what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text without secrets."""
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines without secrets."""
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redact_output() -> None:
    """Redact stdout and stderr from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Redacted):
            setattr(sys, name, Redacted(stream))
