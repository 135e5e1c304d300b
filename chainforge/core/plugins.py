"""Load functions of the user's own, and find the source files that they come from.

A function is named by a built-in name, `pkg.mod:fn` or `path/file.py:fn`. To find its files nothing
is imported or run. Only local files count: installed packages have a version, and a name that a
module computes before it imports it is not seen.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import importlib
import importlib.util
import os
import re
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import chainforge
from chainforge.core.errors import InputError, hint
from chainforge.core.paths import shipped

MODULE = re.compile(r"(?!\d)\w+(?:\.(?!\d)\w+)*", re.ASCII)
_INSTALLED = [Path(sysconfig.get_path(name)).resolve()
              for name in ("stdlib", "platstdlib", "purelib", "platlib")]  # fmt: skip
_OWN = Path(chainforge.__file__).resolve().parent


class UserCodeEnded(RuntimeError):
    """User code raised what ends a process or a coroutine, such as `SystemExit`."""


@contextlib.contextmanager
def user_code() -> Iterator[None]:
    """Make user code fail with an `Exception` only: its `sys.exit(0)` must not end a run.

    A Ctrl-C that arrives meanwhile passes through. Use it around a call, never around a `yield`.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not _in_raise_statement(error):
            raise
        raise UserCodeEnded(f"{type(error).__name__}: {error}".removesuffix(": ")) from error


def _in_raise_statement(error: BaseException) -> bool:
    """Return whether a statement raised an exception, not a signal at any instruction."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    if code is getattr(signal.getsignal(signal.SIGINT), "__code__", None):
        return False
    return code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


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
    if function is None:
        public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise InputError(f"{place} has no {name!r}; {hint(name, public)}")
    if not callable(function):
        raise InputError(f"{reference} is a {type(function).__name__}, not a function")
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


def own_script(script: str | Path | None) -> bool:
    """Return whether a recipe's script is the user's own, not one of those that are shipped."""
    return script is not None and Path(script).resolve().parent != shipped("recipes")


def sources(reference: str | Path | None) -> dict[str, Path]:
    """Return the local files that `file.py`, `file.py:fn` or `pkg.mod:fn` runs, by their names.

    These are its own file, and those of the local modules that it imports, and they import; of a
    package all files count. Empty for text that names no local file.
    """
    place, colon, _ = str(reference).rpartition(":")
    file = Path(place if colon else str(reference))
    path = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path]
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
    return any(map(path.resolve().is_relative_to, [_OWN, *_INSTALLED]))


def _files_of(module: str, path: list[str]) -> dict[str, Path]:
    """Return the files of a top-level module or package by their names; of a local one only."""
    for place in path:
        file, folder = Path(place, f"{module}.py"), Path(place, module)
        found = file if file.is_file() else folder
        if found.exists() and _installed(found):
            return {}
        inside = folder.rglob("*.py") if (folder / "__init__.py").exists() else folder.glob("*.py")
        if files := [file] if file.is_file() else sorted(inside):
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
