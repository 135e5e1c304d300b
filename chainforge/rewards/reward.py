"""Load the rewards of a configuration and score completions with them, as TRL calls them.

A reward function takes the completion's text first and, by name, columns of the row or `params`. It
is bound when a configuration is read, so that a wrong name fails before a model is loaded.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import json
import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from chainforge.core.errors import Failed, InputError, hint, refuse_unknown
from chainforge.core.jsonl import Row
from chainforge.core.plugins import as_struct, described, resolve, user_code, where
from chainforge.core.transcript import DEFAULT, tags_of
from chainforge.rewards.functions import BUILTINS, accuracy_reward

logger = logging.getLogger(__name__)

# What a trainer passes beside the columns of the row: to one call each, and to a batch function.
ROW_NAMES = {"prompt", "completion_ids"}
TRAINER_NAMES = {"trainer_state", "log_metric", "log_extra"}
BATCH_NAMES = {"prompts", "completions", "completion_ids", *TRAINER_NAMES}
# A failure share over fewer rows says little; over more, it would forget a fault too slowly.
_FEWEST, _WINDOW = 64, 256
# GRPO squares a reward in float32: beyond this a group's advantages become inf or 0, silently.
_LARGEST = 1e12


class RewardFailed(Failed):
    """A reward failed on more rows than `max_reward_failures` allows; says which and why."""


def _default_rewards() -> list[dict[str, Any]]:
    return [{"fn": "accuracy_reward", "weight": 1.0}, {"fn": "format_reward", "weight": 0.2}]


@dataclass
class RewardArgs:
    """How a completion is scored."""

    rewards: list[dict[str, Any]] = field(
        default_factory=_default_rewards,
        metadata={
            "help": "The rewards, each like {fn: accuracy_reward, weight: 1.0, params: {...}, "
            "task: math, name: accuracy}; fn is a built-in name, pkg.mod:fn or path/file.py:fn. "
            "A reward model is {model: PATH_OR_HUB_ID, weight: 0.5}."
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
    max_reward_failures: float = field(
        default=0.1,
        metadata={
            "help": "Stop when a reward fails (raises, or gives no finite number) on more than "
            "this share of its last 64 to 256 rows; below it such a row is neutral and counted."
        },
    )


class Entry(msgspec.Struct, frozen=True):
    """One entry of `rewards`."""

    fn: str = ""
    model: str = ""
    weight: float = 1.0
    params: dict[str, Any] = {}
    task: str | None = None
    name: str | None = None


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
        named = isinstance(spec, Mapping) and (spec.get("fn") or spec.get("model"))
        entry = as_struct(spec, Entry, f"reward {named}" if named else "rewards")
        if bool(entry.fn) == bool(entry.model):
            raise InputError(f"rewards: expected `fn`, a function, or `model`, found {spec!r:.200}")
        where = f"reward {entry.fn or entry.model}: "
        if not math.isfinite(entry.weight):
            raise InputError(f"{where}weight is {entry.weight}, it must be finite")
        if entry.task is not None and "task" not in columns:
            raise InputError(f"{where}limited to task {entry.task!r}, but rows have no `task`")
        params = entry.params | ({"model": entry.model} if entry.model else {})
        function = resolve(entry.fn or "reward_model", builtins)
        self.function, params = _resolve(where, function, params)
        self._bind(where, params, columns, args.transcript)
        own_name = getattr(self.function, "__name__", type(self.function).__name__)
        self.__name__ = entry.name or str(own_name)
        self.weight, self.task = entry.weight, entry.task
        self.failed = self.seen = self.scored = 0
        self.nonfinite: str | None = None
        self._max_failures, self._random = args.max_reward_failures, args.random_rewards
        self._recent: deque[bool] = deque(maxlen=_WINDOW)

    def _bind(
        self, where: str, params: dict[str, Any], columns: Collection[str], transcript: str
    ) -> None:
        """Find the columns that the function takes; raise `InputError` for a missing one."""
        first, *others = _parameters(where, self.function)
        self._batch = first.name in BATCH_NAMES
        taken = [first, *others] if self._batch else others
        named = {item.name: item for item in taken if item.kind is not item.VAR_KEYWORD}
        self._everything = len(named) < len(taken)
        if "transcript" in named:
            params = {"transcript": transcript} | params
        if not self._everything:
            refuse_unknown(params, named, where)
        if check := getattr(self.function, "check", None):
            _called(where, check, params)
        required = {name for name, item in named.items() if item.default is item.empty}
        known = {*columns, *(BATCH_NAMES if self._batch else ROW_NAMES)}
        if "answer" in columns:
            known.add("solution")  # what TRL's own rewards call the gold answer
        self._params, self._required = params, required - params.keys()
        self._taken = named.keys() & known - params.keys()
        for name in sorted(self._required - known):
            raise InputError(f"{where}needs {name!r} from a column or params; {hint(name, known)}")

    @property
    def measures_correctness(self) -> bool:
        """Return whether its value is strict correctness and nothing else."""
        strict = not self._params.get("lenient") and not self._random
        return self.function is accuracy_reward and strict

    @property
    def is_opinion(self) -> bool:
        """Return whether it is a model's opinion, a judge's or a reward model's."""
        return bool(getattr(self.function, "opinion", False))

    def applies(self, row: Row) -> bool:
        """Return whether this reward scores a row: of its task, with an answer if it needs one."""
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
        columns |= {"prompt": prompts, "prompts": prompts, "completion_ids": completion_ids}
        if "answer" in columns:
            columns.setdefault("solution", columns["answer"])
        lists = {name: given for name, given in columns.items() if isinstance(given, list | tuple)}
        every = [{name: given[i] for name, given in lists.items()} for i in range(size)]
        chosen = {i: row for i, row in enumerate(every) if self.applies(row)}
        rows, texts = list(chosen.values()), [text_of(completions[i]) for i in chosen]
        if self._random:
            values: list[Any] = [self._flip(*pair) for pair in zip(rows, texts, strict=True)]
        elif self._batch:
            values = self._call_batch(rows, texts, columns | {"log_metric": log_metric})
        else:
            values = self._call_rows(rows, texts)
        names = [row.get("id", f"number {i + 1}") for i, row in chosen.items()]
        rewards = dict(zip(chosen, self._check(values, names, log_metric), strict=True))
        return [rewards.get(i) for i in range(size)]

    def _flip(self, row: Row, text: str) -> float:
        """Flip a coin: the same for the same row and text, in a resumed run too."""
        name = row.get("id") or json.dumps(row.get("prompt"), default=str)
        content = f"{self.__name__}\0{name}\0{text}".encode("utf-8", "surrogatepass")
        return float(hashlib.blake2b(content, digest_size=1).digest()[0] & 1)

    def _call_batch(self, rows: list[Row], texts: list[str], columns: Row) -> list[Any]:
        """Call a function of TRL's form once; texts become messages, as its own rewards expect."""
        given: Row = {}
        offered = columns.keys() - self._params.keys() if self._everything else set()
        for name in self._taken | offered:
            given[name] = columns.get(name)
            if isinstance(given[name], list | tuple):
                given[name] = [row[name] for row in rows]
        given["completions"] = [[{"role": "assistant", "content": text}] for text in texts]
        values = _guarded(lambda: list(awaited(self.function(**given, **self._params))))
        if not isinstance(values, Exception) and len(values) != len(rows):
            values = ValueError(f"it returned {len(values)} rewards for {len(rows)} completions")
        return [values] * len(rows) if isinstance(values, Exception) else values

    def _call_rows(self, rows: list[Row], texts: list[str]) -> list[Any]:
        """Call a function once per row; a function with a `batch` attribute gets them all."""
        calls = []
        for row in rows:
            given = {name: row.get(name) for name in self._taken}
            # A row without a value for an optional argument leaves it at its default.
            named = {k: v for k, v in given.items() if v is not None or k in self._required}
            calls.append(named | self._params)
        pairs = zip(texts, calls, strict=True)
        if batch := getattr(self.function, "batch", None):
            with user_code():
                return list(batch([call | {"completion": text} for text, call in pairs]))
        values = [_guarded(self.function, text, **call) for text, call in pairs]
        return awaited(_gathered(values)) if any(map(inspect.iscoroutine, values)) else values

    def _finite(self, value: Any, name: Any) -> float | Exception | None:
        """Return a reward as a float, None as it is, or why it is no reward."""
        if value is None or isinstance(value, Exception):
            return value
        number = None if isinstance(value, str) else _guarded(float, value)
        if not isinstance(number, float):
            return ValueError(f"it returned {type(value).__name__}, which is no finite number")
        if abs(number) * max(1.0, abs(self.weight)) <= _LARGEST:
            return number
        self.nonfinite = self.nonfinite or f"{value!r:.80} for a completion of row {name}"
        return ValueError(f"it returned {value!r:.80}, which is no finite number")

    def _check(
        self,
        values: Sequence[Any],
        names: Sequence[Any],
        log_metric: Callable[[str, float], None] | None,
    ) -> list[float | None]:
        """Replace failures by None, count and log them; raise when there are too many."""
        checked = [self._finite(*pair) for pair in zip(values, names, strict=True)]
        failures = [value for value in checked if isinstance(value, Exception)]
        self.seen += len(checked)
        self.failed += len(failures)
        self.scored += sum(isinstance(value, float) for value in checked)
        self._recent.extend(isinstance(value, Exception) for value in checked)
        if log_metric is not None and checked:
            log_metric(f"rewards/{self.__name__}/failed", len(failures) / len(checked))
        if failures:
            first = where(failures[0], self.function)
            why = f"reward {self.__name__} failed on %s; the first: {first}"
            logger.warning(why, f"{len(failures)} of {len(checked)} rows")
            share = sum(self._recent) / len(self._recent)
            if len(self._recent) >= _FEWEST and share > self._max_failures:
                limit = f"more than max_reward_failures={self._max_failures}"
                last = f"{share:.0%} of its last {len(self._recent)} rows, {limit}"
                raise RewardFailed(why % last)
        return [None if isinstance(value, Exception) else value for value in checked]


def text_of(completion: Any) -> str:
    """Return a completion's text, of TRL's conversational form or as it is."""
    if isinstance(completion, str):
        return completion
    return "".join(str(turn.get("content") or "") for turn in completion)


def _resolve(
    where: str, function: Callable[..., Any], params: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return a function and its params; a factory (a class, or `get_...`) is called with them."""
    if inspect.isclass(function) or function.__name__.startswith("get_"):
        taken = _parameters(where, function)
        if not any(item.kind is item.VAR_KEYWORD for item in taken):
            refuse_unknown(params, [item.name for item in taken], where)
        return _called(where, function, params), {}
    return function, params


def _guarded(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Return what the user's code returns, or the exception that it raises."""
    try:
        with user_code():
            return function(*given, **named)
    except InputError:
        raise
    except Exception as error:
        return error


def awaited(made: Any) -> Any:
    """Return a value; of an `async def`, what its coroutine returns.

    All run in one loop, as in TRL, so that a client which a function keeps open stays usable.
    """
    if not inspect.iscoroutine(made):
        return made
    return asyncio.run_coroutine_threadsafe(_contained(made), _loop()).result()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


async def _contained(value: Any) -> Any:
    """Await a coroutine; what ends a process must not end the loop."""
    with user_code():
        return await value if inspect.iscoroutine(value) else value


async def _gathered(values: Sequence[Any]) -> list[Any]:
    """Await the coroutines among some values together; an exception is returned in its place."""
    return await asyncio.gather(*map(_contained, values), return_exceptions=True)


def _called(where: str, function: Callable[..., Any], params: dict[str, Any]) -> Any:
    """Call the user's code while it is bound; raise `InputError` for whatever it raises."""
    try:
        made = _guarded(function, **params)
    except InputError as error:
        raise InputError(f"{where}{error}") from None
    if isinstance(made, Exception):
        raise InputError(f"{where}{described(made)}") from made
    return made


def _parameters(where: str, function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    if not parameters:
        raise InputError(f"{where}not a function with the completion as first argument")
    return parameters


def load_rewards(args: RewardArgs, columns: Collection[str]) -> list[Reward]:
    """Return the rewards of a configuration, each bound to columns that rows have.

    Raises `InputError` for an unknown function or key, a name that comes from nowhere, a file that
    cannot be imported, a weight that is no number, or two rewards of one name.
    """
    tags_of(args.transcript)
    share = args.max_reward_failures
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise InputError(f"max_reward_failures: {share!r} is not a share from 0 to 1")
    if not isinstance(args.rewards, list) or not args.rewards:
        raise InputError("rewards: name at least one, like [{fn: accuracy_reward, weight: 1.0}]")
    rewards = [Reward(spec, columns, args) for spec in args.rewards]
    for name, count in Counter(reward.__name__ for reward in rewards).items():
        if count > 1:
            raise InputError(f"rewards: {name!r} is there {count} times; give each its own `name:`")
    return rewards


def check_bound(rewards: Sequence[Reward], rows: Sequence[Row]) -> None:
    """Raise `InputError` for a reward that is limited to a task of which there are no rows."""
    tasks = {str(row.get("task")) for row in rows}
    for one in rewards:
        if one.task is not None and one.task not in tasks:
            wrong = f"reward {one.__name__}: no row is of task {one.task!r}"
            raise InputError(f"{wrong}; {hint(one.task, tasks)}")


def check_applicable(rewards: Sequence[Reward], rows: Sequence[Row]) -> None:
    """Raise `InputError` for rows to which no reward applies: nothing can be learnt from them."""
    check_bound(rewards, rows)
    if without := [row for row in rows if not any(reward.applies(row) for reward in rewards)]:
        raise InputError(
            f"rewards: none applies to {len(without)} of {len(rows)} rows, such as "
            f"{without[0].get('id')} of task {without[0].get('task')!r} with answer "
            f"{without[0].get('answer')!r}; add one that does, such as format_reward"
        )


def check_overlong(rewards: Sequence[Reward], longest: int) -> None:
    """Raise `InputError` for a length penalty whose limit is not that of the completions.

    It would apply to no completion, or to every one.
    """
    for reward in rewards:
        end = getattr(reward.function, "max_completion_len", longest)  # of TRL's soft_overlong
        if end != longest:
            raise InputError(
                f"reward {reward.__name__}: max_completion_len is {end}, but max_completion_length "
                f"of this stage is {longest}; make them the same"
            )


@dataclass(frozen=True)
class Score:
    """The rewards of one completion by name, None where one does not apply, and their sum."""

    rewards: dict[str, float | None]
    total: float | None


def total(rewards: Sequence[Any], values: Mapping[str, float | None]) -> float | None:
    """Return the weighted sum of the rewards that apply; None if none does."""
    parts = [r.weight * v for r in rewards if (v := values[r.__name__]) is not None]
    return sum(parts) if parts else None


def score(
    rewards: Sequence[Reward],
    rows: Sequence[Row],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
) -> list[Score]:
    """Score one completion per row, in order; the total is the weighted sum of what applies."""
    names = {key for row in rows for key in row} - BATCH_NAMES
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
    prompts = columns.pop("prompt", [None] * len(rows))
    if completion_ids is None and rows and all(row.get("completion_ids") for row in rows):
        completion_ids = [row["completion_ids"] for row in rows]
    by_name = {
        reward.__name__: reward(prompts, completions, completion_ids, **columns)
        for reward in rewards
    }
    given = [{name: values[i] for name, values in by_name.items()} for i in range(len(rows))]
    return [Score(one, total(rewards, one)) for one in given]
