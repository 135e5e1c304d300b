"""Read a recipe's configuration: flat YAML in TRL's own names, overridden by the command line.

`parse` takes what TrlParser takes, strictly: a misspelt key, a wrong type and an abbreviation are
errors that name the key and what to write instead. `preset: NAME` puts a file of settings below the
recipe's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.options import checked, is_structured, out_of_range, parts_of, unknown
from chainforge.core.paths import anchored, find_preset
from chainforge.core.secrets import check_settings
from chainforge.core.yaml12 import read_yaml, yaml_value

Flags = list[tuple[str, list[str]]]  # options' names, and the words after each
Fields = dict[str, tuple[Any, Any]]  # each that can be given, and its type
Layers = list[tuple[str, dict[str, Any]]]  # files of settings, each with what it says
ON_CPU = " Several processes on a CPU count only with `use_cpu: true`."


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a YAML of settings; its paths become relative to the current folder."""
    settings = read_yaml(path)
    check_settings(settings, str(path))
    try:
        return anchored(settings, Path(path).parent)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def given(argv: Sequence[str]) -> dict[str, Any]:
    """Return the settings as given: preset, the YAML of `--config`, the command line over both.

    Values of the command line are read as YAML; `--flag` alone is True and `--key a b` a list.
    """
    layers, flags = _layers(argv)
    settings: dict[str, Any] = {}
    for _, layer in layers:
        settings |= layer
    for name, words in flags:
        values = [_word(word) for word in words]
        if name.startswith("no_") and not words:
            settings[name.removeprefix("no_")] = False
        else:
            settings[name] = True if not values else values[0] if len(values) == 1 else values
    return settings


def parse(*kinds: Any, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse YAML and command line into one instance of each dataclass.

    Raises `InputError` naming the keys, where they were given, and which values are possible.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        from trl.scripts.utils import TrlParser

        TrlParser(kinds).parse_args(["--help"])
    values = _checked(kinds, words)
    try:
        return tuple(
            kind(**{name: values[name] for name in _fields([kind]) if name in values})
            for kind in kinds
        )
    except InputError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:
        source = _layers(words)[0][-1][0]
        raise InputError(f"{source}: {error}{_advice(str(error))}") from error


def resolved(*configs: Any) -> dict[str, Any]:
    """Return what differs from each dataclass's defaults, secrets left out, ready for YAML."""
    values: dict[str, Any] = {}
    for config in configs:
        for item in dataclasses.fields(config):
            value = getattr(config, item.name, None)
            secret = item.name.endswith(("_token", "_key"))
            if item.init and not secret and value != _default(item):
                values[item.name] = _plain(value)
    return values


def _checked(kinds: Iterable[Any], argv: Sequence[str]) -> dict[str, Any]:
    """Return the checked values of a YAML and a command line; report all problems at once."""
    fields = _fields(kinds)
    layers, flags = _layers(argv)
    values: dict[str, Any] = {}
    problems: list[str] = []
    for file, layer in layers:
        for key, value in layer.items():
            with _noting(problems):
                if key not in fields:
                    raise InputError(f"{file}: {unknown(f'key {key!r}', key, fields)}")
                values[key] = _value(key, value, f"{file}: {key}", fields)
    for name, words in flags:
        with _noting(problems):
            key, value = _of_flag(name, words, fields)
            values[key] = _value(key, value, f"--{name}", fields)
    problems += [
        f"{name} is required: give it in the YAML, or as --{name}"
        for name, (item, _) in fields.items()
        if name not in values and _default(item) is dataclasses.MISSING
    ]
    if problems:
        raise InputError("\n  ".join(problems))
    return values


@contextlib.contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        problems.append(str(error))


def _value(key: str, value: Any, where: str, fields: Fields) -> Any:
    """Return the value of a key as its type; raise `InputError` for one that is not possible."""
    item, kind = fields[key]
    if key == "report_to":  # transformers takes "no tracker" as one word
        names = value if isinstance(value, list) else [value]
        value = [n for n in names if n not in (None, "none", "None", "null")] or "none"
    found = checked(value, kind, where)
    choices = [str(choice) for choice in item.metadata.get("choices") or ()]
    if choices and found is not None and found not in choices:
        raise InputError(f"{where}: expected one of {', '.join(choices)}, found {value!r}")
    if wrong := out_of_range(key, found, fields):
        raise InputError(f"{where}: {wrong}")
    return found


def _of_flag(name: str, words: list[str], fields: Fields) -> tuple[str, Any]:
    """Return the key and the value that an option and its words on the command line mean."""
    key = name.removeprefix("no_")
    if name not in fields:
        if key == name or key not in fields or bool not in parts_of(fields[key][1]):
            raise InputError(unknown(f"option --{name}", name, fields))
        if words:
            raise InputError(f"--{name} takes no value; or write --{key} true")
        return key, False
    item, kind = fields[name]
    parts = parts_of(kind)
    if not words:
        return name, True if bool in parts else item.metadata.get("const")
    if not is_structured(kind):
        several = str not in parts and any(typing.get_origin(part) is list for part in parts)
        return name, words[0] if len(words) == 1 and not several else words
    values = [_word(word) for word in words]
    return name, values[0] if len(values) == 1 and not isinstance(values[0], str) else values


def _fields(kinds: Iterable[Any]) -> Fields:
    """Return every field that can be given, with its type."""
    found: Fields = {}
    for kind in kinds:
        types = typing.get_type_hints(kind)
        found |= {
            item.name: (item, types[item.name]) for item in dataclasses.fields(kind) if item.init
        }
    return found


def _default(item: Any) -> Any:
    made = item.default_factory is not dataclasses.MISSING
    return item.default_factory() if made else item.default


def _advice(message: str) -> str:
    """Return what to change, where a library's own message does not say it."""
    if "divisible by num_generations" in message or "divisible by the global batch" in message:
        return (
            " A step draws per_device_train_batch_size x processes x gradient_accumulation_steps "
            "completions; make that a multiple of num_generations."
            + (ON_CPU if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "")
        )
    if "gpu" in message.lower() and "use_cpu" in message:
        return " On a machine without a GPU add `use_cpu: true`."
    return ""


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _layers(argv: Sequence[str]) -> tuple[Layers, Flags]:
    """Return the settings of the preset, if any, and of the YAML; and the flags over both."""
    flags: Flags = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else []))
        elif not flags:
            raise InputError(f"unexpected {word!r}; settings are given as --key value")
        else:
            flags[-1][1].append(word)
    files = [words for name, words in flags if name == "config"]
    if len(files) > 1 or any(len(words) != 1 for words in files):
        raise InputError("--config takes one YAML file, once")
    source = files[0][0] if files else "command line"
    own = read_settings(source) if files else {}
    chosen = own.pop("preset", None)
    layers = [(source, own)]
    for name, words in flags:
        if name == "preset":
            chosen = words[0] if len(words) == 1 else words
        else:
            check_settings({name: [_word(word) for word in words]}, "command line")
            check_settings({name: " ".join(words)}, "command line")
    if chosen is not None:
        path = find_preset(chosen)
        layers.insert(0, (str(path), read_settings(path)))
    return layers, [flag for flag in flags if flag[0] not in ("config", "preset")]


def _word(word: str) -> Any:
    """Read one word of the command line as YAML; text that is not YAML stays text."""
    try:
        return yaml_value(word)
    except InputError:
        return word
