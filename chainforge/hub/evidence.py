"""Write and read `evidence/`, by which anyone can check the card of a model or adapter.

It is laid out as a run, so that what reads a run reads it: a folder for each stage with its
manifest, without paths and metrics, and for each evaluation of the card its results and samples,
with the columns of `SAMPLE` alone. `files.json` lists the SHA-256 of every published file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chainforge import __version__
from chainforge.core.artifacts import MANIFEST, Manifest, digest, fingerprinted, sha256, shaped
from chainforge.core.errors import InputError, first_line
from chainforge.core.jsonl import Row, read_rows
from chainforge.core.run_dir import SAMPLE
from chainforge.core.weights import hub_failures
from chainforge.data.rows import MAX_LINE
from chainforge.generate.build import public_settings
from chainforge.hub.cards import measurements
from chainforge.hub.lineage import Ancestor
from chainforge.hub.upload import check_id

EVIDENCE, FILES = "evidence", "evidence/files.json"
RESULTS, SAMPLES = "results.json", "samples.jsonl.gz"
REFERENCES = ("model_name_or_path", "teacher_model_name_or_path", "data", "pool", "gate_pool")
COLUMNS = tuple(SAMPLE.__annotations__)
MAX_READ, MAX_SAMPLES = 2**25, 2**30  # bytes of a file that is read whole; of unpacked samples


def add_evidence(files: dict[str, Path | bytes], what: str, stages: Sequence[Ancestor]) -> None:
    """Add its evidence to the files of a model or adapter that stages made, the card included."""
    if what == "dataset" or not stages:
        return
    folders: dict[str, Ancestor] = {}
    for one in (*(found.stage for found in measurements(stages)), *stages):
        same = sum(other.name == one.name for other in folders.values())
        folders[f"{one.name}-{same + 1}" if same else one.name] = one
    for folder, one in folders.items():
        files |= {f"{EVIDENCE}/{folder}/{name}": part for name, part in _published(one).items()}
    hashes = {name: _sha256(part) for name, part in files.items()}
    stated = {"version": __version__, "what": what, "stage": folder, "files": hashes}
    files[FILES] = as_json(stated)


def _published(stage: Ancestor) -> dict[str, bytes]:
    """Return a stage's manifest and, of an evaluation, its results and samples."""
    made = stage.manifest
    found: dict[str, bytes] = {}
    if results := stage.signed(RESULTS):
        found[RESULTS] = as_json(results | {"settings": _public(results.get("settings") or {})})
        if samples := stage.signed_file("samples.jsonl"):
            rows = ({k: row[k] for k in COLUMNS if k in row} for row in read_rows(samples))
            text = "".join(f"{json.dumps(row)}\n" for row in rows)
            found[SAMPLES] = gzip.compress(text.encode(), mtime=0)
    outputs = {k: v for k, v in made.outputs.items() if k.startswith(("model/", "adapter/"))}
    counted = fingerprinted(made.recipe, made.given, made.inputs)
    given = _public(counted["given"])
    notes: dict[str, Any] = {"name": stage.name}
    # Settings with a path or a host of one's own, or files that changed since, cannot be checked.
    if digest(counted) == made.fingerprint and given == counted["given"]:
        notes |= {key: counted[key] for key in ("files", "code")}
    named = {key: public_settings(made.config[key]) for key in REFERENCES if key in made.config}
    shown = Manifest(made.recipe, made.fingerprint, given, made.inputs, config=named, notes=notes)
    shown.outputs = outputs | {name: _sha256(part) for name, part in found.items()}
    for name in ("versions", "device", "seed", "seconds", "finished"):
        setattr(shown, name, getattr(made, name))
    return {MANIFEST: as_json(asdict(shown)), **found}


def _public(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without keys, paths and, unlike in a card, hosts of one's own."""
    shown = {key: value for key, value in settings.items() if "://" not in json.dumps(value)}
    return dict(public_settings(shown))


def _sha256(content: Path | bytes) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)


def as_json(value: Any) -> bytes:
    """Return JSON as it is published."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_folder(reference: str) -> tuple[Path, dict[str, Path]]:
    """Return a folder that others wrote, or a repository of the Hub, and its files by name.

    Raises `InputError` for a link that leaves it, a file that is none, and one that is too large.
    """
    if not Path(reference).is_dir():
        check_id(reference, "no such folder, and for a repository")
        from huggingface_hub import snapshot_download

        try:
            reference = snapshot_download(reference)
        except hub_failures() as error:
            what = f"{reference} cannot be downloaded: {first_line(error)}"
            raise InputError(f"{what} Check the name, and HF_TOKEN if it is private") from None
    folder = Path(reference).resolve()
    # The Hub's cache has links to files beside its snapshots.
    root = folder.parents[1] if folder.parent.name == "snapshots" else folder
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not Path(os.path.realpath(path)).is_relative_to(root):
            raise InputError(f"{name!r} is a link that leaves the folder; delete it")
        if path.is_dir() or name == ".gitattributes" or name.startswith((".git/", ".cache/")):
            continue
        read = name.endswith((".md", "adapter_config.json")) or name.startswith(f"{EVIDENCE}/")
        if not path.is_file() or path.stat().st_size > (MAX_READ if read else math.inf):
            raise InputError(f"{name!r} is no plain file, or larger than any export writes")
        found[name] = path
    return folder, found


def read_samples(path: Path) -> Iterator[Row]:
    """Yield published samples; raise `InputError` for what is malformed or unpacks to too much."""
    try:
        with gzip.open(path) as file:
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE or file.tell() > MAX_SAMPLES:
                    raise InputError(f"{SAMPLES} unpacks to more than any export writes")
                yield shaped(Path(SAMPLES), json.loads(line), SAMPLE)
    except (OSError, EOFError, zlib.error, json.JSONDecodeError) as error:
        raise InputError(f"{SAMPLES} is damaged: {error}") from None
