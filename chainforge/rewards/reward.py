"""A reward as TRL calls it, with what a long run needs: neutral failures, and a limit to them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from chainforge.core.errors import Failed, InputError
from chainforge.core.records import Row
from chainforge.core.references import described, user_code
from chainforge.rewards.binding import BATCH_NAMES, Bound
from chainforge.rewards.functions import accuracy_reward

logger = logging.getLogger(__name__)

# A failure share over fewer rows says little; over more, it would forget a fault too slowly.
_FEWEST, _WINDOW = 64, 256
# GRPO squares a reward in float32: beyond this a group's advantages become inf or 0, silently.
_LARGEST = 1e12


class RewardFailed(Failed):
    """A reward failed on more rows than `max_reward_failures` allows; says which and why."""


class NotFinite(ValueError):
    """A reward that is NaN, infinite, or too large to compare."""


class Reward:
    """A reward function in TRL's batch form, named for TRL's metrics by `__name__`.

    None is "does not apply": rows of another task, rows without an answer where the function needs
    one, and rows where the function failed.
    `nonfinite` says which value of which row was the first that was NaN or infinite.
    """

    def __init__(
        self, bound: Bound, max_failures: float = 0.1, coin_seed: int | None = None
    ) -> None:
        self.__name__ = bound.name
        self.weight = bound.weight
        self.task = bound.task
        self.failed = 0
        self.seen = 0
        self.nonfinite: str | None = None
        self._bound = bound
        self._max_failures = max_failures
        self._coin_seed = coin_seed
        self._recent: deque[bool] = deque(maxlen=_WINDOW)

    @property
    def judges_correctness(self) -> bool:
        """Whether its value says if the answer is right: strictly, and nothing else."""
        strict = not self._bound.constants.get("lenient")
        return self._bound.function is accuracy_reward and strict and self._coin_seed is None

    @property
    def longest(self) -> int | None:
        """The length at which its penalty is largest, for TRL's soft overlong punishment."""
        return getattr(self._bound.function, "max_completion_len", None)

    def applies(self, row: Row) -> bool:
        """Whether it judges a row: one of its task, with an answer if it needs one."""
        if self.task is not None and row.get("task") != self.task:
            return False
        if row.get("answer", "") is not None or not self._bound.required & {"answer", "solution"}:
            return True
        return "entry" in self._bound.taken and bool(row.get("entry"))  # it judges by that

    def __repr__(self) -> str:
        return f"Reward({self.__name__!r}, weight={self.weight}, task={self.task!r})"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Return a reward per completion; `columns` hold a list each, one value per completion.

        Raises `RewardFailed` when too many of the last rows failed.
        """
        size = len(completions)
        known = {name: columns[name] for name in ("task", "answer", "entry") if columns.get(name)}
        rows = [i for i in range(size) if self.applies({name: known[name][i] for name in known})]
        chosen = {key: _pick(value, rows, len(completions)) for key, value in columns.items()}
        chosen["prompts"] = [prompts[i] for i in rows]
        chosen["completions"] = texts = [text_of(completions[i]) for i in rows]
        if completion_ids is not None:
            chosen["completion_ids"] = [completion_ids[i] for i in rows]
        if self._coin_seed is not None:
            values: list[Any] = self._flip(texts, chosen)
        elif self._bound.batch:
            extras = {"trainer_state": trainer_state, "log_metric": log_metric}
            values = self._call_batch(chosen | extras | {"log_extra": log_extra}, len(rows))
        else:
            values = self._call_rows(texts, chosen)
        finite = [self._finite(value) for value in values]
        names = chosen.get("id") or [f"number {i + 1}" for i in rows]
        self._note_nonfinite(finite, values, names)
        checked = self._check(finite, log_metric)
        rewards: list[float | None] = [None] * len(completions)
        for i, value in zip(rows, checked, strict=True):
            rewards[i] = value
        return rewards

    def _flip(self, texts: list[str], columns: dict[str, Any]) -> list[float]:
        """Flip a coin per row: the same for the same row and text, in a resumed run too."""
        names = columns.get("id") or [json.dumps(p, default=str) for p in columns["prompts"]]
        flips = []
        for name, text in zip(names, texts, strict=True):
            content = f"{self._coin_seed}\0{self.__name__}\0{name}\0{text}"
            digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=1)
            flips.append(float(digest.digest()[0] & 1))
        return flips

    def _call_batch(self, columns: dict[str, Any], size: int) -> list[Any]:
        """Call a function of TRL's form once; texts become messages, as its own rewards expect."""
        bound = self._bound
        messages = [[{"role": "assistant", "content": text}] for text in columns["completions"]]
        available = columns | {"completions": messages}
        if "answer" in columns:
            available.setdefault("solution", columns["answer"])
        self._need(bound.taken, available)
        names = {*bound.taken, *(available if bound.everything else ())} - set(bound.constants)
        given = {name: _column(available, name, size) for name in names}
        try:
            with user_code():
                values = list(bound.function(**given, **bound.constants))
            if len(values) != size:
                raise ValueError(f"it returned {len(values)} rewards for {size} completions")
        except InputError:
            raise
        except Exception as error:
            return [error] * size
        return values

    def _call_rows(self, texts: list[str], columns: dict[str, Any]) -> list[Any]:
        """Call a function once per row; a function with a `batch` attribute gets them all."""
        bound = self._bound
        columns = columns | {"prompt": columns["prompts"]}
        self._need(bound.taken, columns)
        taken = {name: _column(columns, name, len(texts)) for name in bound.taken}
        calls = [
            # A row without a value for an optional argument leaves it at its default.
            {name: values[i] for name, values in taken.items() if self._is_given(name, values[i])}
            | dict(bound.constants)
            for i in range(len(texts))
        ]
        if batch := getattr(bound.function, "batch", None):
            whole = [call | {"completion": text} for call, text in zip(calls, texts, strict=True)]
            with user_code():
                return list(batch(whole))
        return [self._call_one(text, call) for text, call in zip(texts, calls, strict=True)]

    def _is_given(self, name: str, value: Any) -> bool:
        return value is not None or name in self._bound.required

    def _call_one(self, text: str, call: dict[str, Any]) -> Any:
        try:
            with user_code():
                return self._bound.function(text, **call)
        except InputError:
            raise
        except Exception as error:
            return error

    def _need(self, names: Iterable[str], available: Collection[str]) -> None:
        """Raise for token ids that only a trainer has."""
        if "completion_ids" in names and "completion_ids" not in available:
            raise InputError(
                f"reward {self.__name__}: it needs the token ids of a completion, which these rows "
                "do not have (column `completion_ids`); leave it out of this stage's rewards"
            )

    def _finite(self, value: Any) -> float | Exception | None:
        """Return a reward as a float, None as it is, or why it is no reward."""
        if value is None or isinstance(value, Exception):
            return value
        if isinstance(value, str | bytes):
            return ValueError(f"it returned {value!r:.80}, which is no finite number")
        try:
            with user_code():
                number = float(value)
        except OverflowError:
            number = math.inf
        except Exception:
            return ValueError(f"it returned a {type(value).__name__}, which is no finite number")
        if abs(number) * max(1.0, abs(self.weight)) <= _LARGEST:
            return number
        return NotFinite(f"it returned {number!r:.80}, which is no finite number")

    def _note_nonfinite(self, finite: list[Any], values: list[Any], names: Sequence[Any]) -> None:
        for value, given, name in zip(finite, values, names, strict=True):
            if isinstance(value, NotFinite) and self.nonfinite is None:
                self.nonfinite = f"{given!r:.80} for a completion of row {name}"

    def _check(
        self, checked: list[Any], log_metric: Callable[[str, float], None] | None
    ) -> list[float | None]:
        """Make what failed neutral, count and log it; raise when it is too much."""
        failures = [value for value in checked if isinstance(value, Exception)]
        self.seen += len(checked)
        self.failed += len(failures)
        self._recent.extend(isinstance(value, Exception) for value in checked)
        if log_metric is not None and checked:
            log_metric(f"rewards/{self.__name__}/failed", len(failures) / len(checked))
        if failures:
            why = described(failures[0])
            logger.warning(
                "reward %s failed on %d of %d rows (%s); they are neutral",
                self.__name__,
                len(failures),
                len(checked),
                why,
            )
            share = sum(self._recent) / len(self._recent)
            if len(self._recent) >= _FEWEST and share > self._max_failures:
                raise RewardFailed(
                    f"reward {self.__name__} failed on {share:.0%} of its last "
                    f"{len(self._recent)} rows, more than max_reward_failures="
                    f"{self._max_failures}; the last: {why}"
                )
        return [None if isinstance(value, Exception) else value for value in checked]


def _pick(value: Any, rows: list[int], size: int) -> Any:
    """Return a column's values of some rows; what is no column stays as it is."""
    if isinstance(value, list | tuple) and len(value) == size:
        return [value[i] for i in rows]
    return value


def _column(columns: dict[str, Any], name: str, size: int) -> Any:
    """Return a column; `solution`, TRL's name for the gold answer, falls back to `answer`."""
    if name in columns:
        return columns[name]
    if name == "solution" and "answer" in columns:
        return columns["answer"]
    return None if name in BATCH_NAMES else [None] * size


def text_of(completion: Any) -> str:
    """Return a completion's text, of TRL's conversational form or as it is."""
    if isinstance(completion, str):
        return completion
    return "".join(str(turn.get("content") or "") for turn in completion)
