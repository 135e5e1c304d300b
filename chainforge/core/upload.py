"""Put files on the Hub, or into a folder: what was named and nothing else, and no secret in it."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chainforge.core.artifacts import sha256
from chainforge.core.errors import InputError
from chainforge.core.secrets import read_secret
from chainforge.core.sharing import Files, check_secrets

logger = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Seconds before the next attempts, and the statuses after which there is one: a conflict with
# another commit, too many requests, and what is the server's own fault.
WAITS = (1.0, 2.0, 4.0)
PASSING = frozenset({409, 412, 429, 500, 502, 503, 504})
# What a loader would take for a part of a repository, though it is from an earlier upload.
_LOADED = re.compile(
    r"(?:adapter_|generation_)?config\.json|.*\.(?:safetensors|bin|pt|gguf|parquet)"
)


@dataclass(frozen=True)
class Pushed:
    """Where files went; `private` as the repository is, which may have been there before."""

    address: str
    private: bool


def check_id(identity: str, where: str) -> None:
    """Raise `InputError` unless `identity` can name a repository."""
    if not HUB_ID.fullmatch(identity) or ".." in identity or "--" in identity:
        raise InputError(f"{where}: expected owner/name, found {identity!r}")


def token() -> str:
    """Return the Hub's token, from HF_TOKEN or a login; raise `InputError` when there is none."""
    from huggingface_hub import get_token

    found = read_secret("HF_TOKEN") or get_token()
    if not found:
        raise InputError("no token for the Hub: set HF_TOKEN, or run `hf auth login`")
    return found


def check_folder(folder: Path) -> Path:
    """Return the absolute path of a folder to write; raise `InputError` unless new or empty."""
    folder = Path(os.path.abspath(folder))
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{folder} is where you are; name a new folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there and not empty; name a new folder")
    return folder


def write_folder(files: Files, folder: Path) -> None:
    """Write files into a new or empty folder, which appears whole or not at all."""
    folder = check_folder(folder)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        for name, content in files.items():
            path = part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                shutil.copyfile(content, path)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def push(files: Files, identity: str, kind: Kind, *, private: bool, message: str) -> Pushed:
    """Put files into a repository of the Hub, in one commit; make it if it is not there.

    What passes (the server's own errors, a lost connection, somebody else's commit) is tried again;
    what is there already is not sent twice. Raises `InputError` when a file holds a secret, when a
    private upload would go to a public repository, when files of another upload would be loaded
    with these, and when the Hub refuses.
    """
    from huggingface_hub import HfApi

    check_id(identity, "to")
    check_secrets(files)
    api = HfApi(token=token(), library_name="chainforge")
    for wait in (*WAITS, None):
        try:
            seen = _send(api, files, identity, kind, private, message)
            break
        except hub_failures() as error:
            if wait is None or not _passes(error):
                raise InputError(
                    f"{identity}: the Hub did not take it: {_told(error)}{_advice(error, identity)}"
                ) from None
            logger.warning("%s: %s; trying again in %g s", identity, _told(error), wait)
            time.sleep(wait)
    return Pushed(f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{identity}", seen)


def _send(api: Any, files: Files, identity: str, kind: Kind, private: bool, message: str) -> bool:
    """Send files once; return whether the repository is private."""
    from huggingface_hub import CommitOperationAdd

    there = repository(api, identity, kind)
    if there is None:
        api.create_repo(identity, repo_type=kind, private=private)
    else:
        _check_there(there, identity, files, private)
    operations = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    api.create_commit(identity, operations, commit_message=message, repo_type=kind)
    return private if there is None else bool(there.private)


def hub_failures() -> tuple[type[Exception], ...]:
    """Return what a call to the Hub may raise: what its client is built on, or no network."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return HTTPError, OSError


def repository(api: Any, identity: str, kind: Kind) -> Any | None:
    """Return what the Hub says of a repository and its files; None when there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.repo_info(identity, repo_type=kind, files_metadata=True)
    except RepositoryNotFoundError:
        return None


def other_weights(folder: Path, identity: str) -> str | None:
    """Name a weights file of a local model that is another one, or none, in a repository.

    None when all are the same, by their SHA-256. Raises `InputError` without such a repository.
    """
    from huggingface_hub import HfApi, get_token

    try:
        there = repository(HfApi(token=get_token() or False), identity, "model")
    except hub_failures() as error:
        raise InputError(f"{identity}: the Hub does not show it: {_told(error)}") from None
    if there is None:
        raise InputError(f"{identity}: no such model on the Hub, or none that you may see")
    prints = {file.rfilename: file for file in there.siblings or ()}
    for path in sorted(folder.glob("*.safetensors")):
        file = prints.get(path.name)
        if file is None or not _same(path, file):
            return path.name
    return None


def licence_of(identity: str) -> dict[str, str]:
    """Return what a model's card on the Hub says of its licence; nothing where it cannot be had."""
    from huggingface_hub import HfApi, get_token

    try:
        found = repository(HfApi(token=get_token() or False), identity, "model")
    except hub_failures():
        return {}
    card = found.card_data.to_dict() if found is not None and found.card_data else {}
    return licence_keys(card)


def licence_keys(card: Mapping[str, Any]) -> dict[str, str]:
    """Return what a card's head says of the licence."""
    names = ("license", "license_name", "license_link")
    return {name: str(card[name]) for name in names if card.get(name)}


def _same(path: Path, file: Any) -> bool:
    """Compare a file with the Hub's: its SHA-256 where it is large, else git's own hash."""
    from huggingface_hub.utils.sha import git_hash

    if file.lfs is not None:
        return bool(file.lfs.sha256 == sha256(path))
    return bool(file.blob_id == git_hash(path.read_bytes()))


def _check_there(there: Any, identity: str, files: Files, private: bool) -> None:
    """Raise `InputError` when a repository that is there is not fit for these files."""
    if private and not there.private:
        raise InputError(
            f"{identity} is there and is public: say --public if everybody may have this, or give "
            "another name"
        )
    names = [file.rfilename for file in there.siblings or ()]
    for name in names:
        if name not in files and _LOADED.fullmatch(name.rpartition("/")[2]):
            raise InputError(
                f"{identity} holds {name} of another upload, which would be loaded with this one: "
                "delete it there, or give another name"
            )


def _told(error: Exception) -> str:
    """Return what the Hub said, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__


def _status(error: Exception) -> int | None:
    """Return the status that the Hub answered with; None where it did not answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _passes(error: Exception) -> bool:
    """Whether it may go well the next time."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return _status(error) in PASSING if _status(error) else isinstance(error, HTTPError)


def _advice(error: Exception, identity: str) -> str:
    """Return what to do about a refusal."""
    status = _status(error)
    if status == 401:
        return ". The token is not known there: set HF_TOKEN, or run `hf auth login`"
    if status == 403:
        owner = identity.partition("/")[0]
        return f". The token may not write there: is {owner} you, and was it made for writing?"
    return ". The same command again goes on" if _passes(error) else ""
