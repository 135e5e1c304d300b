"""`chainforge export`: put an adapter, a model or a data set on the Hub, or into a folder."""

from __future__ import annotations

import contextlib
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from chainforge.core import paths
from chainforge.core.errors import InputError, hint
from chainforge.core.sharing import check_secrets
from chainforge.core.upload import HUB_ID, check_folder, check_id, push, token, write_folder
from chainforge.train.package import ADAPTER, CARD, Package, What, pack

ON_HUB = "hub:"
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


@dataclass(frozen=True)
class Wish:
    """What to export, where to, and how; as the command line has it."""

    path: Path
    to: str
    what: str | None = None
    base: str | None = None
    licence: str | None = None
    public: bool = False
    dry_run: bool = False


def export(wish: Wish) -> list[str]:
    """Export as wished; return what to say of it, line by line."""
    if wish.what is not None and wish.what not in get_args(What):
        raise InputError(f"what: {wish.what!r}; {hint(wish.what, get_args(What))}")
    identity = hub_id(wish.to)
    title = identity or Path(wish.to).expanduser().name
    online = identity is not None and not wish.dry_run
    if online:
        token()  # before gigabytes are read for nothing
    with _merged(wish) as (path, adapter):
        package = pack(
            path,
            wish.what,  # type: ignore[arg-type]
            title=title,
            base=None if adapter else wish.base,
            licence={"license": wish.licence} if wish.licence else None,
            upload=identity is not None,
            online=online,
            made_from=adapter,
        )
        if adapter:  # else the messages would name a folder that is about to go
            package = replace(package, folder=adapter.folder if identity else Path(wish.to))
        lines = _send(package, wish, identity)
    return lines if adapter and identity else [*lines, *_for_llama_cpp(package)]


@contextlib.contextmanager
def _merged(wish: Wish) -> Iterator[tuple[Path, Package | None]]:
    """Give the path to export; where a model is wanted of an adapter, merge it on the way."""
    path = wish.path
    on_hub = not path.exists() and HUB_ID.fullmatch(str(path))
    stage = (path / "adapter" / ADAPTER).exists() and not (path / "model").exists()
    if wish.what != "model" or not (on_hub or stage or (path / ADAPTER).exists()):
        yield path, None
        return
    from chainforge.train.saving import merge
    from chainforge.train.sources import find_source

    found = find_source(str(path)).adapter if on_hub else path
    if found is None:
        raise InputError(f"{path} is a model of the Hub already, and no adapter to be merged")
    adapter = pack(found, "adapter", base=wish.base)
    assert adapter.base is not None
    source = find_source(str(adapter.folder), base=adapter.base.name)
    target = None if hub_id(wish.to) else check_folder(Path(wish.to).expanduser()).parent
    beside = target if target and target.is_dir() else None  # on the disk where it will be
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=beside) as folder:
        merge(source, {"revision": source.revision}, Path(folder, "model"))
        yield Path(folder, "model"), adapter


def _send(package: Package, wish: Wish, identity: str | None) -> list[str]:
    check_secrets(package.files)
    lines = _listed(package)
    if wish.dry_run:
        to = f"{identity} ({_seen(wish.public)})" if identity else wish.to
        card = package.files[CARD]
        assert isinstance(card, bytes)
        return [*lines, f"dry run: nothing went to {to}; its card would be", "", card.decode()]
    if identity is None:
        folder = Path(wish.to).expanduser()
        write_folder(package.files, folder)
        lines.append(f"written: {paths.short(folder)}")
    else:
        message = f"Add the {package.what} that ChainForge made"
        done = push(package.files, identity, package.kind, private=not wish.public, message=message)
        lines.append(f"uploaded: {done.address} ({_seen(not done.private)})")
    return lines


def hub_id(to: str) -> str | None:
    """Return the repository that `--to` names; None for a folder.

    `owner/name` is a repository, and what begins with a dot, a slash or `~` a folder. Where a
    folder `owner` is here, either may be meant, and nothing is uploaded by mistake.
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


def _seen(public: bool) -> str:
    return "public" if public else "private"


def _listed(package: Package) -> list[str]:
    """Return what goes out, and what does not."""
    lines = [f"{package.what} from {paths.short(package.folder)}"]
    width = max(map(len, package.files))
    for name, content in sorted(package.files.items()):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        lines.append(f"  {name:<{width}}  {_size(size):>9}")
    if package.left_out:
        lines.append(f"left out: {', '.join(package.left_out)}")
    if package.what == "adapter" and package.base:
        base = package.base.name
        lines.append(f"goes on: {base if package.base.on_hub else paths.short(base)}")
    return [*lines, *(f"note: {note}" for note in package.notes)]


def _size(size: int) -> str:
    for unit, factor in UNITS:
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def _for_llama_cpp(package: Package) -> list[str]:
    """Return how llama.cpp's own scripts turn it into GGUF, which Ollama and LM Studio read too."""
    folder = shlex.quote(paths.short(package.folder))
    if package.what == "model":
        return [
            f"as GGUF: python llama.cpp/convert_hf_to_gguf.py {folder} --outtype q8_0 (it takes "
            "the tokenizers of published models; the quickstart's own is no pre-tokenizer it knows)"
        ]
    if package.what == "adapter" and package.base:
        option = "--base-model-id" if package.base.on_hub else "--base"
        name = package.base.name
        base = shlex.quote(name if package.base.on_hub else paths.short(name))
        return [f"as GGUF: python llama.cpp/convert_lora_to_gguf.py {folder} {option} {base}"]
    return []
