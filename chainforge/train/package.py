"""Choose what of a stage's directory goes out: an adapter, a model or a data set, and its card.

Only files that a loader reads are taken, by their names: no `training_args.bin`, which holds the
token, no `ref/`, no checkpoints, and no pickle. Each must be the one that the stage signed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chainforge.core import upload as hub
from chainforge.core.artifacts import STARTED, read_json, read_manifest, sha256
from chainforge.core.errors import InputError
from chainforge.core.sharing import places_told, public
from chainforge.core.upload import Kind
from chainforge.core.weights import INDEX, check_weights
from chainforge.train.adapterbase import find_base
from chainforge.train.lineage import Ancestor, Origin, base_of, lineage, stages_in
from chainforge.train.modelcard import data_card, head_of, model_card

What = Literal["adapter", "model", "dataset"]
PARTS: tuple[What, ...] = ("adapter", "model", "dataset")
ADAPTER, CONFIG, CARD = "adapter_config.json", "config.json", "README.md"

_TOKENIZER = (
    r"tokenizer\.(?:json|model)|(?:tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|vocab\.txt|merges\.txt|chat_template\.(?:jinja|json)"
)
TAKEN = {
    "adapter": re.compile(rf"adapter_config\.json|adapter_model\.safetensors|{_TOKENIZER}"),
    "model": re.compile(
        r"(?:generation_)?config\.json|model.*\.safetensors|model\.safetensors\.index\.json"
        rf"|LICEN[CS]E.*|NOTICE.*|{_TOKENIZER}"
    ),
    "dataset": re.compile(r"(?:.*/)?[^./][^/]*\.parquet"),
}


@dataclass(frozen=True)
class Package:
    """What goes out: contents by name, what stays behind, and what to know of it.

    `base` is what an adapter goes on, or a model began with.
    """

    what: What
    folder: Path
    files: dict[str, Path | bytes]
    left_out: list[str]
    base: Origin | None
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> Kind:
        """The kind of repository."""
        return "dataset" if self.what == "dataset" else "model"


def pack(
    path: Path,
    what: What | None = None,
    *,
    title: str | None = None,
    base: str | None = None,
    licence: Mapping[str, str] | None = None,
    upload: bool = False,
    online: bool = False,
    made_from: Package | None = None,
) -> Package:
    """Choose the files of a stage, or of a folder that is one of its parts, and write the card.

    `title` is what the card is called and loaded by; `base` the Hub id of an adapter's base, which
    for an `upload` must be one. `online` asks the Hub for the base's licence, and whether its
    weights are those that were trained on. `made_from` is the adapter that was merged into a model.
    Raises `InputError` for what is not there, not finished or changed.
    """
    what, folder = _part(path, what)
    stages = _signed(folder)
    files, left_out = _chosen(what, folder)
    if stages:
        _check_signed(stages[-1], folder, files)
    notes: list[str] = []
    origin = base_of(stages) if what == "model" else None
    if made_from:
        stages = _signed(made_from.folder)
        origin = base_of(stages) or made_from.base
    if what == "adapter":
        config = read_json(folder / ADAPTER)
        origin = find_base(folder, config, stages, base, upload, online, notes)
        named = origin.name if origin.on_hub or base else public(origin.name)
        files[ADAPTER] = _json(config | {"base_model_name_or_path": named})
    elif base is not None:
        raise InputError(f"base: goes with an adapter, and this is a {what}")
    elif what == "model":
        if (folder / INDEX).exists():
            check_weights(str(folder))
        files[CONFIG] = _json(_as_used(read_json(folder / CONFIG)))
    known = dict(licence or {})
    if not known and what != "dataset":
        known = _licence(folder, [origin, base_of(stages)], online)
    files[CARD] = _card(what, folder, title or path.resolve().name, origin, stages, known).encode()
    notes += places_told(files)
    return Package(what, folder, files, left_out, origin, notes)


def _chosen(what: What, folder: Path) -> tuple[dict[str, Path | bytes], list[str]]:
    """Return the files of a folder that go out, but for the card, and the names of the others."""
    files: dict[str, Path | bytes] = {}
    left_out = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if TAKEN[what].fullmatch(name):
            files[name] = file
        elif name != CARD:
            left_out.append(name)
    return files, left_out


def _part(path: Path, what: What | None) -> tuple[What, Path]:
    """Return which part of a stage goes out, and where it lies."""
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; give a finished stage, as runs/NAME/STAGE")
    if read_manifest(path) is None:
        return _plain(path, what)
    there = [part for part in PARTS if _is_part(path / part, part)]
    if what is None and "adapter" in there:
        what = "adapter"
    if what is None and there:
        raise InputError(f"{path} has no adapter/ to export; say --what {there[0]}")
    if what is None or what not in there:
        has = " and ".join(f"{part}/" for part in there) or "nothing to export"
        raise InputError(f"{path} has no {what or 'adapter'}/; it has {has}")
    return what, path / what


def _plain(path: Path, what: What | None) -> tuple[What, Path]:
    """Return what a folder is that is no stage: a part of one, or somebody's model."""
    for folder in (path, *path.resolve().parents[:3]):  # as deep as checkpoints/checkpoint-9 lies
        if (folder / STARTED).exists() and read_manifest(folder) is None:
            raise InputError(f"{folder}: this stage is not finished; run it first")
    for part in PARTS:
        if _is_part(path, part):
            if what not in (None, part):
                raise InputError(f"{path} is one {part}, not a stage with a {what}")
            return part, path
    inside = [
        stage.name
        for stage, _ in stages_in(path)
        if any(_is_part(stage / part, part) for part in PARTS)
    ]
    hint = f"; give one of its stages: {', '.join(inside)}" if inside else ""
    raise InputError(f"{path} is neither a finished stage, nor an adapter, model or data set{hint}")


def _is_part(folder: Path, part: What) -> bool:
    if part == "dataset":
        return folder.is_dir() and any(folder.glob("*.parquet"))
    return (folder / (ADAPTER if part == "adapter" else CONFIG)).is_file()


def _signed(folder: Path) -> list[Ancestor]:
    """Return the lineage of the finished stage that a folder is a part of; nothing without one."""
    stages = lineage(folder.resolve().parent)
    return stages if stages and _outputs(stages[-1], folder) else []


def _outputs(stage: Ancestor, folder: Path) -> dict[str, str]:
    """Return the digests that a stage signed of a folder's files, by their names in it."""
    prefix = f"{folder.resolve().name}/"
    return {
        name.removeprefix(prefix): digest
        for name, digest in stage.manifest.outputs.items()
        if name.startswith(prefix)
    }


def _check_signed(stage: Ancestor, folder: Path, files: Mapping[str, Path | bytes]) -> None:
    """Raise `InputError` when a file is not the one that the stage signed, or is missing."""
    outputs = _outputs(stage, folder)
    for name in outputs.keys() - {CARD}:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is gone, which the stage signed; run it again")
    for name in files:
        if outputs.get(name) != sha256(folder / name):
            raise InputError(f"{folder / name} is not what the stage signed; run it again")


def _as_used(config: dict[str, Any]) -> dict[str, Any]:
    """Return a model's configuration without where it lay, and what only training wanted."""
    kept = {key: value for key, value in config.items() if key != "_name_or_path"}
    if kept.get("use_cache") is False:
        del kept["use_cache"]  # slow answers
    return kept


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _licence(folder: Path, bases: list[Origin | None], online: bool) -> dict[str, str]:
    """Return the licence that a model's own card says, or its base's, here or on the Hub."""
    known = [base for base in bases if base is not None]
    for place in (folder, *(Path(base.name) for base in known if not base.on_hub)):
        card = place / CARD
        head, _ = head_of(card.read_text(encoding="utf-8") if card.is_file() else "")
        if licence := hub.licence_keys(head):
            return licence
    for base in known:
        if online and base.on_hub and (licence := hub.licence_of(base.name)):
            return licence
    return {}


def _card(
    what: What,
    folder: Path,
    title: str,
    base: Origin | None,
    stages: list[Ancestor],
    licence: Mapping[str, str],
) -> str:
    own = folder / CARD
    if what == "dataset":
        text = own.read_text(encoding="utf-8") if own.is_file() else f"# {title}\n"
        return data_card(text, stages, licence)
    if own.is_file() and not stages:
        return own.read_text(encoding="utf-8")  # somebody's model with a card of its own
    return model_card(what, title, base, stages, licence)
