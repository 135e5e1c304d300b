"""Read a recipe's configuration: flat YAML in TRL's own names, overridden by the command line.

`parse` is TrlParser made strict. TrlParser takes YAML values as they are and argparse takes
prefixes as names; here a misspelt key, a wrong type and an abbreviation are errors that name the
key and what to write instead. `preset: NAME` puts a file of settings below the recipe's own.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import sys
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from chainforge.core.errors import InputError
from chainforge.core.options import (
    checked,
    is_one_or_more,
    is_structured,
    parts_of,
    unknown,
    wrong_number,
    wrong_word,
)
from chainforge.core.paths import anchored, find_preset
from chainforge.core.secrets import check_settings
from chainforge.core.yaml12 import read_yaml, yaml_value

Flag = tuple[str, list[str]]  # an option's name, and the words after it
ON_CPU = " Several processes on a CPU count only with `use_cpu: true`."


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a YAML of settings, with its paths as one would type them in the current folder."""
    settings = read_yaml(path)
    check_settings(settings, str(path))
    try:
        return anchored(settings, Path(path).parent)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def given(argv: Sequence[str]) -> dict[str, Any]:
    """Return the settings as given: preset, the YAML of `--config`, the command line over both.

    Values of the command line are read as YAML; `--flag` alone is True and `--key a b` a list. What
    a preset says stands in for its name.
    """
    config, flags = _split(argv)
    layers, flags = _layers(config, flags)
    settings: dict[str, Any] = {}
    for _, layer in layers:
        settings |= layer
    for name, words in flags:
        values = [_word(word) for word in words]
        if name.startswith("no_") and not words:
            settings[name.removeprefix("no_")] = False
            continue
        settings[name] = True if not values else values[0] if len(values) == 1 else values
    return settings


def parse(*kinds: Any, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse YAML and command line into one instance of each dataclass.

    Raises `InputError` naming the key, where it was given, and what may stand there.
    """
    parser, words, source = _parser(kinds, list(sys.argv[1:] if argv is None else argv))
    try:
        parsed = parser.parse_args_into_dataclasses(args=words, look_for_args_file=False)
    except InputError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise InputError(f"{source}: {error}{_advice(str(error))}") from error
    return tuple(parsed)


def values_of(*kinds: Any, argv: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """Return what `parse` would build each dataclass from, as strictly read, and build none.

    To build one of TRL's asks for the processes and the GPUs that the stage will run on.
    """
    parser, words, _ = _parser(kinds, list(argv))
    values = vars(parser.parse_known_args(words)[0])
    return tuple(
        {item.name: values[item.name] for item in dataclasses.fields(kind) if item.init}
        for kind in kinds
    )


def _parser(kinds: Sequence[Any], argv: list[str]) -> tuple[Any, list[str], str]:
    """Return a parser that holds preset and YAML, the words left for it, and the file's name.

    What is wrong with several keys is said at once.
    """
    config, flags = _split(argv)
    source = config or "command line"
    hints = _hints(kinds)
    layers, flags = _layers(config, flags)
    values, words, problems = _read(layers, flags, hints)
    if problems:
        raise InputError("\n  ".join(problems))
    parser = _strict_parser(kinds, source)
    _check_choices(parser, values, source)
    parser.set_defaults_with_config(**values)
    typed = {name for name, _ in flags}
    for key, value in vars(parser.parse_known_args(words)[0]).items():
        wrong = wrong_number(key, value, training="learning_rate" in hints)
        if wrong := wrong or wrong_word(key, value, hints):
            problems.append(f"{'--' if key in typed else f'{source}: '}{key}: {wrong}")
    if problems:
        raise InputError("\n  ".join(problems))
    return parser, words, source


def _strict_parser(kinds: Sequence[Any], source: str) -> Any:
    from trl.scripts.utils import TrlParser

    class Parser(TrlParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{source}: {message}")

    return Parser(kinds, allow_abbrev=False)


def _read(
    layers: list[tuple[str, dict[str, Any]]], flags: list[Flag], hints: dict[str, Any]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the checked values, the words that are left to argparse, and what is wrong."""
    values: dict[str, Any] = {}
    words: list[str] = []
    problems: list[str] = []
    for file, layer in layers:
        for key, value in layer.items():
            if key not in hints:
                problems.append(f"{file}: {unknown(f'key {key!r}', key, hints)}")
                continue
            value = _trackers(key, value)
            try:
                values[key] = checked(value, hints[key], f"{file}: {key}")
            except InputError as error:
                problems.append(str(error))
    for name, given_words in flags:
        given_words = ["none"] if (kept := _trackers(name, given_words)) == "none" else kept
        try:
            value = _of_flag(name, given_words, hints)
        except InputError as error:
            problems.append(str(error))
            continue
        if value is None:
            words += [f"--{name}", *given_words]
        else:
            values[name.removeprefix("no_") if value is False else name] = value
    return values, words, problems


def _trackers(key: str, value: Any) -> Any:
    """Return the value of `report_to` as transformers takes it: no tracker is `none`, and alone."""
    if key != "report_to" or value == []:
        return value
    names = value if isinstance(value, list) else [value]
    named = [name for name in names if name not in (None, "none", "None", "null")]
    return (named if isinstance(value, list) else value) if named else "none"


def _of_flag(name: str, words: list[str], hints: dict[str, Any]) -> Any:
    """Return an option's value where argparse cannot read it, else None."""
    kind = hints.get(name)
    positive = name.removeprefix("no_")
    if name not in hints and name != "help":
        if positive == name or bool not in parts_of(hints.get(positive)):
            raise InputError(unknown(f"option --{name}", name, hints))
        if words:
            raise InputError(f"--{name} takes no value; or write --{positive} true")
        return False
    if is_structured(kind) and words:
        value = [_word(word) for word in words]
        one = value[0] if len(value) == 1 and not isinstance(value[0], str) else value
        return checked(one, kind, f"--{name}")
    if len(words) > 1 and is_one_or_more(kind):
        return checked(words, kind, f"--{name}")
    return None


def resolved(*configs: Any) -> dict[str, Any]:
    """Return what differs from each dataclass's defaults, secrets left out, ready for YAML."""
    values: dict[str, Any] = {}
    for config in configs:
        for item in dataclasses.fields(config):
            value = getattr(config, item.name, None)
            default = item.default
            if item.default_factory is not dataclasses.MISSING:
                default = item.default_factory()
            if value != default and not item.name.endswith(("_token", "_key")) and item.init:
                values[item.name] = _plain(value)
    return values


def _advice(message: str) -> str:
    """Return what to change where a library's own words stop at what is wrong."""
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


def _split(argv: Sequence[str]) -> tuple[str | None, list[Flag]]:
    """Split a command line into the config file and `(name, words)` of each other flag."""
    config: str | None = None
    flags: list[Flag] = []
    for word in argv:
        word = "--help" if word == "-h" else word
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else []))
        elif not flags:
            raise InputError(f"unexpected {word!r}; settings are given as --key value")
        else:
            flags[-1][1].append(word)
    others = []
    for name, words in flags:
        if name != "config":
            others.append((name, words))
        elif config is not None or len(words) != 1:
            raise InputError("--config takes one YAML file, once")
        else:
            config = words[0]
    return config, others


def _layers(
    config: str | None, flags: list[Flag]
) -> tuple[list[tuple[str, dict[str, Any]]], list[Flag]]:
    """Return `(file, settings)` of the preset, if any, and of the YAML; and the other flags."""
    own = read_settings(config) if config else {}
    chosen = own.pop("preset", None)
    for name, words in flags:
        check_settings({name: [_word(word) for word in words]}, "command line")
        check_settings({name: " ".join(words)}, "command line")
        if name == "preset":
            chosen = words[0] if len(words) == 1 else words
    layers = [(config or "command line", own)]
    if chosen is not None:
        path = find_preset(chosen)
        layers.insert(0, (str(path), read_settings(path)))
    return layers, [flag for flag in flags if flag[0] != "preset"]


def _word(word: str) -> Any:
    """Read one word of the command line as YAML; text that is not YAML stays text."""
    try:
        return yaml_value(word)
    except InputError:
        return word


def _hints(kinds: Iterable[Any]) -> dict[str, Any]:
    """Return the type of every field that can be given."""
    found: dict[str, Any] = {}
    for kind in kinds:
        types_of = typing.get_type_hints(kind)
        found |= {item.name: types_of[item.name] for item in dataclasses.fields(kind) if item.init}
    return found


def _check_choices(parser: Any, values: dict[str, Any], source: str) -> None:
    """Hold YAML values to the choices that argparse checks for the command line only."""
    for action in parser._actions:
        value = values.get(action.dest)
        if action.choices and value is not None and value not in list(action.choices):
            choices = ", ".join(str(choice) for choice in action.choices)
            raise InputError(f"{source}: {action.dest}: expected one of {choices}, found {value!r}")
