"""Load the rewards of a configuration and score completions with them, as TRL calls them.

A reward function takes the completion's text first and, by name, columns of the row or `params`. It
is bound when a configuration is read, so that a wrong name fails before a model is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from chainforge.core.errors import Failed, InputError, hint, nearest, refuse_unknown
from chainforge.core.jsonl import Row
from chainforge.core.plugins import described, resolve, user_code
from chainforge.core.transcript import DEFAULT, tags_of
from chainforge.rewards.functions import BUILTINS, accuracy_reward

logger = logging.getLogger(__name__)

KEYS = ("fn", "weight", "params", "task", "name")
# What a trainer passes beside the columns of the row: to one call each, and to a batch function.
ROW_NAMES = {"prompt", "completion_ids"}
TRAINER_NAMES = {"trainer_state", "log_metric", "log_extra"}
BATCH_NAMES = {"prompts", "completions", "completion_ids", *TRAINER_NAMES}
_PARAMETERS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# A failure share over fewer rows says little; over more, it would forget a fault too slowly.
_FEWEST, _WINDOW = 64, 256
# GRPO squares a reward in float32: beyond this a group's advantages become inf or 0, silently.
_LARGEST = 1e12


class RewardFailed(Failed):
    """A reward failed on more rows than `max_reward_failures` allows; says which and why."""


class NotFinite(ValueError):
    """A reward that is NaN, infinite, or too large to compare."""


def _default_rewards() -> list[dict[str, Any]]:
    return [{"fn": "accuracy_reward", "weight": 1.0}, {"fn": "format_reward", "weight": 0.2}]


@dataclass
class RewardArgs:
    """How a completion is scored."""

    rewards: list[dict[str, Any]] = field(
        default_factory=_default_rewards,
        metadata={
            "help": "The rewards, each like {fn: accuracy_reward, weight: 1.0, params: {...}, "
            "task: math, name: accuracy}; fn is a built-in name, pkg.mod:fn or path/file.py:fn."
        },
    )
    transcript: str = field(
        default=DEFAULT,
        metadata={"help": "The form of a completion: r1-cold-start or think."},
    )
    random_rewards: bool = field(
        default=False,
        metadata={
            "help": "The control: every reward becomes a coin flip, so that whatever is still "
            "learnt was not learnt from the rewards."
        },
    )
    random_rewards_seed: int = field(
        default=0, metadata={"help": "The seed of the coin flips of random_rewards."}
    )
    max_reward_failures: float = field(
        default=0.1,
        metadata={
            "help": "Stop when a reward fails (raises, or gives no finite number) on more than "
            "this share of its last 64 to 256 rows; below it such a row is neutral and counted."
        },
    )


class Reward:
    """A reward function in TRL's batch form, named for TRL's metrics by `__name__`.

    None is "does not apply": rows of another task, rows without an answer where the function needs
    one, and rows where the function failed. `nonfinite` describes the first value that was NaN or
    infinite. Raises `InputError` for an entry of `rewards:` that cannot be bound to `columns`.
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        columns: Collection[str],
        args: RewardArgs | None = None,
        builtins: Mapping[str, str | Callable[..., Any]] = BUILTINS,
    ) -> None:
        args = args or RewardArgs()
        reference, self.weight, params = _check_spec(spec)
        function, params = _resolve(reference, params, builtins)
        parameters = _parameters(reference, function)
        self._batch = parameters[0].name in ("completions", "completion_ids", "prompts")
        parameters = parameters[0 if self._batch else 1 :]
        self._everything = any(item.kind is item.VAR_KEYWORD for item in parameters)
        _refuse_params(reference, params, parameters)
        given = [item for item in parameters if item.kind in _PARAMETERS]
        if any(item.name == "transcript" for item in given):
            params = {"transcript": args.transcript} | params
        if check := getattr(function, "check", None):
            with _input_errors(reference):
                check(**params)
        available = {*columns, *(BATCH_NAMES if self._batch else ROW_NAMES)}
        self._taken = _taken(reference, given, params, available, columns)
        self._required = {item.name for item in given if item.default is item.empty}
        if self._batch and self._everything:
            self._required |= {"answer", "solution"} & _words(inspect.unwrap(function))
        self.__name__ = str(
            spec.get("name") or getattr(function, "__name__", type(function).__name__)
        )
        self.task = spec.get("task")
        if self.task is not None and "task" not in columns:
            raise InputError(
                f"reward {reference}: limited to task {self.task!r}, but rows have no `task`"
            )
        self.failed = self.seen = 0
        self.nonfinite: str | None = None
        self._function, self._params = function, params
        self._max_failures = args.max_reward_failures
        self._coin_seed = args.random_rewards_seed if args.random_rewards else None
        self._recent: deque[bool] = deque(maxlen=_WINDOW)

    @property
    def measures_correctness(self) -> bool:
        """Return whether its value says if the answer is right: strictly, and nothing else."""
        strict = not self._params.get("lenient") and self._coin_seed is None
        return self._function is accuracy_reward and strict

    @property
    def longest(self) -> int | None:
        """Return the length at which its penalty is largest, for TRL's soft overlong punishment."""
        return getattr(self._function, "max_completion_len", None)

    def applies(self, row: Row) -> bool:
        """Return whether it scores a row: one of its task, with an answer if it needs one."""
        if self.task is not None and row.get("task") != self.task:
            return False
        if row.get("answer", "") is not None or not self._required & {"answer", "solution"}:
            return True
        return "entry" in self._taken and bool(row.get("entry"))  # it scores by that

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Return a reward per completion; `columns` hold a list each, one value per completion.

        Raises `RewardFailed` when too many of the last rows failed.
        """
        if completion_ids is None and "completion_ids" in self._taken:
            raise InputError(
                f"reward {self.__name__}: it needs the token ids of a completion, which these rows "
                "do not have (column `completion_ids`); leave it out of this stage's rewards"
            )
        size = len(completions)
        known = {name: columns[name] for name in ("task", "answer", "entry") if columns.get(name)}
        rows = [i for i in range(size) if self.applies({name: known[name][i] for name in known})]
        texts = [text_of(completion) for completion in completions]
        columns |= {"prompts": prompts, "completions": texts, "completion_ids": completion_ids}
        chosen = {
            name: [values[i] for i in rows]
            if isinstance(values, list | tuple) and len(values) == size
            else values
            for name, values in columns.items()
        }
        if "answer" in chosen:  # TRL's own rewards call it solution
            chosen.setdefault("solution", chosen["answer"])
        if self._coin_seed is not None:
            values: list[Any] = self._flip(chosen)
        elif self._batch:
            values = self._call_batch(chosen | {"log_metric": log_metric}, len(rows))
        else:
            values = self._call_rows(chosen | {"prompt": chosen["prompts"]}, len(rows))
        names = chosen.get("id") or [f"number {i + 1}" for i in rows]
        rewards: list[float | None] = [None] * size
        for i, value in zip(rows, self._check(values, names, log_metric), strict=True):
            rewards[i] = value
        return rewards

    def _flip(self, columns: dict[str, Any]) -> list[float]:
        """Flip a coin per row: the same for the same row and text, in a resumed run too."""
        names = columns.get("id") or [json.dumps(p, default=str) for p in columns["prompts"]]
        flips = []
        for name, text in zip(names, columns["completions"], strict=True):
            content = f"{self._coin_seed}\0{self.__name__}\0{name}\0{text}"
            digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=1)
            flips.append(float(digest.digest()[0] & 1))
        return flips

    def _call_batch(self, columns: dict[str, Any], size: int) -> list[Any]:
        """Call a function of TRL's form once; texts become messages, as its own rewards expect."""
        texts = columns["completions"]
        columns["completions"] = [[{"role": "assistant", "content": text}] for text in texts]
        names = {*self._taken, *(columns if self._everything else ())} - set(self._params)
        given = {name: _column(columns, name, size) for name in names}
        values = self._guarded(lambda: list(self._function(**given, **self._params)))
        if not isinstance(values, Exception) and len(values) != size:
            values = ValueError(f"it returned {len(values)} rewards for {size} completions")
        return [values] * size if isinstance(values, Exception) else values

    def _call_rows(self, columns: dict[str, Any], size: int) -> list[Any]:
        """Call a function once per row; a function with a `batch` attribute gets them all."""
        taken = {name: _column(columns, name, size) for name in self._taken}
        calls: list[dict[str, Any]] = [
            # A row without a value for an optional argument leaves it at its default.
            {
                name: values[i]
                for name, values in taken.items()
                if values[i] is not None or name in self._required
            }
            | self._params
            for i in range(size)
        ]
        texts = columns["completions"]
        if batch := getattr(self._function, "batch", None):
            whole = [call | {"completion": text} for call, text in zip(calls, texts, strict=True)]
            with user_code():
                return list(batch(whole))
        pairs = zip(texts, calls, strict=True)
        return [self._guarded(partial(self._function, text, **call)) for text, call in pairs]

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """Return what the user's code returns, or the exception that it raises."""
        try:
            with user_code():
                return call()
        except InputError:
            raise
        except Exception as error:
            return error

    def _finite(self, value: Any) -> float | Exception | None:
        """Return a reward as a float, None as it is, or why it is no reward."""
        if value is None or isinstance(value, Exception):
            return value
        number = self._guarded(lambda: float("no number" if isinstance(value, str) else value))
        if isinstance(number, OverflowError):
            number = math.inf
        if isinstance(number, Exception):
            return ValueError(f"it returned {type(value).__name__}, which is no finite number")
        if abs(number) * max(1.0, abs(self.weight)) <= _LARGEST:
            return float(number)
        return NotFinite(f"it returned {number!r:.80}, which is no finite number")

    def _check(
        self,
        values: Sequence[Any],
        names: Sequence[Any],
        log_metric: Callable[[str, float], None] | None,
    ) -> list[float | None]:
        """Make what failed neutral, count and log it; raise when it is too much."""
        checked = [self._finite(value) for value in values]
        for value, given, name in zip(checked, values, names, strict=True):
            if isinstance(value, NotFinite) and self.nonfinite is None:
                self.nonfinite = f"{given!r:.80} for a completion of row {name}"
        failures = [value for value in checked if isinstance(value, Exception)]
        self.seen += len(checked)
        self.failed += len(failures)
        self._recent.extend(isinstance(value, Exception) for value in checked)
        if log_metric is not None and checked:
            log_metric(f"rewards/{self.__name__}/failed", len(failures) / len(checked))
        if failures:
            rows, why = f"{len(failures)} of {len(checked)} rows", described(failures[0])
            logger.warning(
                "reward %s failed on %s (%s); they are neutral", self.__name__, rows, why
            )
            share = sum(self._recent) / len(self._recent)
            if len(self._recent) >= _FEWEST and share > self._max_failures:
                raise RewardFailed(
                    f"reward {self.__name__} failed on {share:.0%} of its last "
                    f"{len(self._recent)} rows, more than max_reward_failures="
                    f"{self._max_failures}; the last: {why}"
                )
        return [None if isinstance(value, Exception) else value for value in checked]


def _column(columns: Mapping[str, Any], name: str, size: int) -> Any:
    return columns.get(name, None if name in TRAINER_NAMES else [None] * size)


def text_of(completion: Any) -> str:
    """Return a completion's text, of TRL's conversational form or as it is."""
    if isinstance(completion, str):
        return completion
    return "".join(str(turn.get("content") or "") for turn in completion)


@contextlib.contextmanager
def _input_errors(reference: str) -> Iterator[None]:
    """Turn what the user's code raises while it is bound into an `InputError`."""
    try:
        with user_code():
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"reward {reference}: {described(error)}") from error


def _check_spec(spec: Mapping[str, Any]) -> tuple[str, float, dict[str, Any]]:
    """Return function, weight and params of an entry that holds nothing else."""
    if not isinstance(spec, Mapping):
        raise InputError(
            f"rewards: each entry is like {{fn: accuracy_reward, weight: 1.0}}, not {spec!r}"
        )
    refuse_unknown(spec, KEYS, f"rewards: in {dict(spec)}: ")
    if "fn" not in spec:
        raise InputError(f"rewards: no `fn` in {dict(spec)}; it names the function")
    reference, weight, params = spec["fn"], spec.get("weight", 1.0), spec.get("params") or {}
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise InputError(f"reward {reference}: weight is {weight!r}, it must be a number")
    if not isinstance(params, Mapping):
        raise InputError(f"reward {reference}: params is {params!r}, it must be `name: value`")
    for key in ("task", "name"):
        if spec.get(key) is not None and not isinstance(spec[key], str):
            raise InputError(f"reward {reference}: {key} is {spec[key]!r}, it must be text")
    return reference, float(weight), dict(params)


def _resolve(
    reference: str, params: dict[str, Any], builtins: Mapping[str, str | Callable[..., Any]]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return a reward function and its params; a factory is called with them.

    A factory is a class, is named `get_...`, or is given its first argument by `params`.
    """
    function = resolve(reference, builtins)
    is_factory = inspect.isclass(function) or function.__name__.startswith("get_")
    parameters = _parameters(reference, function)
    if is_factory or parameters[0].name in params:
        _refuse_params(reference, params, parameters)
        for item in parameters:
            if item.default is item.empty and item.kind in _PARAMETERS and item.name not in params:
                raise InputError(f"reward {reference}: params must give {item.name!r}")
        with _input_errors(reference):
            function, params = function(**params), {}
        if not callable(function):
            raise InputError(f"reward {reference}: called with params it gave {function!r}")
    if inspect.iscoroutinefunction(function):
        raise InputError(f"reward {reference}: an async function; write it as a plain one")
    return function, params


def _parameters(reference: str, function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    if not parameters:
        raise InputError(f"reward {reference}: it takes no argument; the first is the completion")
    return parameters


def _refuse_params(
    reference: str, params: Mapping[str, Any], parameters: list[inspect.Parameter]
) -> None:
    names = [item.name for item in parameters]
    for key in params:
        if key not in names and not any(item.kind is item.VAR_KEYWORD for item in parameters):
            raise InputError(f"reward {reference}: no parameter {key!r}; {hint(key, names)}")


def _taken(
    reference: str,
    given: list[inspect.Parameter],
    params: Mapping[str, Any],
    available: Collection[str],
    columns: Collection[str],
) -> tuple[str, ...]:
    """Return the names that come from the row; raise for one that comes from nowhere."""
    if "answer" in columns:
        available = {*available, "solution"}  # what TRL's own rewards call the gold answer
    for item in given:
        if item.default is item.empty and item.name not in {*params, *available}:
            near = nearest(item.name, [*available, *params])
            raise InputError(
                f"reward {reference}: needs {item.name!r}, which is neither a column nor in params"
                f"{f' (did you mean {near!r}?)' if near else ''}; "
                f"columns: {_listed(columns)}; params: {_listed(params)}"
            )
    names = [item.name for item in given if item.name not in params]
    return tuple(name for name in names if name in available)


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _words(code: Any) -> set[str]:
    """Return the texts in a function's code, such as the keys that it looks up."""
    code = getattr(code, "__code__", None) or getattr(type(code).__call__, "__code__", code)
    constants = getattr(code, "co_consts", ())
    return {one for one in constants if isinstance(one, str)}.union(
        *(_words(one) for one in constants if inspect.iscode(one))
    )


def load_rewards(args: RewardArgs, columns: Collection[str]) -> list[Reward]:
    """Return the rewards of a configuration, each bound to columns that rows have.

    Raises `InputError` for an unknown function or key, a name that comes from nowhere, a file that
    does not import, a weight that is no number, or two rewards of one name.
    """
    tags_of(args.transcript)
    share = args.max_reward_failures
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise InputError(f"max_reward_failures: {share!r} is not a share from 0 to 1")
    if not isinstance(args.rewards, list) or not args.rewards:
        raise InputError("rewards: name at least one, like [{fn: accuracy_reward, weight: 1.0}]")
    rewards = [Reward(spec, columns, args) for spec in args.rewards]
    for name, count in Counter(reward.__name__ for reward in rewards).items():
        if count > 1:
            raise InputError(f"rewards: {name!r} is there {count} times; give each its own `name:`")
    return rewards


def check_applicable(rewards: Sequence[Reward], rows: Sequence[Row]) -> None:
    """Raise `InputError` for rows to which no reward applies: nothing can be learnt from them."""
    without = [row for row in rows if not any(reward.applies(row) for reward in rewards)]
    if without:
        names = ", ".join(reward.__name__ for reward in rewards)
        row = without[0]
        why = "" if row.get("answer", "") is not None else ", which has no `answer`"
        raise InputError(
            f"rewards: none of {names} applies to {len(without)} of {len(rows)} rows, such as "
            f"{row.get('id')} of task {row.get('task')!r}{why}; add a reward that does, such as "
            "format_reward or your own"
        )


def check_overlong(rewards: Sequence[Reward], longest: int) -> None:
    """Raise `InputError` for a penalty of length that ends elsewhere than the completions.

    It would never apply, or to every completion.
    """
    for reward in rewards:
        end = reward.longest
        if end is not None and end != longest:
            raise InputError(
                f"reward {reward.__name__}: max_completion_len is {end}, but max_completion_length "
                f"of this stage is {longest}; make them the same"
            )


@dataclass(frozen=True)
class Score:
    """The rewards of one completion by name, None where one does not apply, and their sum."""

    rewards: dict[str, float | None]
    total: float | None


def score(
    rewards: Sequence[Reward],
    rows: Sequence[Row],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
) -> list[Score]:
    """Score one completion per row, in order; the total is the weighted sum of what applies."""
    if len(rows) != len(completions):
        raise ValueError(f"{len(rows)} rows, but {len(completions)} completions")
    names = sorted({key for row in rows for key in row} - BATCH_NAMES)
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
    prompts = [row.get("prompt") for row in rows]
    if completion_ids is None and rows and all(row.get("completion_ids") for row in rows):
        completion_ids = [row["completion_ids"] for row in rows]
    by_name = {
        reward.__name__: reward(prompts, completions, completion_ids, **columns)
        for reward in rewards
    }
    scores = []
    for index in range(len(rows)):
        given = {name: values[index] for name, values in by_name.items()}
        parts = [r.weight * v for r in rewards if (v := given[r.__name__]) is not None]
        scores.append(Score(given, sum(parts) if parts else None))
    return scores
