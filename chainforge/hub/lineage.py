"""Trace what a finished stage was made from, by its manifest and those of the stages before it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chainforge.core.artifacts import Manifest, read_json, read_manifest, sha256
from chainforge.core.errors import InputError

ON_HUB = "hub:"


@dataclass(frozen=True)
class Origin:
    """Where an input came from: another stage, a model of the Hub, or a path that no stage made."""

    kind: Literal["stage", "hub", "path"]
    name: str  # of the stage, the Hub id, or the path as the settings had it
    fingerprint: str = ""

    @property
    def on_hub(self) -> bool:
        """Return whether it is on the Hub."""
        return self.kind == "hub"


@dataclass(frozen=True)
class Ancestor:
    """A finished stage, and its inputs by role (`model`, `teacher`, `data.0`)."""

    directory: Path
    manifest: Manifest
    took: dict[str, Origin] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the stage's name, which is its folder's unless two that are published share it."""
        return str(self.manifest.notes.get("name") or self.directory.name)

    @property
    def measured(self) -> dict[str, str]:
        """Return the fingerprints of the models that an evaluation measured, by their names."""
        roles = ((role.partition("."), made) for role, made in self.manifest.inputs.items())
        return {name: made for (kind, _, name), made in roles if kind == "models"}

    def setting(self, key: str, default: Any = None) -> Any:
        """Return a setting of the stage; the default where it was not given."""
        return self.manifest.given.get(key, self.manifest.config.get(key, default))

    def signed(self, name: str) -> Any:
        """Read a JSON file that the stage signed; None when it signed none of that name.

        Raises `InputError` when the file has changed since: its contents could not be trusted.
        """
        path = self.signed_file(name)
        return path and read_json(path)

    def signed_file(self, name: str) -> Path | None:
        """Return the path of a file that the stage signed; as `signed`, without reading it."""
        if name not in self.manifest.outputs:
            return None
        path = self.directory / name
        if not path.is_file() or sha256(path) != self.manifest.outputs[name]:
            raise InputError(f"{path} is not what the stage signed; run {self.name} again")
        return path


def lineage(stage: Path, *, beside_only: bool = False) -> list[Ancestor]:
    """Return a finished stage and all that it was made from, the oldest first.

    The stages before it are known by their fingerprints, wherever the run was moved to; what was
    deleted, or made again with other settings since, is left as the path that it had, and with
    `beside_only` no path is looked up. Empty for a directory that no stage signed.
    """
    found: dict[str, Ancestor] = {}
    begun: set[str] = set()

    def collect(directory: Path) -> None:
        manifest = read_manifest(directory)
        if manifest is None or manifest.fingerprint in begun:
            return
        begun.add(manifest.fingerprint)
        beside = {other.manifest.fingerprint: other for other in finished_in(directory.parent)}
        took: dict[str, Origin] = {}
        for role, print_ in manifest.inputs.items():
            if role.startswith("models."):
                continue  # an evaluation is not made from the models that it measured
            reference = _reference(role, manifest.config)
            maker = beside[print_].directory if print_ in beside else None
            if not (maker or beside_only):
                maker = _maker(reference, print_)
            if maker and maker != directory:
                collect(maker)
                took[role] = Origin("stage", maker.name, print_)
            elif print_.startswith(ON_HUB):
                took[role] = Origin("hub", print_.removeprefix(ON_HUB), print_)
            else:
                took[role] = Origin("path", reference, print_)
        found[manifest.fingerprint] = Ancestor(directory, manifest, took)

    collect(stage.resolve())
    return list(found.values())


def finished_in(folder: Path) -> Iterator[Ancestor]:
    """Yield the finished stages in a folder, which may hold other things too."""
    for path in sorted(folder.iterdir()):
        # A manifest.json of some other program, or a folder that is not ours to read.
        with contextlib.suppress(InputError, OSError):
            if manifest := read_manifest(path):
                yield Ancestor(path.resolve(), manifest)


def _maker(reference: str, fingerprint: str) -> Path | None:
    """Return the stage of another run that made an input, where its path still leads to it."""
    for directory in (Path(reference), Path(reference).parent):
        manifest = read_manifest(directory)
        if manifest is not None and manifest.fingerprint == fingerprint:
            return directory.resolve()
    return None


def _reference(role: str, config: dict[str, Any]) -> str:
    """Return what an input was called in the stage's settings."""
    kind, _, number = role.partition(".")
    if kind != "data":
        return str(config.get(f"{'teacher_' * (kind == 'teacher')}model_name_or_path", ""))
    values = config.get("data") or config.get("pool") or config.get("gate_pool") or []
    values = values if isinstance(values, list) else [values]
    return str(values[int(number)]) if int(number) < len(values) else role


def base_of(stages: Sequence[Ancestor]) -> Origin | None:
    """Return the model that the sequence of policies started from; None where there is none."""
    by_print = {stage.manifest.fingerprint: stage for stage in stages}
    origin = stages[-1].took.get("model") if stages else None
    while origin is not None and origin.fingerprint in by_print:
        origin = by_print.pop(origin.fingerprint).took.get("model")
    return origin


def roots(stages: Sequence[Ancestor]) -> list[Origin]:
    """Return the models that no stage made: what trained, wrote rows or gave its probabilities."""
    found = {
        origin.fingerprint: origin
        for stage in stages
        for role, origin in stage.took.items()
        if role in ("model", "teacher") and origin.kind != "stage"
    }
    return list(found.values())
