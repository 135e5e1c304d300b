"""Read YAML in one place, by the core schema of YAML 1.2.

PyYAML follows YAML 1.1, where `1e-5` is text, `no` is false, `1:30` is ninety and `010` is eight.
Here a number is what other tools take for one, and only `true` and `false` are booleans.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml
import yaml.cyaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from chainforge.core.errors import InputError

# A recipe has hundreds of values. Aliases of aliases can stand for more than any memory holds.
MOST_VALUES = 100_000
MOST_LEVELS = 100

MERGE = "tag:yaml.org,2002:merge"
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_PLAIN = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": _INT.pattern,
    "float": _FLOAT.pattern,
    "merge": r"<<",
}


_CParser: Any = yaml.cyaml.CParser  # type: ignore[attr-defined]
_Base: Any = type("_Base", (Composer, _CParser, SafeConstructor, Resolver), {})


class _Loader(_Base):  # type: ignore[misc]
    """YAML 1.2 that refuses duplicate keys, deep nesting, cycles, and aliases of too much.

    libyaml parses; the nodes are composed here, since libyaml's own recursion has no limit.
    """

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}

    def __init__(self, text: str) -> None:
        _CParser.__init__(self, text)
        for part in (Composer, SafeConstructor, Resolver):
            part.__init__(self)
        self.level = self.values = 0
        self.sizes: dict[int, int] = {}  # of nodes: how many values each contains

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return a node; raise for one that is too deep, too large, or inside itself."""
        event, before = self.peek_event(), self.values
        self.level += 1
        if self.level > MOST_LEVELS:
            raise InputError(f"{_line(event)}: more than {MOST_LEVELS} levels of nesting")
        node = super().compose_node(parent, index)
        self.level -= 1
        if isinstance(event, yaml.AliasEvent) and id(node) not in self.sizes:
            raise InputError(f"{_line(event)}: an alias (*) inside what it names")
        self.values += self.sizes.get(id(node), 1)
        self.sizes[id(node)] = self.values - before
        if self.values > MOST_VALUES:
            raise InputError(f"{_line(event)}: aliases (*) stand for over {MOST_VALUES:,} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; raise for a duplicate key."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise InputError(f"{_line(key_node)}: the key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Read a whole number, decimal unless it says 0o or 0x."""
        text = str(self.construct_scalar(node))
        if not _INT.fullmatch(text):
            raise InputError(f"{_line(node)}: {text:.40} is not a whole number")
        try:
            return int(text, 0 if text[:2] in ("0o", "0x") else 10)
        except ValueError:
            raise InputError(f"{_line(node)}: a number of {len(text)} digits") from None

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """Read a number."""
        text = str(self.construct_scalar(node))
        if not _FLOAT.fullmatch(text):
            raise InputError(f"{_line(node)}: {text:.40} is not a number")
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


for _name, _pattern in _PLAIN.items():
    _tag = f"tag:yaml.org,2002:{_name}"
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def yaml_value(text: str) -> Any:
    """Return the value of a YAML text; raise `InputError` for text that is not YAML."""
    try:
        return _Loader(text).get_single_data()
    except InputError:
        raise
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {' '.join(str(error).split())}") from None
    # A tag such as !!timestamp on a text that has no date raises whatever Python raises.
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(f"a value does not fit its tag: {error}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; raise `InputError` when missing, malformed or not a mapping."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file (looked from {Path.cwd()})")
    try:
        value = yaml_value(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable: {error}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected `key: value` lines, found a {type(value).__name__}")
    return {str(key): item for key, item in value.items()}


def _line(node: Any) -> str:
    return f"line {node.start_mark.line + 1}"
