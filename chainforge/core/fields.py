"""Hold a YAML value to the type of the dataclass field that it is for.

argparse looks at the words of a command line only; what a YAML says goes past it as it is.
"""

from __future__ import annotations

import enum
import types
import typing
from typing import Any

from chainforge.core.errors import InputError

WORDS = {"yes": True, "on": True, "no": False, "off": False}  # text in YAML 1.2


def truth(value: Any) -> Any:
    """Return the bool that a word such as `off` stands for; any other value as it is."""
    return WORDS.get(value.lower(), value) if isinstance(value, str) else value


def is_structured(kind: Any) -> bool:
    """True for fields that hold mappings, which argparse cannot read."""
    return (
        kind is dict
        or typing.get_origin(kind) is dict
        or any(is_structured(part) for part in typing.get_args(kind))
    )


def is_one_or_more(kind: Any) -> bool:
    """True for `str | list[str]`, of which argparse takes one word only: `report_to`, say."""
    parts = parts_of(kind)
    return str in parts and any(typing.get_origin(part) is list for part in parts)


def checked(value: Any, kind: Any, where: str) -> Any:
    """Return `value` as a `kind`; raise `InputError` when it is none.

    Text that reads as a number, and `yes` or `off` for a bool, is taken for what it says.
    """
    if kind is Any or (value is None and _allows_none(kind)):
        return value
    options = parts_of(kind)
    for option in options:
        fits, result = _fit(value, option, where)
        if fits:
            return result
    wanted = " or ".join(_name(option) for option in options if option is not type(None))
    found = f"{value!r} ({type(value).__name__})"
    raise InputError(f"{where}: expected {wanted}, found {found}")


def _fit(value: Any, kind: Any, where: str) -> tuple[bool, Any]:
    """Return whether `value` is a `kind`, and return it as one."""
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        return value in typing.get_args(kind), value
    if origin is list:
        (inner,) = typing.get_args(kind) or (Any,)
        if isinstance(value, str) and inner is str:
            value = [value]  # one of several, as on the command line
        if not isinstance(value, list):
            return False, None
        return True, [checked(item, inner, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        return isinstance(value, dict), value
    if not isinstance(origin, type) or issubclass(origin, enum.Enum):
        return isinstance(value, str), value
    if origin is bool:
        value = truth(value)
        return isinstance(value, bool), value
    if origin in (int, float):
        return _fit_number(value, origin)
    return isinstance(value, origin), value


def _fit_number(value: Any, kind: type) -> tuple[bool, Any]:
    if isinstance(value, bool):
        return False, None
    if isinstance(value, str):
        try:
            return True, kind(value)
        except ValueError:
            return False, None
    if kind is float and isinstance(value, int):
        return True, float(value)
    return isinstance(value, kind), value


def parts_of(kind: Any) -> tuple[Any, ...]:
    """Return what a union joins, or the type alone."""
    return typing.get_args(kind) if _is_union(kind) else (kind,)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _allows_none(kind: Any) -> bool:
    return kind is type(None) or (_is_union(kind) and type(None) in typing.get_args(kind))


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind)
