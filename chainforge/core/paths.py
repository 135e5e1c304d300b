"""Find the files that settings name.

One rule: a path in a YAML is relative to the YAML's folder, one in a command to the current folder.
A value of a YAML is a path when it reads `./…`, `../…`, `~/…` or `file.py:function`, or when it has
a slash or a suffix and its folder holds such a file. A bare name, such as `train` or `modern`, is a
path only under the keys of `ALWAYS` and `OR_HUB`. All else, such as a Hub id, stays as it is.

Everything that ChainForge ships is in two folders, `recipes/` and `accelerate_configs/`: beside the
package in a checkout, inside it once installed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import chainforge
from chainforge.core.errors import InputError, hint

ALWAYS = ("output_dir", "data", "pool", "gate_pool", "prices")
OR_HUB = ("model_name_or_path", "teacher_model_name_or_path", "models", "chat_template_path",
          "resume_from_checkpoint", "path")  # fmt: skip
INNER = {"path": "path", "model": "model_name_or_path"}  # of a task, and of a reward
FILES = (".jsonl", ".json", ".yaml", ".yml", ".jinja", ".parquet", ".csv", ".txt", ".py")

# Takes the key, a text that may be a path, and whether it can be nothing else.
Change = Callable[[str, str, bool], str]


def short(path: str | Path) -> str:
    """Return a path for display: relative when it is below the current folder, else absolute."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def anchored(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings of a YAML in `folder` with paths that hold in the current folder."""

    def typed(key: str, path: str, certain: bool) -> str:
        there = beside(path, folder)
        if os.path.isabs(path) or not (certain or there.exists()):
            return path
        away = short(there)
        # A missing path without a dot would be taken for the id of a model of the Hub.
        model = key in OR_HUB and not there.exists() and not path.endswith(FILES)
        return f"./{away}" if model and not os.path.isabs(away) else away

    return {key: _map(value, str(key), typed) for key, value in settings.items()}


def written_for(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return settings as a YAML in `folder` has them: the inverse of `anchored`."""

    def seen(key: str, path: str, certain: bool) -> str:
        if os.path.isabs(path) or not (certain or os.path.exists(path)):
            return path
        away = os.path.relpath(path, folder)
        return away if away.startswith(".") or "/" in away else f"./{away}"

    return {key: _map(value, str(key), seen) for key, value in settings.items()}


def unplaced(value: Any) -> Any:
    """Return settings with each existing path cut to its last part, wherever the file is."""
    return _map(value, "", lambda _, path, __: Path(path).name if os.path.exists(path) else path)


def paths_in(value: Any) -> list[Path]:
    """Return the files and folders that settings name, in order."""
    found: list[str] = []
    _map(value, "", lambda _, path, __: found.append(path) or path)  # type: ignore[func-returns-value]
    return [Path(path) for path in found if os.path.exists(path)]


def _map(value: Any, key: str, change: Change) -> Any:
    """Return a value with `change` applied to every text in it that may be a path."""
    if isinstance(value, Mapping):  # of the names inside a setting only these count
        return {k: _map(item, INNER.get(str(k), ""), change) for k, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map(item, key, change) for item in value]
    if not isinstance(value, str) or len(value) > 1024 or "\n" in value or "://" in value:
        return value
    name, path, tail = re.fullmatch(r"([^=/]+=)?(.*?)((?<=\.py):\w+)?", value).groups()  # type: ignore[union-attr]
    if name and key != "models":
        name, path = None, f"{name}{path}"
    certain = bool(tail) or path.startswith(("./", "../", "~/")) or (path != "" and key in ALWAYS)
    certain = certain or (key == "path" and path.endswith(FILES))
    named = any(map(str.isalnum, path))  # a lone `/` may mean division
    if not certain and not (named and (key in OR_HUB or "/" in path or Path(path).suffix)):
        return value
    return f"{name or ''}{change(key, path, certain)}{tail or ''}"


def shipped(folder: str) -> Path:
    """Return a shipped folder, `recipes` or `accelerate_configs`."""
    package = Path(chainforge.__file__).resolve().parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def find_preset(reference: Any) -> Path:
    """Return the file of a preset: a shipped one's name, or a path."""
    presets = {path.stem: path for path in (shipped("recipes") / "presets").glob("*.yaml")}
    name = str(reference)
    if name in presets:
        return presets[name]
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    if name.endswith((".yaml", ".yml")):
        raise InputError(f"preset: {name}: no such file (looked from {Path.cwd()})")
    raise InputError(f"preset: no {name!r} (or give a path to a .yaml); {hint(name, presets)}")


def beside(name: str, folder: Path) -> Path:
    """Return the absolute path that `name` means in a folder."""
    return Path(os.path.abspath(folder / os.path.expanduser(name)))
