"""Read a recipe's configuration: flat YAML in TRL's own names, overridden by the command line.

`parse` takes what TrlParser takes, strictly: a misspelt key, a wrong type and an abbreviation are
errors that name the key and what to write instead. `preset: NAME` loads a file of settings that the
recipe's own override. YAML is read by the core schema of version 1.2: PyYAML follows 1.1, where
`1e-5` is text, `no` is false, `1:30` is ninety and `010` is eight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import sys
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.composer import Composer

from chainforge.core.errors import InputError
from chainforge.core.paths import anchored, find_preset
from chainforge.core.secrets import check_settings, is_secret_key

Fields = dict[str, tuple[Any, Any]]  # each that can be given, and its type
Layer = tuple[str, dict[str, Any]]  # a file of settings, and what it says

# TRL and transformers check these late: after the model is loaded, or in the first step.
SEEDS = (0, 2**32 - 1)  # what NumPy takes
_TINY = math.ulp(0.0)  # means "above 0"
_RANGES: dict[tuple[float, float], str] = {
    (0, math.inf): "learning_rate weight_decay beta max_grad_norm warmup_steps epsilon "
    "epsilon_high temperature max_retries outage_timeout top_k min_reasoning_chars "
    "max_completion_tokens preference_pairs",
    (_TINY, math.inf): "num_train_epochs logging_steps save_steps eval_steps repetition_penalty",
    (1e-6, math.inf): "max_usd",
    (1e-3, math.inf): "timeout",
    (1, math.inf): "per_device_train_batch_size per_device_eval_batch_size lora_r lora_alpha "
    "gradient_accumulation_steps generation_batch_size steps_per_generation num_iterations "
    "max_completion_length max_length max_new_tokens num_samples num_generations max_concurrency "
    "max_samples round_size max_tokens_total max_requests expected_tokens max_per_prompt max_rows",
    (0, 1): "min_p lora_dropout max_repetition min_language near_duplicates",
    (_TINY, 1): "top_p vllm_gpu_memory_utilization",
    SEEDS: "seed data_seed",
}
RANGES = {name: span for span, names in _RANGES.items() for name in names.split()}
WORDS = {
    "loss_type": "grpo bnpo dr_grpo dapo cispo luspo sapo vespo",
    "importance_sampling_level": "token sequence",
    "scale_rewards": "group batch none",
    "vllm_mode": "server colocate",
}


class _Loader(Composer, yaml.CSafeLoader):
    """Read YAML 1.2, and refuse a key that is given twice.

    libyaml parses, eight times as fast as Python; its own composer has no limit of depth.
    """

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}  # type: ignore[misc]

    def __init__(self, text: str) -> None:
        yaml.CSafeLoader.__init__(self, text)
        Composer.__init__(self)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; raise for a duplicate key."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen and key.value != "<<":
                line = key.start_mark.line + 1
                raise InputError(f"line {line}: the key {key.value!r} is given twice")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Read a whole number, decimal unless it says 0o or 0x."""
        text = str(self.construct_scalar(node))
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)


for _name, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "merge": r"<<",
}.items():
    _tag = f"tag:yaml.org,2002:{_name}"
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def yaml_value(text: str) -> Any:
    """Return the value of a YAML text; raise `InputError` for text that is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"not YAML: {_fault(text, error)}") from None


def _fault(text: str, error: Exception) -> str:
    """Return what a YAML parser found, with the line, where it knows that."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    began = re.search("simple key|quoted", error.context or "")
    number = ((error.context_mark if began else None) or error.problem_mark).line
    line = "".join(text.splitlines()[number : number + 1])
    tab = "\t" in line.removesuffix(line.lstrip())
    what = "a tab cannot indent a line; use spaces" if tab else str(error.problem)
    if "mapping values" in what:
        what = "this colon starts no value; quote a text that has one, and indent keys alike"
    elif not (tab or began) and error.context_mark and error.context_mark.line < number:
        flow = "flow" in str(error.context)
        ask = "is the bracket of line {} closed?" if flow else "is it indented as line {}?"
        what += "; " + ask.format(error.context_mark.line + 1)
    return f"line {number + 1}, {line.strip()!r:.80}: {what}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; raise `InputError` when missing, malformed or not a mapping."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file (looked from {Path.cwd()})")
    try:
        value = yaml_value(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(value, dict | None):
        raise InputError(f"{path}: expected `key: value` lines, found a {type(value).__name__}")
    return {str(key): item for key, item in (value or {}).items()}


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read a YAML of settings; its paths become relative to the current folder."""
    settings = read_yaml(path)
    check_settings(settings, str(path))
    return anchored(settings, Path(path).parent)


def given(argv: Sequence[str]) -> dict[str, Any]:
    """Return the settings as given: preset, the YAML of `--config`, the command line over both.

    Values of the command line are read as YAML; `--flag` alone is True and `--key a b` a list.
    """
    layers, flags = _layers(argv)
    settings = {key: value for _, layer in layers for key, value in layer.items()}
    return settings | {name: _meaning([_word(word) for word in flags[name]]) for name in flags}


def parse(*kinds: Any, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse YAML and command line into one instance of each dataclass.

    Raises `InputError` naming the keys, where they were given, and which values are possible.
    """
    options = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help", "--help-all"} & set(options):
        from chainforge.core.options import help_text

        sys.stdout.write(help_text(kinds, "--help-all" in options))
        sys.exit(0)
    layers, flags = _layers(options)
    values = _checked(_fields(kinds), layers, flags)
    try:
        return tuple(
            kind(**{name: values[name] for name in _fields([kind]) if name in values})
            for kind in kinds
        )
    except InputError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:
        words = f"{layers[-1][0]}: {error}"
        if "divisible by num_generations" in words:
            words += "; per_device_train_batch_size x processes x gradient_accumulation_steps is a "
            words += "step's completions: make that a multiple of num_generations"
        raise InputError(words) from error


def resolved(*configs: Any) -> dict[str, Any]:
    """Return what differs from each dataclass's defaults, secrets left out, ready for YAML."""
    values: dict[str, Any] = {}
    for config in configs:
        for item in dataclasses.fields(config):
            make = item.default_factory
            default = item.default if make is dataclasses.MISSING else make()
            value = getattr(config, item.name, None)
            if item.init and not is_secret_key(item.name) and value != default:
                values[item.name] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    """Return a value as YAML can write it."""
    return json.loads(json.dumps(value, default=lambda other: getattr(other, "value", str(other))))


def _layers(argv: Sequence[str]) -> tuple[list[Layer], dict[str, list[str]]]:
    """Return the settings of the preset, if any, and of the YAML; and the options over both."""
    flags: dict[str, list[str]] = {}
    words: list[str] | None = None
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            words = flags[name.replace("-", "_")] = [value] if equals else []
        elif words is None and "=" in word:
            flags[word] = []  # as Hydra has it; `parse` says what was meant
        elif words is None:
            raise InputError(f"unexpected {word!r}; settings are given as --key value")
        else:
            words.append(word)
    for name, values in flags.items():
        check_settings({name: _meaning([_word(word) for word in values])}, "command line")
    files = flags.pop("config", None)
    if files is not None and len(files) != 1:
        raise InputError("--config takes one YAML file")
    own = read_settings(files[0]) if files else {}
    chosen = own.pop("preset", None)
    if "preset" in flags:
        chosen = _meaning(flags.pop("preset"))
    layers = [(files[0] if files else "command line", own)]
    if chosen is not None:
        path = find_preset(chosen)
        layers.insert(0, (str(path), read_settings(path)))
    return layers, flags


def _word(word: str) -> Any:
    """Read one word of the command line as YAML; text that is not YAML stays text."""
    try:
        return yaml_value(word)
    except InputError:
        return word


def _meaning(values: list[Any]) -> Any:
    return True if not values else values[0] if len(values) == 1 else values


def _checked(
    fields: Fields, layers: Iterable[Layer], flags: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Return the checked values of all layers; report all problems at once."""
    given = [(f"{file}: ", key, value) for file, layer in layers for key, value in layer.items()]
    for key, words in flags.items():
        # A structure, or an empty list, is written as YAML; any other text is what it says.
        structured = words == ["[]"] or (key in fields and _is_structured(fields[key][1]))
        given.append(
            ("--", key, _meaning([_word(word) for word in words] if structured else words))
        )
    values: dict[str, Any] = {}
    problems: list[str] = []
    for where, key, value in given:
        try:
            values[key] = _value(key, value, where, fields)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n  ".join(problems))
    return values


def _fields(kinds: Iterable[Any]) -> Fields:
    """Return every field that can be given, with its type."""
    found: Fields = {}
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        found |= {i.name: (i, hints[i.name]) for i in dataclasses.fields(kind) if i.init}
    return found


def _unknown(key: str, value: Any, where: str, fields: Fields) -> list[str]:
    """Return a line about each key, or about each inside it, that the recipe does not have."""
    from chainforge.core.options import elsewhere, meant

    if isinstance(value, dict):
        inner = {f"{key}.{name}": item for name, item in value.items()}
        if any(meant(name, fields) for name in inner) or dict in map(type, inner.values()):
            return [text for name in inner for text in _unknown(name, inner[name], where, fields)]
    name, equals, _ = key.lstrip("+~").partition("=")
    found = meant(name, fields)
    said = f"unknown option --{key}" if where == "--" else f"{where}unknown key {key!r}"
    if equals:
        said = f"unexpected {key!r}, settings are given as --key value"
    return [said + (found or elsewhere(name))]


def _value(key: str, value: Any, where: str, fields: Fields) -> Any:
    """Return the value of a key as its type; raise `InputError` for one that is not possible.

    `where` is what the key follows in a message: `file: `, or the `--` of a command line.
    """
    if key not in fields:
        raise InputError("\n  ".join(_unknown(key, value, where, fields)))
    item, kind = fields[key]
    words = list(typing.get_args(kind) if str(kind).startswith("typing.Literal") else ())
    words = words or [str(choice) for choice in item.metadata.get("choices") or ()]
    if "importance_sampling_level" in fields and key in WORDS:
        words = WORDS[key].split()
    if words and value is not None and value not in words:
        raise InputError(f"{where}{key}: expected one of {', '.join(words)}, found {value!r}")
    try:
        found = _as(value, kind, f"{where}{key}")
    except InputError as error:
        about = str(item.metadata.get("help", "")).partition(". ")[0]
        raise InputError(f"{error}: {about}" if _is_structured(kind) else str(error)) from None
    if wrong := _out_of_range(key, found, fields):
        raise InputError(f"{where}{key}: {wrong}")
    return found


def check_ranges(settings: Any) -> None:
    """Raise `InputError` for a number out of its range in settings that were not parsed."""
    for name, value in vars(settings).items():
        if wrong := _out_of_range(name, value, vars(settings)):
            raise InputError(f"{name}: {wrong}")


def _out_of_range(key: str, value: Any, known: Collection[str]) -> str | None:
    """Return what is wrong with a number in a setting's value; None if it is possible."""
    if key == "max_steps" and (value == 0 or value < -1):
        return f"expected 1 or more, or -1 for whole epochs, found {value}"
    low, high = RANGES.get(key, (-math.inf, math.inf))
    if key == "temperature" and "learning_rate" in known:
        low = _TINY  # TRL divides by it
    if not isinstance(value, int | float) or (low <= value <= high and abs(value) < math.inf):
        return None
    least = "above 0" if low == _TINY else f"of at least {low:g}"
    most = "" if high == math.inf else f", at most {high:.10g}"
    return f"expected a finite number {least}{most}, found {value}"


def _is_structured(kind: Any) -> bool:
    """Return whether a field of this type holds mappings, written as YAML on a command line."""
    return kind is dict or "dict[" in str(kind) or "dict |" in str(kind)


def _as(value: Any, kind: Any, where: str) -> Any:
    """Return `value` as a `kind`; raise `InputError` when it does not fit.

    Text that reads as a number, and `yes` or `off` for a bool, is converted.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    # pydantic takes true for 1
    odd = isinstance(value, bool) and re.search("int|float", str(kind)) and "bool" not in str(kind)
    adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    single = isinstance(value, str | int | float)
    for tried in () if odd else (value, [value]) if single else (value,):
        with contextlib.suppress(ValidationError):  # one of several, as on the command line
            return adapter.validate_python(tried)
    wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    raise InputError(f"{where}: expected {wanted}, found {value!r:.80} ({type(value).__name__})")
