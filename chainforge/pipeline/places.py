"""Find what a chain names: chain files, recipe scripts, launch files and models.

Everything that ChainForge ships lies in two folders, `recipes/` and `accelerate_configs/`: beside
the package in a checkout, inside it once installed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from chainforge.core.errors import InputError
from chainforge.core.references import hint, shipped

NO_LAUNCHER = "none"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def short(path: str | Path) -> str:
    """Return a path as one would type it here: relative when it lies below the current folder."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


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
    """Return a model's directory, looked up from the chain file and from here, or its Hub id."""
    found = _look(name, folder)
    if found is not None:
        if not any((found / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise InputError(f"{found} is not a model directory: it has no config.json")
        return str(found)
    if _HUB_ID.fullmatch(name):
        return name
    raise InputError(
        f"{name!r} is neither a folder (looked in {short(folder)} and {Path.cwd()}) "
        "nor a Hub id such as Qwen/Qwen2.5-0.5B"
    )


def data_path(name: str, folder: Path) -> Path:
    """Return a data file or folder that no stage of the chain made."""
    return _existing(name, folder, "data")


def _existing(name: str, folder: Path, what: str) -> Path:
    found = _look(name, folder)
    if found is None:
        raise InputError(f"no {what} {name!r}: looked in {short(folder)} and in {Path.cwd()}")
    return found


def _look(name: str, folder: Path) -> Path | None:
    """Look for a path from the chain's folder, from here, then from where `recipes/` lies."""
    for root in (folder, Path.cwd(), shipped("recipes").parent):
        if (root / name).exists():
            return root / name
    return None
