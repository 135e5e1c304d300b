"""Load functions of the user's own, and find the source files that they come from.

A function is named by a built-in name, `pkg.mod:fn` or `path/file.py:fn`. To find its files nothing
is imported or run. Only local files count: installed packages have a version, and a name that a
module computes before it imports it is not seen.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import chainforge
from chainforge.core.errors import InputError, hint

MODULE = re.compile(r"(?!\d)\w+(?:\.(?!\d)\w+)*", re.ASCII)
_INSTALLED = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
_INSTALLED.append(Path(chainforge.__file__).resolve().parent)


class UserCodeEnded(RuntimeError):
    """User code raised what ends a process or a coroutine, such as `SystemExit`."""


@contextlib.contextmanager
def user_code() -> Iterator[None]:
    """Make user code fail with an `Exception` only: its `sys.exit(0)` must not end a run.

    A Ctrl-C passes through. Use it around a call, never around a `yield`.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserCodeEnded(f"{type(error).__name__}: {error}".removesuffix(": ")) from error


def resolve(reference: str, builtins: Mapping[str, str | Callable[..., Any]]) -> Callable[..., Any]:
    """Return the function that `reference` names.

    `builtins` maps a short name to a function, or to a `pkg.mod:fn` that is imported only now.
    Raises `InputError` for anything that does not lead to a callable.
    """
    if not isinstance(reference, str) or not reference.strip():
        raise InputError(f"a function is named by a string, not {reference!r}")
    if reference in builtins:
        target = builtins[reference]
        return resolve(target, {}) if isinstance(target, str) else target
    place, colon, name = reference.rpartition(":")
    if not colon:
        raise InputError(
            f"no built-in function {reference!r}; {hint(reference, builtins)} "
            "Or name your own as pkg.mod:function or path/file.py:function."
        )
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise InputError(f"{name!r} is not a function of {place}; {hint(name, public)}")
    return function  # type: ignore[no-any-return]


def _load_file(path: Path) -> ModuleType:
    """Import a Python file by its path, once per process."""
    if not path.is_file():
        raise InputError(f"{path}: no such file (looked from {Path.cwd()})")
    name = f"_chainforge_file_{abs(hash(path.resolve()))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # it may import a file beside it, which hides no library
    try:
        with user_code():
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{path} does not import: {where(error, path)}") from error
    return module


def _load_module(name: str) -> ModuleType:
    """Import a module by its dotted name; the current folder counts, as with `python -m`."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        with user_code():
            return importlib.import_module(name)
    except Exception as error:
        raise InputError(f"module {name!r} does not import: {described(error)}") from error


def where(error: BaseException, path: Path | None) -> str:
    """Return what went wrong, with the line in the user's own file where there is one."""
    line = getattr(error, "lineno", None)
    source = error.__cause__ if isinstance(error, UserCodeEnded) and error.__cause__ else error
    for frame in traceback.extract_tb(source.__traceback__):
        if path is not None and Path(frame.filename).resolve() == path.resolve():
            line = frame.lineno
    return f"line {line}: {described(error)}" if line else described(error)


def described(error: BaseException) -> str:
    """Return an exception's kind and message."""
    return str(error) if isinstance(error, UserCodeEnded) else f"{type(error).__name__}: {error}"


def sources(reference: str) -> dict[str, Path]:
    """Return the local files that `file.py`, `file.py:fn` or `pkg.mod:fn` runs, by their names.

    These are its own file and the local modules that it imports, and they import; of a package all
    files count. Empty for text that names no local file.
    """
    place, colon, _ = reference.rpartition(":")
    file = Path(place if colon else reference)
    path = ["", *sys.path]
    if file.suffix == ".py":
        path.insert(0, str(file.parent))
        waiting = {file.name: file} if file.is_file() and not _installed(file) else {}
    elif colon and MODULE.fullmatch(place):
        waiting = _files_of(place.partition(".")[0], path)
    else:
        return {}
    found: dict[str, Path] = {}
    while waiting:
        name, file = waiting.popitem()
        if name not in found:
            found[name] = file
            for module in _imported(file):
                waiting |= _files_of(module, path)
    return found


def _installed(path: Path) -> bool:
    """Return whether a file is a part of an installed package, or of this one."""
    return any(map(path.resolve().is_relative_to, _INSTALLED))


def _files_of(module: str, path: list[str]) -> dict[str, Path]:
    """Return the files of a top-level module or package by their names; of a local one only."""
    for place in path:
        file, folder = Path(place, f"{module}.py"), Path(place, module)
        if file.is_file() or any(folder.glob("*.py")):
            if _installed(folder):
                return {}
            files = [file] if file.is_file() else sorted(folder.rglob("*.py"))
            return {str(one.relative_to(place)): one for one in files}
    return {}


def _imported(file: Path) -> set[str]:
    """Return the top-level names of what a file imports."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}
