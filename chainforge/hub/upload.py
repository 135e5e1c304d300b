"""Put files into a repository of the Hub in one commit, after a search for secrets in them."""

from __future__ import annotations

import gzip
import logging
import mmap
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.secrets import forms, read_secret, secrets
from chainforge.core.weights import hub_failures

logger = logging.getLogger(__name__)

Files = Mapping[str, Path | bytes]  # contents by the names that they are sent under

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
WAITS = (1.0, 2.0, 4.0)  # seconds before each retry
TRANSIENT = (None, 409, 412, 429, 500, 502, 503, 504)  # no answer, conflict, too many, its fault
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


def check_there(base: str | None) -> None:
    """Raise `InputError` for a base that the Hub does not have: nobody could load the adapter."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        if base and HUB_ID.fullmatch(base):
            HfApi(token=token()).model_info(base)
    except RepositoryNotFoundError:
        raise InputError(f"base: {base} is not on the Hub, or the token may not read it") from None
    except hub_failures():
        pass  # the upload says what is wrong


def push(files: Files, identity: str, what: str, *, private: bool) -> tuple[str, bool]:
    """Put files into a repository in one commit; return its address, and whether it is private.

    `what` is adapter, model or dataset. The repository is created if it does not exist. Raises
    `InputError` when a file holds a secret, when a private upload would go to a public repository,
    when files of another upload would be loaded with these, and when the Hub refuses.
    """
    from huggingface_hub import HfApi

    check_id(identity, "to")
    check_secrets(files)
    kind = "dataset" if what == "dataset" else "model"  # of repository
    api = HfApi(token=token(), library_name="chainforge")
    for wait in (*WAITS, None):
        try:
            seen = _send(api, files, identity, kind, private, f"Add the {what} made by ChainForge")
            break
        except hub_failures() as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            text = " ".join(str(error).split())[:300] or type(error).__name__
            if wait is None or status not in TRANSIENT:
                raise InputError(
                    f"{identity}: the Hub refused: {text}{_advice(status, identity)}"
                ) from None
            logger.warning("%s: %s; retrying in %g s", identity, text, wait)
            time.sleep(wait)
    return f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{identity}", seen


def _send(api: Any, files: Files, identity: str, kind: str, private: bool, message: str) -> bool:
    """Send files once; return whether the repository is private."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError

    old: list[str] = []
    try:
        existing = api.repo_info(identity, repo_type=kind)
    except RepositoryNotFoundError:
        api.create_repo(identity, repo_type=kind, private=private)
    else:
        old = _check_existing(existing, identity, files, private)
        private = bool(existing.private)
    operations: list[Any] = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    operations += [CommitOperationDelete(name) for name in old]
    api.create_commit(identity, operations, commit_message=message, repo_type=kind)
    return private


def _check_existing(existing: Any, identity: str, files: Files, private: bool) -> list[str]:
    """Return the old evidence, to be deleted; raise `InputError` for an unfit repository."""
    if private and not existing.private:
        raise InputError(
            f"{identity} exists and is public: add --public if everybody may have this, or choose "
            "another name"
        )
    others = [file.rfilename for file in existing.siblings or () if file.rfilename not in files]
    for name in others:
        if _LOADED.fullmatch(name.rpartition("/")[2]):
            raise InputError(
                f"{identity} holds {name} of another upload, which would be loaded with this one: "
                "delete it there, or choose another name"
            )
    return [name for name in others if name.startswith("evidence/")]


def _advice(status: int | None, identity: str) -> str:
    """Return what to do about a refusal."""
    if status == 401:
        return ". The token is not valid: set HF_TOKEN, or run `hf auth login`"
    if status == 403:
        return f". The token may not write to {identity.partition('/')[0]}"
    return ". Run the same command again to resume" if status in TRANSIENT else ""


def check_secrets(files: Files) -> None:
    """Raise `InputError` when a file holds the value of a secret environment variable.

    Texts may hold it escaped or encoded, too. Parquet and gzip files are decompressed.
    """
    known = {name: [form.encode() for form in forms(value)] for name, value in secrets().items()}
    for name, content in files.items() if known else ():
        is_text = Path(name).suffix != ".safetensors"
        for part in _contents(content, name):
            for variable, values in known.items():
                if any(part.find(value) >= 0 for value in (values if is_text else values[:1])):
                    raise InputError(
                        f"{name} holds the value of {variable}, so nothing was sent: revoke that "
                        f"secret and make the file without it, or unset {variable} if it holds none"
                    )


def _contents(content: Path | bytes, name: str) -> Iterator[Any]:
    """Yield a file's contents to search in: whole, or batches of a parquet file's rows."""
    if isinstance(content, bytes):
        yield gzip.decompress(content) if name.endswith(".gz") else content
    elif content.suffix == ".parquet":
        yield from _rows(content)
    elif content.stat().st_size:
        with (
            open(content, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
        ):
            yield view


def _rows(path: Path) -> Iterator[bytes]:
    """Yield a parquet file's rows in Arrow's uncompressed form."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches():
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, batch.schema) as stream:
                    stream.write_batch(batch)
                yield sink.getvalue().to_pybytes()
    except pa.ArrowException as error:
        raise InputError(f"{path} is not a parquet file: {error}") from None
