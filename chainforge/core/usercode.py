"""Find the source that a function of the user's own comes from: its file, and what that imports.

Nothing is imported or run. Only local files count: what is installed has a version, and what a
module imports by a name that it computes is not seen.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import chainforge
from chainforge.core.references import shipped

MODULE = re.compile(r"(?!\d)\w+(?:\.(?!\d)\w+)*", re.ASCII)
_INSTALLED = tuple(
    Path(path).resolve()
    for name, path in sysconfig.get_paths().items()
    if name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_OWN = Path(chainforge.__file__).resolve().parent


def sources(reference: str) -> dict[str, Path]:
    """Return the local files that `file.py`, `file.py:fn` or `pkg.mod:fn` runs, by module name.

    Empty for text that names no local file.
    """
    place, colon, _ = reference.rpartition(":")
    file = Path(place if colon else reference)
    if file.suffix == ".py":
        return _closure(file.stem, file, file.parent) if file.is_file() else {}
    if not colon or not MODULE.fullmatch(place):
        return {}
    found: dict[str, Path] = {}
    for name, path in _find(place, None):
        if _is_local(path):
            root = Path(os.path.abspath(path)).parents[
                name.count(".") + (path.name == "__init__.py")
            ]
            found |= _closure(name, path, root)
    return found


def own_script(script: str | Path | None) -> str | None:
    """Return a recipe's script when it is the user's own, and not one of those that are shipped."""
    if script is None or Path(script).resolve().parent == shipped("recipes"):
        return None
    return str(script)


def _closure(name: str, file: Path, root: Path) -> dict[str, Path]:
    """Return a module's file with those that it imports, and they import, by their names."""
    found: dict[str, Path] = {}
    waiting = [(name, file)]
    while waiting:
        name, file = waiting.pop()
        if name not in found and _is_local(file):
            found[name] = file
            for imported in _imported(name, file):
                waiting += _find(imported, root)
    return found


def _imported(name: str, file: Path) -> Iterator[str]:
    """Yield the names that a module imports; what it imports from may be a module or not."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module:
                yield module
            yield from (f"{module}.{alias.name}".lstrip(".") for alias in node.names)


def _find(name: str, root: Path | None) -> list[tuple[str, Path]]:
    """Return the files of a dotted name, its packages first; as Python finds it without `root`."""
    here = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    parts = name.split(".")
    for place in [str(root), os.getcwd(), *here] if root else [os.getcwd(), *sys.path]:
        folder, found = Path(place), []
        for number, part in enumerate(parts, start=1):
            package, module = folder / part / "__init__.py", folder / f"{part}.py"
            file = package if package.is_file() else module if module.is_file() else None
            if file is not None:
                found.append((".".join(parts[:number]), file))
            folder /= part
            if file == module or not folder.is_dir():
                break
        if found:
            return found
    return []


def _is_local(file: Path) -> bool:
    path = file.resolve()
    return not path.is_relative_to(_OWN) and not any(map(path.is_relative_to, _INSTALLED))
