"""Choose the files that may leave this machine: what a loader reads, unchanged, with no secret.

No `training_args.bin`, which holds the token, no `ref/`, no checkpoints, and no pickle.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from chainforge.core.artifacts import sha256
from chainforge.core.errors import InputError
from chainforge.core.secrets import forms, secrets
from chainforge.train.lineage import Ancestor

Part = Literal["adapter", "model", "dataset"]
Files = Mapping[str, Path | bytes]  # contents by the names that they are sent under

CARD = "README.md"
_TEXTS = (".json", ".jsonl", ".jinja", ".md", ".parquet", ".txt")
_TOKENIZER = (
    r"tokenizer\.(?:json|model)|(?:tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|vocab\.txt|merges\.txt|chat_template\.(?:jinja|json)"
)
_LOADED = {
    "adapter": re.compile(rf"adapter_config\.json|adapter_model\.safetensors|{_TOKENIZER}"),
    "model": re.compile(
        r"(?:generation_)?config\.json|model.*\.safetensors|model\.safetensors\.index\.json"
        rf"|LICEN[CS]E.*|NOTICE.*|{_TOKENIZER}"
    ),
    "dataset": re.compile(r"(?:.*/)?[^./][^/]*\.parquet"),
}


def choose(part: Part, folder: Path) -> tuple[dict[str, Path | bytes], list[str]]:
    """Return the files of a folder that a loader reads, without the card, and the other names."""
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    files: dict[str, Path | bytes] = {
        name: folder / name for name in names if _LOADED[part].fullmatch(name)
    }
    return files, [name for name in names if name not in files and name != CARD]


def signed_outputs(stage: Ancestor, folder: Path) -> dict[str, str]:
    """Return the digests that a stage signed of a folder's files, by their names in it."""
    prefix = f"{folder.resolve().name}/"
    return {
        name.removeprefix(prefix): digest
        for name, digest in stage.manifest.outputs.items()
        if name.startswith(prefix)
    }


def check_signed(stage: Ancestor, folder: Path, files: Files) -> None:
    """Raise `InputError` when a file is not the one that the stage signed, or is missing."""
    outputs = signed_outputs(stage, folder)
    for name in outputs.keys() - {CARD}:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is gone, which the stage signed; run it again")
    for name in files:
        if outputs.get(name) != sha256(folder / name):
            raise InputError(f"{folder / name} is not what the stage signed; run it again")


def check_secrets(files: Files) -> None:
    """Raise `InputError` when a file holds the value of a secret environment variable.

    Those are the ones with TOKEN, KEY, SECRET, PASSWORD and so on in their names, and the token of
    a Hub login; texts may hold them escaped or encoded, too. Parquet files are decompressed.
    """
    known = {name: [form.encode() for form in forms(value)] for name, value in secrets().items()}
    for name, content in files.items() if known else ():
        is_text = Path(name).suffix != ".safetensors"
        for part in _contents(content):
            for variable, values in known.items():
                if any(part.find(value) >= 0 for value in (values if is_text else values[:1])):
                    raise InputError(
                        f"{name} holds the value of {variable}, so nothing was sent. If it is a "
                        "secret, revoke it where it was issued, and make the file without it; "
                        f"otherwise unset {variable} for this command"
                    )


def local_paths(files: Files) -> list[str]:
    """Return a note for each file of text or rows that holds a path of this machine."""
    here = {str(path): f"{path}/".encode() for path in (Path.home(), Path.cwd()) if path.name}
    return [
        f"{name} names {place}, a folder of this machine"
        for name, content in files.items()
        if Path(name).suffix in _TEXTS
        for place, known in here.items()
        if any(part.find(known) >= 0 for part in _contents(content))
    ]


def _contents(content: Path | bytes) -> Iterator[Any]:
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
