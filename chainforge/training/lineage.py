"""Read what a finished stage was made from: its manifest, and those of the stages before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from chainforge.core.artifacts import Manifest, read_json, read_manifest
from chainforge.core.upload import HUB_ID
from chainforge.data.hub import PRESETS

ON_HUB = "hub:"


@dataclass(frozen=True)
class Ancestor:
    """A finished stage, and what it took: the name of a stage, a Hub id, or a path, by role."""

    directory: Path
    manifest: Manifest
    took: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The stage's name, which is its folder's."""
        return self.directory.name

    def setting(self, key: str, default: Any = None) -> Any:
        """Return a setting of the stage; the default where it was not given."""
        return self.manifest.given.get(key, self.manifest.config.get(key, default))

    def funnel(self) -> dict[str, Any] | None:
        """Return where the rows of a data stage went."""
        path = self.directory / "funnel.json"
        return dict(read_json(path)) if path.is_file() else None


def lineage(stage: Path) -> list[Ancestor]:
    """Return a finished stage and all that it was made from, the oldest first.

    The stages before it are known by their fingerprints, wherever the run was moved to. Empty for
    a directory that no stage signed.
    """
    found: dict[str, Ancestor] = {}
    _collect(stage.resolve(), found)
    return list(found.values())


def _collect(directory: Path, found: dict[str, Ancestor]) -> None:
    manifest = read_manifest(directory)
    if manifest is None:
        return
    prints = {other.fingerprint: path for path, other in _beside(directory)}
    took: dict[str, str] = {}
    for role, fingerprint in manifest.inputs.items():
        if role.startswith("models."):
            continue  # what an evaluation measured made nothing
        reference = _reference(role, manifest.config)
        before = prints.get(fingerprint) or _signed(reference, fingerprint)
        if before is not None and before != directory:
            if fingerprint not in found:
                _collect(before, found)
            took[role] = before.name
        elif fingerprint.startswith(ON_HUB):
            took[role] = fingerprint.removeprefix(ON_HUB)
        else:
            took[role] = reference
    found[manifest.fingerprint] = Ancestor(directory, manifest, took)


def _beside(directory: Path) -> Iterator[tuple[Path, Manifest]]:
    for path in sorted(directory.parent.iterdir()):
        if path.is_dir() and (manifest := read_manifest(path)) is not None:
            yield path.resolve(), manifest


def _signed(reference: str, fingerprint: str) -> Path | None:
    """Return the stage, of another run, that a path leads to or into."""
    path = Path(reference)
    for directory in (path, path.parent):
        manifest = read_manifest(directory)
        if manifest is not None and manifest.fingerprint == fingerprint:
            return directory.resolve()
    return None


def _reference(role: str, config: Mapping[str, Any]) -> str:
    """Return what an input was called in the stage's settings."""
    kind, _, number = role.partition(".")
    if kind == "model":
        return str(config.get("model_name_or_path", ""))
    if kind == "teacher":
        return str(config.get("teacher_model_name_or_path", ""))
    for key in ("data", "pool", "gate_pool"):
        value = config.get(key)
        values = value if isinstance(value, list) else [value] if value else []
        if number.isdigit() and int(number) < len(values):
            return str(values[int(number)])
    return role


def base_of(stages: list[Ancestor]) -> str | None:
    """Return the model that the chain of models began with, a Hub id or a path."""
    by_name = {stage.name: stage for stage in stages}
    name = stages[-1].name if stages else None
    while name in by_name:
        name = by_name.pop(name).took.get("model")
    return name


def results_of(stage: Ancestor) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Yield what evaluations beside a stage measured of it: their name, its row, its pairs.

    Only of this very model: a stage that was made anew since has another fingerprint.
    """
    for directory, manifest in _beside(stage.directory):
        path = directory / "results.json"
        measured = manifest.inputs.get(f"models.{stage.name}") == stage.manifest.fingerprint
        if measured and path.is_file():
            results = read_json(path)
            rows = [row for row in results["models"] if row["name"] == stage.name]
            pairs = [row for row in results["pairs"] if stage.name in (row["from"], row["to"])]
            if rows:
                yield directory.name, rows[0], pairs


def data_sets(stages: list[Ancestor]) -> list[str]:
    """Return the data sets of the Hub that questions came from, of which rows were trained on."""
    found: list[str] = []
    for task in _tasks(stages):
        params = task.get("params") or {}
        if task.get("fn") == "hub" and isinstance(params, dict):
            name = str(params.get("dataset") or params.get("preset") or "")
            found.append(str(PRESETS.get(name, {}).get("dataset", name)))
    return sorted({name for name in found if HUB_ID.fullmatch(name)})


def _tasks(stages: list[Ancestor]) -> Iterator[dict[str, Any]]:
    for stage in stages:
        if stage.manifest.recipe != "evaluate":
            yield from (task for task in stage.setting("tasks") or () if isinstance(task, dict))


def teachers(stages: list[Ancestor]) -> list[tuple[str, str, str]]:
    """Return who wrote the traces: kind of teacher, its model, and its server, each once."""
    found = []
    for stage in stages:
        if stage.manifest.recipe == "collect":
            kind = str(stage.setting("teacher", "offline"))
            address = str(stage.setting("base_url") or "")
            host = urlsplit(address).hostname or address
            found.append((kind, str(stage.setting("model") or ""), host))
    return list(dict.fromkeys(found))
