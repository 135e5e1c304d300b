"""Find what a chain names: chain files, recipe scripts, launch files and models.

Everything that ChainForge ships lies in two folders, `recipes/` and `accelerate_configs/`: beside
the package in a checkout, inside it once installed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from chainforge.core.errors import InputError
from chainforge.core.paths import short as short
from chainforge.core.references import hint, shipped

NO_LAUNCHER = "none"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_chain(reference: str | Path) -> Path:
    """Return the chain file for a path, a folder with a `chain.yaml`, or a recipe folder's name."""
    path = Path(reference)
    for candidate in (path, path / "chain.yaml"):
        if candidate.is_file():
            return candidate
    recipes = shipped("recipes")
    names = [file.parent.name for file in sorted(recipes.glob("*/chain.yaml"))]
    if str(reference) in names:
        return recipes / str(reference) / "chain.yaml"
    known = f", or a recipe folder's name: {hint(str(reference), names)}" if names else ""
    raise InputError(f"{reference}: no such chain; give the path of a chain.yaml{known}")


def recipe_script(recipe: str, folder: Path) -> Path:
    """Return the script of a built-in recipe, or the user's own `.py` file."""
    if not recipe.endswith(".py"):
        return shipped("recipes") / f"{recipe}.py"
    return _existing(recipe, folder, "recipe")


def launch_file(name: str, folder: Path) -> Path | None:
    """Return the accelerate configuration that `launch:` names; None for `none` (plain python)."""
    if name == NO_LAUNCHER:
        return None
    configs = shipped("accelerate_configs")
    if (configs / f"{name}.yaml").is_file():
        return configs / f"{name}.yaml"
    if name.endswith((".yaml", ".yml", ".json")):
        return _existing(name, folder, "launch file")
    names = [file.stem for file in configs.glob("*.yaml")] + [NO_LAUNCHER]
    raise InputError(f"no launch file {name!r} (or give a path to a .yaml): {hint(name, names)}")


def model_path(name: str, folder: Path) -> str:
    """Return a model's directory, looked up from the chain file, or its Hub id."""
    found = _beside(name, folder)
    if found.exists():
        if not any((found / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise InputError(f"{found} is not a model directory: it has no config.json")
        return str(found)
    if _HUB_ID.fullmatch(name) and not os.path.exists(name):
        return name
    raise InputError(
        f"{name!r} is neither a folder in {short(folder)}{_meant(name, folder)} "
        "nor a Hub id such as Qwen/Qwen2.5-0.5B"
    )


def data_path(name: str, folder: Path) -> Path:
    """Return a data file or folder that no stage of the chain made."""
    return _existing(name, folder, "data")


def _existing(name: str, folder: Path, what: str) -> Path:
    found = _beside(name, folder)
    if not found.exists():
        raise InputError(f"no {what} {name!r} in {short(folder)}{_meant(name, folder)}")
    return found


def _beside(name: str, folder: Path) -> Path:
    """Return where a path leads from the chain's folder."""
    return Path(os.path.abspath(folder / os.path.expanduser(name)))


def _meant(name: str, folder: Path) -> str:
    """Return what to write for a path that is relative to the current folder."""
    if not os.path.exists(name):
        return ""
    return f" (paths are relative to the file: write {os.path.relpath(name, folder)!r})"
