"""Turn a name in a YAML into what it names.

A function is a built-in name, `pkg.mod:fn` or `path/file.py:fn`; a preset a name or a path.
"""

from __future__ import annotations

import contextlib
import difflib
import dis
import importlib
import importlib.util
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import chainforge
from chainforge.core.errors import InputError


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Return the word that was probably meant, or None when nothing is near."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return found[0] if found else None


def refuse_unknown(given: Iterable[Any], known: Iterable[str], where: str = "") -> None:
    """Raise `InputError` for all keys of a mapping that are not known, each with a hint."""
    known = list(known)
    odd = [f"{where}unknown key {key!r}; {hint(str(key), known)}" for key in given
           if key not in known]  # fmt: skip
    if odd:
        raise InputError("\n  ".join(odd))


def hint(word: str, words: Iterable[str]) -> str:
    """Return the end of an error message: the nearest word, or all that there are."""
    words = sorted(words)
    near = nearest(word, words)
    return f"did you mean {near!r}?" if near else f"there are: {', '.join(words)}"


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
    """Whether a statement raised an exception, not a signal that arrived at any instruction."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    if code is getattr(signal.getsignal(signal.SIGINT), "__code__", None):
        return False
    return code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def shipped(folder: str) -> Path:
    """Return a shipped folder, `recipes` or `accelerate_configs`."""
    package = Path(chainforge.__file__).resolve().parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def find_preset(reference: Any) -> Path:
    """Return the file of a preset: a shipped one's name, or a path."""
    presets = {path.stem: path for path in (shipped("recipes") / "presets").glob("*.yaml")}
    if not isinstance(reference, str):
        raise InputError(f"preset: expected one name or path, found {reference!r}")
    if reference in presets:
        return presets[reference]
    if reference.endswith((".yaml", ".yml")) and Path(reference).is_file():
        return Path(reference)
    raise InputError(
        f"preset: no {reference!r} (or give a path to a .yaml); {hint(reference, presets)}"
    )


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
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
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
        raise InputError(f"module {name!r} does not import: {where(error, None)}") from error


def where(error: BaseException, path: Path | None) -> str:
    """Return what went wrong, with the line in the user's own file where there is one."""
    line = getattr(error, "lineno", None)
    source = error.__cause__ if isinstance(error, UserCodeEnded) and error.__cause__ else error
    for frame in traceback.extract_tb(source.__traceback__):
        if path is not None and Path(frame.filename).resolve() == path.resolve():
            line = frame.lineno
    at = f"line {line}: " if line else ""
    return f"{at}{described(error)}"


def described(error: BaseException) -> str:
    """Return an exception's kind and what it says."""
    return str(error) if isinstance(error, UserCodeEnded) else f"{type(error).__name__}: {error}"
