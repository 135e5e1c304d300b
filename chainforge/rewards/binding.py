"""Turn one entry of `rewards:` into a bound function: what it is called with is known up front."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.references import described, hint, nearest, refuse_unknown, resolve, user_code

KEYS = ("fn", "weight", "params", "task", "name")
# What a trainer passes beside the columns of the row: to one call each, and to a batch function.
ROW_NAMES = ("prompt", "completion_ids")
BATCH_NAMES = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_metric",
    "log_extra",
)
_BATCH_FIRST = ("completions", "completion_ids", "prompts")
_PARAMETERS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Bound:
    """A reward function with its constants and the names it takes from each row.

    `required` are the taken names without a default, and of `answer` and `solution` what its code
    looks up in `**kwargs`; `batch` says that it is called once with lists, in TRL's form;
    `everything` that it takes whatever it is given (`**kwargs`).
    """

    function: Callable[..., Any]
    name: str
    weight: float
    task: str | None
    constants: Mapping[str, Any]
    taken: tuple[str, ...]
    required: frozenset[str]
    batch: bool
    everything: bool


def bind(
    spec: Mapping[str, Any],
    columns: Collection[str],
    transcript: str,
    builtins: Mapping[str, str | Callable[..., Any]],
) -> Bound:
    """Check one entry of `rewards:` and bind its function; raise `InputError` for what is wrong."""
    reference, weight, params = _check_spec(spec)
    function = resolve(reference, builtins)
    params = dict(params)
    if _is_factory(function, params):
        function, params = _call_factory(reference, function, params), {}
    if inspect.iscoroutinefunction(function):
        raise InputError(f"reward {reference}: an async function; write it as a plain one")
    parameters = _parameters(reference, function)
    batch = parameters[0].name in _BATCH_FIRST
    everything = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters)
    given = [item for item in parameters[0 if batch else 1 :] if item.kind in _PARAMETERS]
    names = [item.name for item in given]
    for key in params:
        if key not in names and not (batch and everything):
            raise InputError(f"reward {reference}: no parameter {key!r}; {hint(str(key), names)}")
    if "transcript" in names:
        params.setdefault("transcript", transcript)
    if check := getattr(function, "check", None):
        _check_params(reference, check, params)
    taken = _taken(reference, given, params, columns, batch)
    name = spec.get("name") or getattr(function, "__name__", type(function).__name__)
    task = spec.get("task")
    if task is not None and "task" not in columns:
        raise InputError(f"reward {reference}: limited to task {task!r}, but rows have no `task`")
    required = {item.name for item in given if item.default is item.empty}
    if batch and everything:
        required |= {"answer", "solution"} & _words(inspect.unwrap(function))
    return Bound(
        function, str(name), weight, task, params, taken, frozenset(required), batch, everything
    )


def _words(code: Any) -> set[str]:
    """Return the texts in a function's code, such as the keys that it looks up."""
    code = getattr(code, "__code__", None) or getattr(type(code).__call__, "__code__", code)
    found: set[str] = set()
    for one in getattr(code, "co_consts", ()):
        found |= {one} if isinstance(one, str) else _words(one)
    return found


def _check_params(reference: str, check: Callable[..., Any], params: dict[str, Any]) -> None:
    """Let a function refuse its `params`."""
    try:
        with user_code():
            check(**params)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"reward {reference}: {described(error)}") from error


def _check_spec(spec: Mapping[str, Any]) -> tuple[str, float, Mapping[str, Any]]:
    """Return function, weight and params of an entry that holds nothing else."""
    if not isinstance(spec, Mapping):
        raise InputError(
            f"rewards: each entry is like {{fn: accuracy_reward, weight: 1.0}}, not {spec!r}"
        )
    refuse_unknown(spec, KEYS, f"rewards: in {dict(spec)}: ")
    if "fn" not in spec:
        raise InputError(f"rewards: no `fn` in {dict(spec)}; it names the function")
    reference, weight = spec["fn"], spec.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise InputError(f"reward {reference}: weight is {weight!r}, it must be a number")
    params = spec.get("params") or {}
    if not isinstance(params, Mapping):
        raise InputError(f"reward {reference}: params is {params!r}, it must be `name: value`")
    for key in ("task", "name"):
        if spec.get(key) is not None and not isinstance(spec[key], str):
            raise InputError(f"reward {reference}: {key} is {spec[key]!r}, it must be text")
    return reference, float(weight), params


def _parameters(reference: str, function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    if not parameters:
        raise InputError(f"reward {reference}: it takes no argument; the first is the completion")
    return parameters


def _is_factory(function: Callable[..., Any], params: Mapping[str, Any]) -> bool:
    """Whether calling with `params` gives the reward: named `get_...`, or first argument given."""
    if inspect.isclass(function) or getattr(function, "__name__", "").startswith("get_"):
        return True
    try:
        first = next(iter(inspect.signature(function).parameters), None)
    except (TypeError, ValueError):
        return False
    return first in params


def _call_factory(
    reference: str, function: Callable[..., Any], params: dict[str, Any]
) -> Callable[..., Any]:
    """Make the reward; a missing or unknown argument is an `InputError`."""
    parameters = _parameters(reference, function)
    names = [item.name for item in parameters]
    free = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters)
    for key in params:
        if key not in names and not free:
            raise InputError(f"reward {reference}: no parameter {key!r}; {hint(str(key), names)}")
    for item in parameters:
        if item.default is item.empty and item.kind in _PARAMETERS and item.name not in params:
            raise InputError(
                f"reward {reference}: params must give {item.name!r}; "
                f"it takes {', '.join(names)}, and params has {_listed(params)}"
            )
    try:
        with user_code():
            made = function(**params)
    except Exception as error:
        raise InputError(f"reward {reference}: {described(error)}") from error
    if not callable(made):
        raise InputError(f"reward {reference}: called with params it gave {made!r}, no function")
    return made  # type: ignore[no-any-return]


def _taken(
    reference: str,
    given: list[inspect.Parameter],
    params: Mapping[str, Any],
    columns: Collection[str],
    batch: bool,
) -> tuple[str, ...]:
    """Return the names that come from the row; raise for one that comes from nowhere."""
    available = {*columns, *(BATCH_NAMES if batch else ROW_NAMES)}
    if "answer" in columns:
        available.add("solution")  # What TRL's own rewards call the gold answer.
    taken = []
    for item in given:
        if item.name in params:
            continue
        if item.name in available:
            taken.append(item.name)
        elif item.default is item.empty:
            near = nearest(item.name, [*available, *params])
            raise InputError(
                f"reward {reference}: needs {item.name!r}, which is neither a column nor in params"
                f"{f' (did you mean {near!r}?)' if near else ''}; "
                f"columns: {_listed(columns)}; params: {_listed(params)}"
            )
    return tuple(taken)


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "none"
