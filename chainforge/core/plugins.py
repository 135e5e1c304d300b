"""Read entries that name functions of the user's own, load them, and find their source files.

A function is named by a built-in name, `pkg.mod:fn` or `path/file.py:fn`. To find its files nothing
is imported or run.
"""

from __future__ import annotations

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
from typing import Any, TypeVar

import msgspec

from chainforge.core.errors import InputError, hint, plain, refuse_unknown

_IMPORT = re.compile(r"^\s*(?:from|import)\s+([^#\n]+)", re.MULTILINE)


T = TypeVar("T", bound=msgspec.Struct)


def as_struct(given: Any, kind: type[T], where: str) -> T:
    """Return an entry of a configuration as a struct; a key whose value is null counts as absent.

    Raises `InputError`, beginning with `where`, for an unknown or missing key or a wrong value.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: expected a mapping, found {given!r}")
    refuse_unknown(given, kind.__struct_fields__, f"{where}: ")
    try:
        return msgspec.convert({key: one for key, one in given.items() if one is not None}, kind)
    except msgspec.ValidationError as error:
        key, what = plain(error)
        raise InputError(f"{where}{key}: {what}") from None


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
    module = load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise InputError(f"{name!r} is not a function of {place}; {hint(name, public)}")
    return function  # type: ignore[no-any-return]


def load_file(path: Path) -> ModuleType:
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
        raise InputError(f"{path} cannot be imported: {where(error, path)}") from error
    return module


def _load_module(name: str) -> ModuleType:
    """Import a module by its dotted name; the current folder counts, as with `python -m`."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        with user_code():
            return importlib.import_module(name)
    except Exception as error:
        raise InputError(f"module {name!r} cannot be imported: {described(error)}") from error


def where(error: BaseException, own: Path | Callable[..., Any]) -> str:
    """Return what went wrong, with the line in the user's own file, or in that of a function."""
    code = getattr(own, "__code__", None)
    path = Path(code.co_filename) if code else own
    line = error.lineno if isinstance(error, SyntaxError) else None
    source = error.__cause__ if isinstance(error, UserCodeEnded) and error.__cause__ else error
    for frame in traceback.extract_tb(source.__traceback__):
        if isinstance(path, Path) and Path(frame.filename).resolve() == path.resolve():
            line = frame.lineno
    place = f"{path.name}, line {line}" if code and isinstance(path, Path) else f"line {line}"
    return f"{place}: {described(error)}" if line else described(error)


def described(error: BaseException) -> str:
    """Return an exception's kind and message."""
    return str(error) if isinstance(error, UserCodeEnded) else f"{type(error).__name__}: {error}"


def sources(reference: str) -> dict[str, Path]:
    """Return the local files that `file.py`, `file.py:fn` or `pkg.mod:fn` runs, by their names.

    These are its own file, and each module, or whole package, of the same folder that they import.
    Empty for text that names no local file.
    """
    place, colon, _ = reference.rpartition(":")
    file = Path(place if colon else reference)
    folder = file.parent
    if file.suffix != ".py":
        if not re.fullmatch(r"\w+(\.\w+)*", place):
            return {}
        file, folder = Path(*place.split(".")).with_suffix(".py"), Path()
    installed = (Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "stdlib"))
    libraries = (*installed, Path(__file__).resolve().parents[1])
    found: dict[str, Path] = {}
    waiting = [file]
    while waiting:
        file = waiting.pop()
        name, there = str(file.relative_to(folder)), file.resolve()
        if name in found or not file.is_file() or any(map(there.is_relative_to, libraries)):
            continue
        found[name] = file
        for names in _IMPORT.findall(file.read_text(encoding="utf-8", errors="replace")):
            for top in re.findall(r"(?:^|,)\s*(\w+)", names.partition(" import ")[0]):
                waiting += [folder / f"{top}.py", *sorted((folder / top).rglob("*.py"))]
    return found
