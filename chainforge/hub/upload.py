"""Put files into a repository of the Hub: the named ones, in one commit, with no secret in them."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import sha256
from chainforge.core.errors import InputError
from chainforge.core.secrets import read_secret
from chainforge.core.weights import hub_failures
from chainforge.hub.safety import Files, check_secrets

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Seconds before each retry, and the statuses to retry: a conflict with another commit, too many
# requests, and the server's own faults.
WAITS = (1.0, 2.0, 4.0)
TRANSIENT = frozenset({409, 412, 429, 500, 502, 503, 504})
# Files of an earlier upload that a loader would read as part of this one.
_LOADED = re.compile(
    r"(?:adapter_|generation_)?config\.json|.*\.(?:safetensors|bin|pt|gguf|parquet)"
)


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


def push(
    files: Files, identity: str, kind: str, *, private: bool, message: str
) -> tuple[str, bool]:
    """Put files into a repository in one commit; return its address, and whether it is private.

    The repository is created if it does not exist. Transient failures (the server's own errors, a
    lost connection, a concurrent commit) are retried. Raises `InputError` when a file holds a
    secret, when a private upload would go to a public repository, when files of another upload
    would be loaded with these, and when the Hub refuses.
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
            if wait is None or not _is_transient(error):
                raise InputError(
                    f"{identity}: the Hub refused: {_message(error)}{_advice(error, identity)}"
                ) from None
            logger.warning("%s: %s; retrying in %g s", identity, _message(error), wait)
            time.sleep(wait)
    return f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{identity}", seen


def _send(api: Any, files: Files, identity: str, kind: str, private: bool, message: str) -> bool:
    """Send files once; return whether the repository is private."""
    from huggingface_hub import CommitOperationAdd

    existing = _repository(api, identity, kind)
    if existing is None:
        api.create_repo(identity, repo_type=kind, private=private)
    else:
        _check_existing(existing, identity, files, private)
    operations = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    api.create_commit(identity, operations, commit_message=message, repo_type=kind)
    return private if existing is None else bool(existing.private)


def _repository(api: Any, identity: str, kind: str) -> Any | None:
    """Return what the Hub says of a repository and its files; None if it does not exist."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.repo_info(identity, repo_type=kind, files_metadata=True)
    except RepositoryNotFoundError:
        return None


def _check_existing(existing: Any, identity: str, files: Files, private: bool) -> None:
    """Raise `InputError` when an existing repository is not fit for these files."""
    if private and not existing.private:
        raise InputError(
            f"{identity} exists and is public: add --public if everybody may have this, or choose "
            "another name"
        )
    for file in existing.siblings or ():
        name = file.rfilename
        if name not in files and _LOADED.fullmatch(name.rpartition("/")[2]):
            raise InputError(
                f"{identity} holds {name} of another upload, which would be loaded with this one: "
                "delete it there, or choose another name"
            )


def different_weights(folder: Path, identity: str) -> str | None:
    """Return the first weights file of a local model that the Hub's model lacks or has different.

    Raises `InputError` if there is no such model.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils.sha import git_hash

    try:
        existing = _repository(HfApi(token=get_token() or False), identity, "model")
    except hub_failures() as error:
        raise InputError(f"{identity}: the Hub does not show it: {_message(error)}") from None
    if existing is None:
        raise InputError(f"{identity}: no such model on the Hub, or it is private")
    known = {file.rfilename: file for file in existing.siblings or ()}
    for path in sorted(folder.glob("*.safetensors")):
        file = known.get(path.name)
        if file is not None and file.lfs is not None:
            same = file.lfs.sha256 == sha256(path)
        else:
            same = file is not None and file.blob_id == git_hash(path.read_bytes())
        if not same:
            return path.name
    return None


def licence_of(identity: str) -> dict[str, str]:
    """Return the licence keys of a model's card on the Hub; none if the Hub cannot be asked."""
    from huggingface_hub import HfApi, get_token

    try:
        found = _repository(HfApi(token=get_token() or False), identity, "model")
    except hub_failures():
        return {}
    return licence_keys(found.card_data.to_dict() if found and found.card_data else {})


def licence_keys(card: Mapping[str, Any]) -> dict[str, str]:
    """Return the licence keys of a card's head."""
    names = ("license", "license_name", "license_link")
    return {name: str(card[name]) for name in names if card.get(name)}


def _message(error: Exception) -> str:
    """Return the Hub's answer on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _status(error: Exception) -> int | None:
    """Return the HTTP status; None without an answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transient(error: Exception) -> bool:
    """Return whether a retry may succeed."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return _status(error) in TRANSIENT if _status(error) else isinstance(error, HTTPError)


def _advice(error: Exception, identity: str) -> str:
    """Return what to do about a refusal."""
    status = _status(error)
    if status == 401:
        return ". The token is not valid: set HF_TOKEN, or run `hf auth login`"
    if status == 403:
        owner = identity.partition("/")[0]
        return f". The token may not write there: is {owner} you, and does it allow writing?"
    return ". Run the same command again to resume" if _is_transient(error) else ""
