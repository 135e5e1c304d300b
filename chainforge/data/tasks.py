"""Tasks: where Examples come from, and which split each belongs to.

A task is a function that yields rows. `load_examples` gives each row its prompt and id, keeps the
rows of the split that was asked for, and drops repeated questions. Membership of a split is decided
by the question's content (`split_of`), so that train, validation and test are disjoint, whatever
the seeds; a function that takes `split` itself (a Hub data set with its own splits) is trusted with
its rows, and tasks of different splits that share a question are an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from chainforge.core.errors import Failed, InputError, Stopped, first_line, hint, refuse_unknown
from chainforge.core.jsonl import Row
from chainforge.core.paths import unplaced
from chainforge.core.plugins import as_struct, resolve, user_code, where
from chainforge.core.transcript import DEFAULT, is_blank, tags_of
from chainforge.data.rows import wrong_turns
from chainforge.data.sources import (
    example,
    hub,
    jsonl,
    prompts,
    question,
    reasoning_gym,
    same_question,
    split_of,
)
from chainforge.rewards.confinement import confine, program
from chainforge.rewards.verify import VERIFIERS

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test", "all")
Source = Callable[..., Iterable[Row]]
BUILTINS: dict[str, Source] = {one.__name__: one for one in (reasoning_gym, jsonl, hub, prompts)}
SECONDS, MEMORY = 60, 2**31  # that a confined process may take: of a processor, and bytes
# A source has no more to give when this many items, and ten times as many as it gave distinct
# ones, brought nothing new: of D equally likely rows the last is then missed once in e^10.
PATIENCE = 2_000
# Columns of messages, which have a type of their own.
TURNS = ("prompt", "completion", "chosen", "rejected")


@dataclass
class TaskArgs:
    """Which questions are asked."""

    tasks: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={
            "help": "One mapping a task: {fn, params, size, split, seed, name}. `fn` is "
            "reasoning_gym, jsonl, hub, prompts, pkg.mod:fn or path/file.py:fn; `params` are its "
            "arguments; `size` rows (all when left out); `split` train, validation, test or all; "
            "`seed` draws other rows than the same task with another seed; `name` fills the "
            "column `task`."
        },
    )
    prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Prompts without answers, beside the tasks: all of them, in every stage. A "
            "longer list is a task: {fn: jsonl, params: {path: prompts.txt}}."
        },
    )
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System turn of every prompt that has none of its own. Left out: the text "
            "that belongs to the transcript preset. An empty string: no system turn."
        },
    )

    def __post_init__(self) -> None:
        """Make the prompts a task like the others."""
        if self.prompts:
            task = {"fn": "prompts", "params": {"prompts": self.prompts}, "split": "all"}
            self.tasks, self.prompts = [*self.tasks, task], []


class Task(msgspec.Struct, frozen=True):
    """One entry of `tasks`."""

    fn: str
    params: dict[str, Any] = {}
    size: Annotated[int, msgspec.Meta(ge=1)] | None = None
    split: str = "train"
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    name: str | None = None

    def own_seed(self, seed: int) -> int:
        """Derive a task's seed, far from that of any other task or run.

        reasoning-gym's item `i` of seed `s` is item `0` of seed `s + i`: seeds that are near each
        other share nearly all rows. The margin at the top leaves room to count up below 2^31.
        """
        named = [unplaced(self.fn), unplaced(self.params), self.seed, seed]
        content = json.dumps(named, sort_keys=True, default=str)
        return int(hashlib.sha256(content.encode()).hexdigest()[:15], 16) % (2**31 - 2**26)


def load_examples(args: TaskArgs, transcript: str = DEFAULT, seed: int = 0) -> list[Row]:
    """Load the Examples of all tasks, in the order in which the tasks are given.

    The rows depend on `args` and `seed` alone. No question comes twice: a later task passes over
    what an earlier one of the same split gave. Raises `InputError` for a task that cannot be read,
    has fewer rows than its `size`, or shares a question with a task of another split.
    """
    if not args.tasks:
        raise InputError(
            "tasks: none given; for instance [{fn: reasoning_gym, params: {dataset: chain_sum}, "
            "size: 500}], or prompts without answers as `prompts: [...]`"
        )
    asked = tags_of(transcript).system_prompt if args.system_prompt is None else args.system_prompt
    tasks = {}
    for index, raw in enumerate(args.tasks):
        task = as_struct(raw, Task, f"tasks[{index}]")
        if task.split not in SPLITS:
            raise InputError(f"tasks[{index}].split: {task.split!r}; {hint(task.split, SPLITS)}")
        tasks[f"tasks[{index}] ({task.fn})"] = task
    owners: dict[str, tuple[str, Task]] = {}
    rows = [row for place, task in tasks.items() for row in _select(place, task, seed, owners)]
    for row in rows:
        if asked and row["prompt"][0]["role"] != "system":
            row["prompt"] = [{"role": "system", "content": asked}, *row["prompt"]]
        row.pop("id", None)
    return [example(**row) for row in rows]


@lru_cache(maxsize=8)
def load_confined(asked: str) -> list[Row]:
    """Return `load_examples` of settings that others wrote: JSON of tasks, system turn and so on.

    A confined process makes them. The tasks may be reasoning-gym's alone: no code, no files.
    """
    run = partial(subprocess.run, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        rows = json.loads(run(program(__name__), input=asked, timeout=20 * SECONDS).stdout)
    except (subprocess.TimeoutExpired, ValueError):
        rows = f"they take more than {SECONDS} s, or too much memory"
    if isinstance(rows, str):
        raise InputError(f"the rows cannot be made again: {rows}")
    return list(rows)


def main() -> None:
    """Make the rows of `load_confined`, in its process: settings in, rows or a message out."""
    import resource  # which Windows lacks

    import reasoning_gym  # noqa: F401 (before its files cannot be read)

    tasks, asked, transcript, seed = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    confine(MEMORY)
    try:
        json.dump(load_examples(TaskArgs(tasks, system_prompt=asked), transcript, seed), sys.stdout)
    except Exception as error:
        json.dump(first_line(error), sys.stdout)


def _arguments(task: Task, function: Source, seed: int) -> dict[str, Any]:
    """Return what a task's function is called with; raise `InputError` for a wrong name."""
    offered = {"size": task.size, "split": task.split, "seed": task.own_seed(seed)}
    for key in offered.keys() & task.params.keys():
        raise InputError(f"give `{key}` beside `params`, not in it")
    signature = inspect.signature(function)
    names = signature.parameters
    if not any(item.kind is item.VAR_KEYWORD for item in names.values()):
        refuse_unknown(task.params, names.keys() - offered.keys(), "params: ")
    given = task.params | {key: value for key, value in offered.items() if key in names}
    signature.bind(**given)
    return given


def _yielded(function: Source, arguments: dict[str, Any]) -> Iterator[Any]:
    """Yield the rows of the user's function; a `sys.exit` in it is an error like any other."""
    with user_code():
        rows = function(**arguments)
        if not isinstance(rows, Iterable) or isinstance(rows, str | dict):
            raise InputError(f"must give rows, it gave a {type(rows).__name__}")
        rows = iter(rows)
    end = object()
    while True:
        with user_code():
            row = next(rows, end)
        if row is end:
            return
        yield row


def _as_example(raw: Any, task: Task, where: str) -> Row:
    """Return a row that a task yielded as an Example without system turn."""
    if not isinstance(raw, dict):
        raise InputError(f"{where}: expected a mapping, found {type(raw).__name__}")
    row = {key: value for key, value in raw.items() if key not in ("question", "prompt")}
    turns = raw.get("prompt")
    if turns is None and "question" in raw:
        turns = [{"role": "user", "content": raw["question"]}]
    if wrong := wrong_turns(turns):
        raise InputError(f"{where}: {wrong}")
    answer, verifier = raw.get("answer"), raw.get("verifier") or "math"
    if answer is not None and not isinstance(answer, str):
        raise InputError(f"{where}: `answer` must be text, found {answer!r}")
    # An entry of reasoning-gym may be scored by its data set without any single right answer.
    if answer is not None and is_blank(answer) and "entry" not in raw:
        raise InputError(f"{where}: `answer` is empty; leave it out where there is none")
    if verifier not in VERIFIERS:
        raise InputError(f"{where}: no verifier {verifier!r}; {hint(str(verifier), VERIFIERS)}")
    if verifier == "reasoning_gym" and "entry" not in raw:
        raise InputError(f"{where}: the verifier reasoning_gym needs the column `entry`")
    name = task.name or raw.get("task") or task.fn.rpartition(":")[2]
    return row | {"answer": answer, "task": name, "verifier": verifier, "prompt": turns}


def _rows(place: str, task: Task, seed: int) -> Iterator[tuple[Row, bool]]:
    """Yield Examples, each with whether it certainly belongs to the task's split.

    Raises `InputError`, which names the task's place, for whatever its function raises.
    """
    function = resolve(task.fn, BUILTINS)
    try:
        given = _arguments(task, function, seed)
        certain = "split" in given or task.split == "all"
        for number, row in enumerate(_yielded(function, given), start=1):
            yield _as_example(row, task, f"row {number}"), certain
    except (Failed, Stopped):
        raise
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    except Exception as error:
        raise InputError(f"{place}: {where(error, function)}") from error


def _select(
    place: str, task: Task, seed: int, owners: dict[str, tuple[str, Task]]
) -> Iterator[Row]:
    """Yield rows of the task's split, each question once, until `size` are found."""
    seen: set[str] = set()
    found = repeated = idle = 0
    for row, certain in _rows(place, task, seed):
        if found == task.size or idle > PATIENCE + 10 * len(seen):
            break
        key = same_question(question(row))
        idle += 1
        if key in seen:
            repeated += 1
            continue
        seen.add(key)
        idle = 0
        if not certain and split_of(key) != task.split:
            continue
        other, owner = owners.setdefault(key, (place, task))
        if owner.split != task.split:
            raise InputError(
                f"{other} (split {owner.split}) and {place} (split {task.split}) share "
                f"a question: {key:.80}; take both from disjoint splits"
            )
        if owner is task:
            found += 1
            yield row
        else:
            repeated += 1
    if found < (task.size or 1):
        asked = f"{task.size} were asked for" if task.size else "there must be at least one"
        raise InputError(
            f"{place}: only {found} distinct rows of split {task.split!r} exist "
            f"({len(seen)} in all splits), {asked}; lower `size`, or widen the task by its `params`"
        )
    if repeated and task.size is None:
        logger.warning("%s: left out %d repeated questions", place, repeated)


def grpo_dataset(rows: Sequence[Row]) -> Dataset:
    """Return Examples as a data set for GRPO: every column, so that rewards find theirs by name.

    A column that Arrow cannot hold as it is (mappings, mixed types) becomes JSON text.
    """
    from datasets import Dataset

    if not rows:
        raise InputError("no rows to train on")
    for number, row in enumerate(rows, start=1):
        if wrong := wrong_turns(row.get("prompt")):
            raise InputError(f"row {number}: {wrong}")
    return Dataset.from_dict(columns_of(rows))


def check_batch(rows: Sequence[Row], generation_batch_size: int, num_generations: int) -> None:
    """Raise `InputError` unless the rows fill one generation batch.

    With fewer, TRL ends after 0 steps without an error; the last incomplete batch is left out.
    """
    prompts = generation_batch_size // num_generations
    if len(rows) < prompts:
        raise InputError(
            f"{len(rows)} rows are fewer than the {prompts} prompts of one generation batch "
            f"({generation_batch_size} completions, {num_generations} a prompt): raise the tasks' "
            "`size`, or lower per_device_train_batch_size or gradient_accumulation_steps"
        )


def columns_of(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Return rows as columns of one type each; what a row lacks is None."""
    return {
        name: values if name in TURNS or type_of(name, values) else texts(values)
        for name, values in raw_columns(rows).items()
    }


def raw_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Return rows as columns; what a row lacks is None."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def type_of(name: str, values: list[Any]) -> Any:
    """Return a column's Arrow type; None where Arrow would change a value, so that it is text."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if len(kinds) <= 1 or kinds == {int, float}:
        with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeEncodeError):
            # Arrow would give every mapping the keys of all, so mappings are text too.
            found = pa.array(values).type
            return found if name in TURNS or "struct" not in str(found) else None
    return None


def texts(values: list[Any]) -> list[Any]:
    """Return a column's values as JSON text."""
    return [None if value is None else json.dumps(value, default=str) for value in values]
