"""Put an adapter, a model or a data set on the Hub, or into a folder: `chainforge export`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from rich.filesize import decimal

from chainforge.core import paths
from chainforge.core.artifacts import STARTED, read_json, read_manifest
from chainforge.core.errors import InputError, hint
from chainforge.core.run_dir import finished_in
from chainforge.core.secrets import public
from chainforge.core.weights import INDEX, check_weights
from chainforge.hub.safety import (
    CARD,
    Files,
    Part,
    check_secrets,
    check_signed,
    choose,
    local_paths,
    signed_outputs,
)  # fmt: skip
from chainforge.hub.upload import (
    HUB_ID,
    check_id,
    different_weights,
    licence_keys,
    licence_of,
    push,
    token,
)  # fmt: skip
from chainforge.train.lineage import Ancestor, Origin, base_of, lineage

PARTS: tuple[Part, ...] = get_args(Part)
ADAPTER, CONFIG, ON_HUB = "adapter_config.json", "config.json", "hub:"


@dataclass(frozen=True)
class ExportRequest:
    """What to export, where to, and how; as on the command line."""

    path: Path
    to: str
    what: str | None = None
    base: str | None = None
    licence: str | None = None
    public: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Package:
    """What goes out: contents by name, the files left out, the base of the model, and notes."""

    what: Part
    folder: Path
    files: dict[str, Path | bytes]
    left_out: list[str]
    base: Origin | None
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Return the kind of repository."""
        return "dataset" if self.what == "dataset" else "model"


def export(request: ExportRequest) -> list[str]:
    """Export as requested; return the report, line by line."""
    if request.what is not None and request.what not in PARTS:
        raise InputError(f"what: {request.what!r}; {hint(request.what, PARTS)}")
    identity = hub_id(request.to)
    online = identity is not None and not request.dry_run
    if online:
        token()  # before gigabytes are read
    with _merged(request) as (path, adapter):
        package = pack(
            path,
            request.what,  # type: ignore[arg-type]
            title=identity or Path(request.to).expanduser().name,
            base=None if adapter else request.base,
            licence={"license": request.licence} if request.licence else None,
            upload=identity is not None,
            online=online,
            merged_from=adapter,
        )
        if adapter:  # the merged model's own folder is temporary
            package = replace(package, folder=adapter.folder if identity else Path(request.to))
        lines = _send(package, request, identity)
    return lines if adapter and identity else [*lines, *_gguf_command(package)]


def pack(
    path: Path,
    what: Part | None = None,
    *,
    title: str | None = None,
    base: str | None = None,
    licence: Mapping[str, str] | None = None,
    upload: bool = False,
    online: bool = False,
    merged_from: Package | None = None,
) -> Package:
    """Choose the files of a stage, or of a folder that is one of its parts, and write the card.

    `title` is what the card is called and loaded by; `base` the Hub id of an adapter's base, which
    for an `upload` must be one. `online` asks the Hub for the base's licence, and whether its
    weights are those that were trained on. `merged_from` is the adapter that was merged.
    Raises `InputError` for what does not exist, is not finished or was changed.
    """
    from chainforge.hub.cards import data_card, model_card  # much, and seldom sent by a recipe

    what, folder = _part(path, what)
    stages = _signed(folder)
    files, left_out = choose(what, folder)
    if stages:
        check_signed(stages[-1], folder, files)
    notes: list[str] = []
    origin = base_of(stages) if what == "model" else None
    if merged_from:
        stages = _signed(merged_from.folder)
        origin = base_of(stages) or merged_from.base
    if what == "adapter":
        config = read_json(folder / ADAPTER)
        origin = _find_base(folder, config, stages, base, upload, online, notes)
        name = origin.name if origin.on_hub or base else public(origin.name)
        files[ADAPTER] = _json(config | {"base_model_name_or_path": name})
    elif base is not None:
        raise InputError(f"base: goes with an adapter, and this is a {what}")
    elif what == "model":
        if (folder / INDEX).exists():
            check_weights(str(folder))
        # Without its old path, and without what only training needs: answers would be slow.
        config = {k: v for k, v in read_json(folder / CONFIG).items() if k != "_name_or_path"}
        files[CONFIG] = _json({k: v for k, v in config.items() if (k, v) != ("use_cache", False)})
    known = dict(licence or {})
    if not known and what != "dataset":
        known = _licence(folder, [origin, base_of(stages)], online)
    card = folder / CARD
    own = card.read_text(encoding="utf-8") if card.is_file() else ""
    title = title or path.resolve().name
    if what == "dataset":
        own = data_card(own or f"# {title}\n", stages, known)
    elif not own or stages:  # somebody's model keeps its own card
        own = model_card(what, title, origin, stages, known)
    files[CARD] = own.encode()
    return Package(what, folder, files, left_out, origin, [*notes, *local_paths(files)])


def hub_id(to: str) -> str | None:
    """Return the repository that `--to` names; None for a folder.

    `owner/name` is a repository, and what begins with a dot, a slash or `~` a folder. If a folder
    `owner` exists here, either may be meant, and nothing is uploaded by mistake.
    """
    if to.startswith(ON_HUB):
        check_id(to.removeprefix(ON_HUB), "to")
        return to.removeprefix(ON_HUB)
    if not HUB_ID.fullmatch(to):
        return None
    if Path(to).parent.exists():
        raise InputError(
            f"to: {to} may be a folder or a repository of the Hub; say ./{to} or {ON_HUB}{to}"
        )
    check_id(to, "to")
    return to


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


def check_folder(folder: Path) -> Path:
    """Return the absolute path of a folder to write; raise `InputError` unless new or empty."""
    folder = Path(os.path.abspath(folder))
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{folder} is the current folder or contains it; name a new folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; name a new folder")
    return folder


@contextlib.contextmanager
def _merged(request: ExportRequest) -> Iterator[tuple[Path, Package | None]]:
    """Yield the path to export; if a model is wanted of an adapter, merge it first."""
    path = request.path
    on_hub = not path.exists() and HUB_ID.fullmatch(str(path))
    stage = (path / "adapter" / ADAPTER).exists() and not (path / "model").exists()
    if request.what != "model" or not (on_hub or stage or (path / ADAPTER).exists()):
        yield path, None
        return
    from chainforge.train.model_source import find_source
    from chainforge.train.saving import merge

    found = find_source(str(path)).adapter if on_hub else path
    if found is None:
        raise InputError(f"{path} is already a model of the Hub, not an adapter to merge")
    adapter = pack(found, "adapter", base=request.base)
    assert adapter.base is not None
    source = find_source(str(adapter.folder), base=adapter.base.name)
    target = None if hub_id(request.to) else check_folder(Path(request.to).expanduser()).parent
    beside = target if target and target.is_dir() else None  # on the disk where it will be
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=beside) as folder:
        merge(source, {"revision": source.revision}, Path(folder, "model"))
        yield Path(folder, "model"), adapter


def _send(package: Package, request: ExportRequest, identity: str | None) -> list[str]:
    check_secrets(package.files)
    lines = _listed(package)
    if request.dry_run:
        to = f"{identity} ({'public' if request.public else 'private'})" if identity else request.to
        card = package.files[CARD]
        assert isinstance(card, bytes)
        return [*lines, f"dry run: nothing was sent to {to}; its card:", "", card.decode()]
    if identity is None:
        folder = Path(request.to).expanduser()
        write_folder(package.files, folder)
        return [*lines, f"written: {paths.short(folder)}"]
    message = f"Add the {package.what} made by ChainForge"
    address, private = push(
        package.files, identity, package.kind, private=not request.public, message=message
    )
    return [*lines, f"uploaded: {address} ({'private' if private else 'public'})"]


def _listed(package: Package) -> list[str]:
    """Return what goes out, and what does not."""
    lines = [f"{package.what} from {paths.short(package.folder)}"]
    width = max(map(len, package.files))
    for name, content in sorted(package.files.items()):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        lines.append(f"  {name:<{width}}  {decimal(size):>10}")
    if package.left_out:
        lines.append(f"left out: {', '.join(package.left_out)}")
    if package.what == "adapter" and package.base:
        base = package.base.name
        lines.append(f"base: {base if package.base.on_hub else paths.short(base)}")
    return [*lines, *(f"note: {note}" for note in package.notes)]


def _gguf_command(package: Package) -> list[str]:
    """Return how llama.cpp's own scripts convert it to GGUF, for Ollama and LM Studio too."""
    folder = shlex.quote(paths.short(package.folder))
    if package.what == "model":
        return [
            f"as GGUF: python llama.cpp/convert_hf_to_gguf.py {folder} --outtype q8_0 (for "
            "tokenizers of published models; the quickstart's own is not supported)"
        ]
    if package.what == "adapter" and package.base:
        option = "--base-model-id" if package.base.on_hub else "--base"
        name = package.base.name
        base = shlex.quote(name if package.base.on_hub else paths.short(name))
        return [f"as GGUF: python llama.cpp/convert_lora_to_gguf.py {folder} {option} {base}"]
    return []


def _part(path: Path, what: Part | None) -> tuple[Part, Path]:
    """Return which part of a stage to export, and its folder."""
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; give a finished stage, as runs/NAME/STAGE")
    if read_manifest(path) is None:
        return _plain(path, what)
    existing = [part for part in PARTS if _is_part(path / part, part)]
    if what is None and "adapter" in existing:
        what = "adapter"
    if what is None and existing:
        raise InputError(f"{path} has no adapter/ to export; say --what {existing[0]}")
    if what is None or what not in existing:
        has = " and ".join(f"{part}/" for part in existing) or "nothing to export"
        raise InputError(f"{path} has no {what or 'adapter'}/; it has {has}")
    return what, path / what


def _plain(path: Path, what: Part | None) -> tuple[Part, Path]:
    """Return which part a folder is that is not a stage: a part of one, or somebody's model."""
    for folder in (path, *path.resolve().parents[:3]):  # as deep as checkpoints/checkpoint-9 is
        if (folder / STARTED).exists() and read_manifest(folder) is None:
            raise InputError(f"{folder}: this stage is not finished; run it first")
    for part in PARTS:
        if _is_part(path, part):
            if what not in (None, part):
                raise InputError(f"{path} is one {part}, not a stage with a {what}")
            return part, path
    inside = [
        stage.name
        for stage, _ in finished_in(path)
        if any(_is_part(stage / part, part) for part in PARTS)
    ]
    advice = f"; give one of its stages: {', '.join(inside)}" if inside else ""
    raise InputError(
        f"{path} is neither a finished stage, nor an adapter, model or data set{advice}"
    )


def _is_part(folder: Path, part: Part) -> bool:
    if part == "dataset":
        return folder.is_dir() and any(folder.glob("*.parquet"))
    return (folder / (ADAPTER if part == "adapter" else CONFIG)).is_file()


def _signed(folder: Path) -> list[Ancestor]:
    """Return the lineage of the finished stage that a folder is a part of; empty without one."""
    stages = lineage(folder.resolve().parent)
    return stages if stages and signed_outputs(stages[-1], folder) else []


def _find_base(
    folder: Path, config: Mapping[str, Any], stages: list[Ancestor], asked: str | None,
    upload: bool, online: bool, notes: list[str],
) -> Origin:  # fmt: skip
    """Return the base of the adapter in `folder`; one of the Hub if it is uploaded.

    `asked` is the user's `--base`. `online` compares its weights on the Hub with those trained on.
    """
    own = str(config.get("base_model_name_or_path") or "")
    for stage in stages:  # the run may have been moved
        place = stage.directory / Path(own).name
        if not Path(own).is_dir() and Path(own).parent.name == stage.name and place.is_dir():
            own = str(place)
    local = Path(own).is_dir() or not HUB_ID.fullmatch(own)
    if asked is None:
        if local and upload:
            raise InputError(_missing_base(folder, own))
        if local:
            notes.append(
                f"its base is a folder here, {own}; adapter_config.json says {public(own)!r}. Name "
                "it on the Hub: --base HUB_ID"
            )
        return Origin("path" if local else "hub", own)
    if Path(asked).is_dir() and not upload:
        return Origin("path", asked)
    if not HUB_ID.fullmatch(asked):
        raise InputError(f"base: expected a Hub id, as owner/name, found {asked!r}")
    if not local and asked != own:
        raise InputError(f"base: the adapter was trained on {own}, and would not fit {asked}")
    if local and online:
        if not any(Path(own).glob("*.safetensors")):
            notes.append(f"{own} is gone, so {asked} was not compared with it")
        elif name := different_weights(Path(own), asked):
            raise InputError(
                f"base: {asked} has another {name} than {own}, on which the adapter was trained; "
                "the adapter would not work on it"
            )
    return Origin("hub", asked)


def _missing_base(folder: Path, own: str) -> str:
    """Return what to do about an adapter whose base is not on the Hub."""
    exists = Path(own).is_dir()
    stage = exists and Path(own).name == "model" and read_manifest(Path(own).parent)
    source = f"{Path(own).parent} --what model" if stage else own
    advice = (
        f"the base of the adapter in {folder} is {own or 'not named'}, which "
        f"{'is not on the Hub' if exists else 'is gone from here and is no model of the Hub'}. "
        "Export the merged model instead (--what model). Or, if that base is on the Hub, name it: "
        "--base HUB_ID"
    )
    upload_it = f"; it can be uploaded first: chainforge export {source} --to owner/base"
    return advice + (upload_it if exists else "")


def _licence(folder: Path, bases: list[Origin | None], online: bool) -> dict[str, str]:
    """Return the licence in a model's own card, or in its base's, here or on the Hub."""
    from chainforge.hub.cards import head_of

    known = [base for base in bases if base is not None]
    for place in (folder, *(Path(base.name) for base in known if not base.on_hub)):
        card = place / CARD
        head, _ = head_of(card.read_text(encoding="utf-8") if card.is_file() else "")
        if licence := licence_keys(head):
            return licence
    for base in known:
        if online and base.on_hub and (licence := licence_of(base.name)):
            return licence
    return {}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
