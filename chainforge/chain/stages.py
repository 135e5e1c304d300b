"""What a stage of a chain is: its recipe, what it takes from other stages, and when it may run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chainforge.core import paths
from chainforge.core.artifacts import PATH_KEYS
from chainforge.core.errors import InputError, hint
from chainforge.report.gates import Gate
from chainforge.train.settings import TRAINED

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What lies beside the stages, and what a stage is called while it is made anew.
TAKEN_NAMES = re.compile(r"chain\.json|report\..*|.*\.old-\d+")
REFERENCES = ("model", "models", "data", "teacher_model")


@dataclass(frozen=True)
class Recipe:
    """What a recipe must be given, what it may be given besides, and what it leaves behind.

    What stands under `data` must be left by a stage as one of `reads`, and reaches the recipe as
    the option `data_option`. `launched` by `accelerate launch`: always, when the stage itself asks
    for it with `launch`, or never.
    """

    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()  # exactly one of these
    reads: tuple[str, ...] = ("data",)
    data_option: str = "data"
    launched: Literal["always", "asked", "never"] = "always"


RECIPES = {
    "collect": Recipe(leaves=("data",), launched="never"),
    "sft": Recipe(needs=("model", "data"), leaves=("model",)),
    "grpo": Recipe(
        needs=("model",),
        takes=("data",),
        leaves=("model", "rollouts"),
        reads=("data", "rollouts"),
        data_option="gate_pool",
    ),
    "reject": Recipe(
        one_of=("model", "data"),
        leaves=("data",),
        reads=("data", "rollouts"),
        data_option="pool",
        launched="asked",
    ),
    "distill": Recipe(needs=("model", "teacher_model"), leaves=("model",)),
    "evaluate": Recipe(needs=("models",), launched="asked"),
}
TRAINING = "training"  # what a chain's `set` calls all that train together
OWN_RECIPE = Recipe(takes=REFERENCES, leaves=("model", "data"))


@dataclass(frozen=True)
class Stage:
    """One stage as the chain file has it; references are names of stages or models, or paths."""

    name: str
    recipe: str
    config: Path | None = None
    model: str | None = None
    teacher_model: str | None = None
    models: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    launch: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()

    @property
    def kind(self) -> Recipe:
        """What its recipe needs, takes and leaves."""
        return RECIPES.get(self.recipe, OWN_RECIPE)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a chain's `set` may call it, the widest word first."""
        return (TRAINING, self.recipe) if self.recipe in TRAINED else (self.recipe,)

    @property
    def references(self) -> tuple[str, ...]:
        """Everything that the stage takes from elsewhere, by name."""
        single = (self.model, self.teacher_model)
        return (*(name for name in single if name), *self.models, *self.data)


def in_order(stages: Iterable[Stage]) -> list[Stage]:
    """Return the stages with each after all that it takes from; else in the file's order."""
    waiting = list(stages)
    names = {stage.name for stage in waiting}
    done: set[str] = set()
    ordered: list[Stage] = []
    while waiting:
        ready = next((s for s in waiting if not (names & set(s.references)) - done), None)
        if ready is None:
            raise InputError(f"stages wait for one another: {' -> '.join(_cycle(waiting))}")
        waiting.remove(ready)
        done.add(ready.name)
        ordered.append(ready)
    return ordered


def _cycle(stages: list[Stage]) -> list[str]:
    """Return the members of one cycle, the first again at the end; every stage here waits."""
    by_name = {stage.name: stage for stage in stages}
    path = [stages[0].name]
    while path[-1] not in path[:-1]:
        path.append(next(name for name in by_name[path[-1]].references if name in by_name))
    return path[path.index(path[-1]) :]


def safe_name(value: Any, key: str) -> str:
    """Return a name that may become a folder's name and a word on a command line."""
    if value is None:
        raise InputError(f"key {key!r} is missing")
    if not isinstance(value, str) or not SAFE_NAME.fullmatch(value) or ".." in value:
        raise InputError(
            f"key {key!r}: {value!r} cannot name a folder; use 1 to 64 of A-Z a-z 0-9 . _ -, "
            "a letter or digit first, no '..'"
        )
    if TAKEN_NAMES.fullmatch(value):
        raise InputError(f"key {key!r}: {value!r} is the name of a file that the chain writes")
    return value


def check_setting(key: str, value: Any) -> None:
    """Refuse an override of what the chain itself decides, and what is no option at all."""
    if key in PATH_KEYS:
        raise InputError(f"{key!r} is decided by the chain and cannot be set")
    if not key.isidentifier():
        raise InputError(f"{key!r} is not the name of an option")
    if value is None:
        raise InputError(f"{key!r} has no value; leave it out to get the default")


def check_references(stages: list[Stage], models: dict[str, str], folder: Path) -> None:
    """See that every reference leads to a model, a stage or a path that can serve."""
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        with at(f"stage {stage.name}"):
            if stage.name in models:
                raise InputError("a model of this chain has the same name; rename one of them")
            for key in ("model", "teacher_model", "models"):
                value = getattr(stage, key)
                for name in value if isinstance(value, tuple) else (value,) if value else ():
                    if name not in models:
                        _check_leaves(key, name, ("model",), by_name, models)
            for name in stage.data:
                if name not in by_name and ("/" in name or name.endswith(".jsonl")):
                    paths.data_path(name, folder)
                else:
                    _check_leaves("data", name, stage.kind.reads, by_name, {})


def _check_leaves(
    key: str, name: str, what: tuple[str, ...], stages: dict[str, Stage], models: dict[str, str]
) -> None:
    """Check that `name` is a stage that leaves one of `what`."""
    leaving = [other for other, stage in stages.items() if set(what) & set(stage.kind.leaves)]
    if name not in stages:
        known = hint(name, [*models, *leaving])
        raise InputError(f"key {key!r}: no stage or model {name!r}: {known}")
    if name not in leaving:
        raise InputError(
            f"key {key!r}: stage {name!r} ({stages[name].recipe}) leaves no {what[0]}; "
            f"these do: {', '.join([*models, *leaving]) or 'none'}"
        )


@contextlib.contextmanager
def at(where: str) -> Iterator[None]:
    """Name the file in which an `InputError` arose."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
