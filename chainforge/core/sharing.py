"""What may leave this machine: no secret, and no path that tells of the machine or its user."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import MANIFEST, STARTED
from chainforge.core.errors import InputError
from chainforge.core.secrets import forms, is_secret_key, secrets

Files = Mapping[str, Path | bytes]  # contents by the names that they go out under

_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_PARTS = ("model", "adapter", "dataset")  # of a stage's folder
_TEXTS = (".json", ".jsonl", ".jinja", ".md", ".parquet", ".txt")


def check_secrets(files: Files) -> None:
    """Raise `InputError` when a file holds the value of a secret environment variable.

    Those are the ones with TOKEN, KEY, SECRET, PASSWORD and so on in their names, and the token of
    a Hub login; texts may hold them escaped or encoded, too. Of parquet files the values are read,
    since their bytes are compressed.
    """
    known = {name: [form.encode() for form in forms(value)] for name, value in secrets().items()}
    for name, content in files.items() if known else ():
        text = Path(name).suffix != ".safetensors"
        for part in _parts(content):
            for variable, values in known.items():
                if any(part.find(value) >= 0 for value in (values if text else values[:1])):
                    raise InputError(
                        f"{name} holds the value of {variable}, so nothing was sent. If that is a "
                        "secret, change it where it was issued, and make the file without it; if "
                        f"it is none, unset {variable} for this command"
                    )


def places_told(files: Files) -> list[str]:
    """Name the files of text and of rows that hold a path of this machine, each with the path."""
    here = {str(path): f"{path}/".encode() for path in (Path.home(), Path.cwd()) if path.name}
    return [
        f"{name} names {place}, a folder of this machine"
        for name, content in files.items()
        if Path(name).suffix in _TEXTS
        for place, known in here.items()
        if any(part.find(known) >= 0 for part in _parts(content))
    ]


def public(path: str) -> str:
    """Return a path without what it tells of this machine: of one from its root only the end.

    A stage's `model/` keeps the stage's name, which says more.
    """
    outside = path.startswith(("/", "~")) or ".." in Path(path).parts
    if not outside:
        return path
    place = Path(os.path.normpath(path))
    name = place.name if place.name not in ("", "..", "~") else "elsewhere"
    stage = place.expanduser().parent
    if name in _PARTS and any((stage / file).is_file() for file in (MANIFEST, STARTED)):
        return f"{stage.name}/{name}"
    return name


def public_settings(value: Any) -> Any:
    """Return settings as others may read them: no key or token, and paths as `public` has them."""
    if isinstance(value, Mapping):
        return {key: public_settings(one) for key, one in value.items() if not is_secret_key(key)}
    if isinstance(value, list | tuple):
        return [public_settings(one) for one in value]
    if not isinstance(value, str):
        return value
    if "\n" not in value and (value.count("/") > 1 or value.startswith(("../", "~/"))):
        value = public(value)
    return _USER_IN_URL.sub("", value).replace(f"{Path.home()}/", "~/")


def _parts(content: Path | bytes) -> Iterator[Any]:
    """Yield a file's contents to search in: whole, or batches of a parquet file's rows."""
    if isinstance(content, bytes):
        yield content
    elif content.suffix == ".parquet":
        yield from _rows(content)
    elif content.stat().st_size:
        with (
            open(content, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
        ):
            yield view


def _rows(path: Path) -> Iterator[bytes]:
    """Yield a parquet file's rows in Arrow's plain form, where every text stands as it is."""
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
