"""Read a chain: which stages there are, what each takes, and in which order they run.

A chain is data, so that all of it is checked before anything starts. Every mistake is an
`InputError` that names the file, the stage, the key and what to write instead.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chainforge.core import paths
from chainforge.core.artifacts import PATH_KEYS
from chainforge.core.config import SEEDS, read_yaml
from chainforge.core.errors import InputError, hint, refuse_unknown
from chainforge.core.secrets import check_settings
from chainforge.core.transcript import PRESETS
from chainforge.report.gates import Gate, read_gates

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What is beside the stages, and what a stage is called while it is made again.
TAKEN_NAMES = re.compile(r"chain\.json|report\..*|.*\.old-\d+")
REFERENCES = ("model", "models", "data", "teacher_model")
CHAIN_KEYS = ("name", "base", "models", "seed", "transcript", "launch", "report_to", "tasks", "set",
              "stages")  # fmt: skip
STAGE_KEYS = ("name", "recipe", "config", *REFERENCES, "launch", "size", "set", "gate")
TRAINING = "training"  # what a chain's `set` calls all recipes that train


@dataclass(frozen=True)
class Recipe:
    """What a recipe must be given, what it may be given besides, and what it leaves.

    What is named under `data` must be left by a stage as one of `reads`, and reaches the recipe as
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
    trains: bool = False
    asks: bool = True  # questions of `tasks`


RECIPES = {
    "collect": Recipe(leaves=("data",), launched="never"),
    "sft": Recipe(needs=("model", "data"), leaves=("model",), trains=True, asks=False),
    "grpo": Recipe(
        needs=("model",),
        takes=("data",),
        leaves=("model", "rollouts"),
        reads=("data", "rollouts"),
        data_option="gate_pool",
        trains=True,
    ),
    "reject": Recipe(
        one_of=("model", "data"),
        leaves=("data",),
        reads=("data", "rollouts"),
        data_option="pool",
        launched="asked",
    ),
    "distill": Recipe(needs=("model", "teacher_model"), leaves=("model",), trains=True),
    "evaluate": Recipe(needs=("models",), launched="asked"),
}
OWN_RECIPE = Recipe(takes=REFERENCES, leaves=("model", "data"), asks=False)


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
    size: tuple[int, ...] = ()  # of the chain's tasks
    settings: dict[str, Any] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()

    @property
    def kind(self) -> Recipe:
        """Return what its recipe needs, takes and leaves."""
        return RECIPES.get(self.recipe, OWN_RECIPE)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return what a chain's `set` may call it, the widest word first."""
        return (TRAINING, self.recipe) if self.kind.trains else (self.recipe,)

    @property
    def asks(self) -> bool:
        """Return whether it asks the questions of `tasks`; one that selects from data does not."""
        return self.kind.asks and not (self.kind.one_of and self.data)

    @property
    def references(self) -> tuple[str, ...]:
        """Return everything that the stage takes from elsewhere, by name."""
        single = (self.model, self.teacher_model)
        return (*(name for name in single if name), *self.models, *self.data)


@dataclass(frozen=True)
class Chain:
    """A checked chain; `stages` are in the order in which they run."""

    name: str
    file: Path
    models: dict[str, str]
    stages: tuple[Stage, ...]
    launch: str | None = None
    common: dict[str, Any] = field(default_factory=dict)  # seed, transcript: of every stage
    report_to: tuple[str, ...] = ()  # trackers, of the stages that train
    tasks: tuple[dict[str, Any], ...] = ()
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # by kind of stage

    @property
    def folder(self) -> Path:
        """Return the folder of the chain file and of the configurations that it names."""
        return self.file.parent

    def stage(self, name: str) -> Stage:
        """Return the stage of that name."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise InputError(f"{self.file}: no stage {name!r}: {hint(name, names)}")


def load_chain(reference: str | Path) -> Chain:
    """Read and check a chain file, given by its path or by a recipe folder's name."""
    file = paths.find_chain(reference)
    given, folder = read_yaml(file), file.parent
    check_settings(given, str(file))
    with at(paths.short(file)):
        _check_keys(given, CHAIN_KEYS)
        models = _models(given, folder)
        stages = _stages(given, folder)
        _check_references(stages, models, folder)
        return Chain(
            name=safe_name(given.get("name"), "name"),
            file=file,
            models=models,
            stages=tuple(_in_order(stages)),
            launch=_launch(given, folder),
            common=_common(given),
            report_to=_names(given, "report_to"),
            tasks=_tasks(given, folder),
            settings=_settings_by_kind(given, stages, folder),
        )


@contextlib.contextmanager
def at(where: str) -> Iterator[None]:
    """Name the place in which an `InputError` arose."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


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
    """Refuse an override of what the chain itself decides, and what cannot be an option."""
    if key in PATH_KEYS:
        raise InputError(f"{key!r} is decided by the chain and cannot be set")
    if not key.isidentifier():
        raise InputError(f"{key!r} is not the name of an option")
    if value is None:
        raise InputError(f"{key!r} has no value; leave it out to get the default")


def _check_keys(given: Any, known: tuple[str, ...]) -> None:
    if not isinstance(given, dict):
        raise InputError(f"expected `key: value` lines, not a {type(given).__name__}")
    refuse_unknown(given, known)


def _text(given: dict[str, Any], key: str) -> str | None:
    value = given.get(key)
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    raise InputError(f"key {key!r} must be a text, not {value!r}")


def _names(given: dict[str, Any], key: str) -> tuple[str, ...]:
    """Return a list of references, or one alone."""
    value = given.get(key)
    names = value if isinstance(value, list) else [] if value is None else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise InputError(f"key {key!r} must be a name or a list of names, not {value!r}")
    if len(set(names)) < len(names):
        raise InputError(f"key {key!r} names the same thing twice: {', '.join(names)}")
    return tuple(names)


def _common(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that every stage gets."""
    seed, transcript = given.get("seed"), given.get("transcript")
    if seed is not None and not (type(seed) is int and SEEDS[0] <= seed <= SEEDS[1]):
        raise InputError(f"key 'seed' must be a whole number from 0 to {SEEDS[1]}, not {seed!r}")
    if transcript is not None and not (isinstance(transcript, str) and transcript in PRESETS):
        raise InputError(f"key 'transcript': no preset {transcript!r}: "
                         f"{hint(str(transcript), PRESETS)}")  # fmt: skip
    found = {"seed": seed, "transcript": transcript}
    return {key: value for key, value in found.items() if value is not None}


def _tasks(given: dict[str, Any], folder: Path) -> tuple[dict[str, Any], ...]:
    """Return the tasks of all stages: a list, or a YAML file with one."""
    tasks = given.get("tasks") or []
    if isinstance(tasks, str):
        file = paths.data_path(tasks, folder)
        tasks, folder = read_yaml(file).get("tasks"), file.parent
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise InputError("key 'tasks' must be a list of tasks such as {fn: jsonl, params: "
                         "{path: problems.jsonl}}, or a YAML file that has one")  # fmt: skip
    check_settings(tasks, "key 'tasks'")
    return tuple(paths.anchored({"tasks": tasks}, folder)["tasks"])


def _models(given: dict[str, Any], folder: Path) -> dict[str, str]:
    """Return every model that the chain starts from: `base`, and those under `models`."""
    extra = given.get("models") or {}
    if not isinstance(extra, dict):
        raise InputError("key 'models' must map names to paths or Hub ids")
    if "base" in extra:
        raise InputError("key 'models': 'base' has a key of its own, beside 'models'")
    base = {"base": given["base"]} if given.get("base") is not None else {}
    models: dict[str, str] = {}
    for name, value in (base | extra).items():
        key = name if name == "base" else f"models.{name}"
        safe_name(name, key)
        if not isinstance(value, str) or not value:
            raise InputError(f"key {key!r} must be a path or a Hub id, not {value!r}")
        with at(f"key {key!r}"):
            models[name] = paths.model_path(value, folder)
    return models


def _stages(given: dict[str, Any], folder: Path) -> list[Stage]:
    entries = given.get("stages")
    if not isinstance(entries, list) or not entries:
        raise InputError("key 'stages' must be a list of stages, each with a name and a recipe")
    stages: list[Stage] = []
    for number, entry in enumerate(entries, start=1):
        label = entry.get("name") if isinstance(entry, dict) else None
        with at(f"stage {label or number}"):
            stage = _stage(entry, folder)
            if stage.name in {other.name for other in stages}:
                raise InputError("two stages have this name; each needs its own")
            if len(stage.size) > 1 and len(stage.size) != len(_tasks(given, folder)):
                raise InputError("key 'size': give one number, or one for each of `tasks`")
            stages.append(stage)
    return stages


def _stage(given: Any, folder: Path) -> Stage:
    _check_keys(given, STAGE_KEYS)
    stage = Stage(
        name=safe_name(given.get("name"), "name"),
        recipe=_recipe(given, folder),
        config=_config(given, folder),
        model=_text(given, "model"),
        teacher_model=_text(given, "teacher_model"),
        models=_names(given, "models"),
        data=_names(given, "data"),
        launch=_launch(given, folder),
        size=_sizes(given.get("size")),
        settings=_settings(given, folder),
        gates=read_gates(given.get("gate"), _names(given, "models")),
    )
    recipe, kind = stage.recipe, stage.kind
    if stage.launch and kind.launched == "never":
        raise InputError(f"recipe {recipe} runs in one process; leave the key 'launch' out")
    for key in REFERENCES:
        if key in kind.needs and not given.get(key):
            raise InputError(f"recipe {recipe} needs the key {key!r}")
        if given.get(key) and key not in kind.needs + kind.takes + kind.one_of:
            raise InputError(f"recipe {recipe} takes no {key!r}; leave the key out")
    if kind.one_of and sum(bool(given.get(key)) for key in kind.one_of) != 1:
        keys = " or ".join(map(repr, kind.one_of))
        raise InputError(f"recipe {recipe} needs the key {keys}, and not both")
    return stage


def _recipe(given: dict[str, Any], folder: Path) -> str:
    recipe = _text(given, "recipe")
    if recipe is None:
        raise InputError(f"key 'recipe' is missing (or give your own .py); {hint('', RECIPES)}")
    if recipe.endswith(".py"):
        return str(paths.recipe_script(recipe, folder))
    if recipe not in RECIPES:
        raise InputError(f"no recipe {recipe!r} (or give your own .py): {hint(recipe, RECIPES)}")
    return recipe


def _config(given: dict[str, Any], folder: Path) -> Path | None:
    name = _text(given, "config")
    if name is None:
        return None
    path = folder / name
    if not path.is_file():
        there = [file.name for file in folder.glob("*.yaml")]
        raise InputError(f"key 'config': no file {paths.short(path)}; {hint(name, there)}")
    check_settings(read_yaml(path), str(path))
    return path


def _launch(given: dict[str, Any], folder: Path) -> str | None:
    launch = _text(given, "launch")
    if launch is not None:
        with at("key 'launch'"):
            paths.launch_file(launch, folder)
    return launch


def _sizes(value: Any) -> tuple[int, ...]:
    sizes = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise InputError(f"key 'size' must be a number of rows for each task, not {value!r}")
    return tuple(sizes)


def _settings(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    settings = given.get("set") or {}
    if not isinstance(settings, dict):
        raise InputError("key 'set' must map option names to values, such as {max_steps: 10}")
    with at("key 'set'"):
        for key, value in settings.items():
            check_setting(str(key), value)
        return paths.anchored(settings, folder)


def _settings_by_kind(
    given: dict[str, Any], stages: Sequence[Stage], folder: Path
) -> dict[str, dict[str, Any]]:
    """Return the chain's own `set`: settings for every stage of a recipe, or for all training."""
    kinds = given.get("set") or {}
    known = {TRAINING, *(stage.recipe for stage in stages)}
    if not isinstance(kinds, dict):
        raise InputError(f"key 'set' must map recipes, or {TRAINING}, to settings")
    found: dict[str, dict[str, Any]] = {}
    for kind, settings in kinds.items():
        if kind not in known:
            raise InputError(f"key 'set': no stage is of {kind!r}; {hint(str(kind), known)}")
        with at(f"key 'set', {kind}"):
            found[str(kind)] = _settings({"set": settings}, folder)
    return found


def _in_order(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages with each after all that it takes from; else in the file's order."""
    waiting, done = list(stages), set[str]()
    by_name = {stage.name: stage for stage in stages}
    ordered: list[Stage] = []
    while waiting:
        ready = next((s for s in waiting if not (by_name.keys() & set(s.references)) - done), None)
        if ready is None:  # every stage that is left waits: follow one until it comes round
            path = [waiting[0].name]
            left = {stage.name for stage in waiting}
            while path[-1] not in path[:-1]:
                path.append(next(name for name in by_name[path[-1]].references if name in left))
            cycle = path[path.index(path[-1]) :]
            raise InputError(f"stages wait for one another: {' -> '.join(cycle)}")
        waiting.remove(ready)
        done.add(ready.name)
        ordered.append(ready)
    return ordered


def _check_references(stages: list[Stage], models: dict[str, str], folder: Path) -> None:
    """Check that every reference leads to a model, a stage or a path that can serve."""
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        with at(f"stage {stage.name}"):
            if stage.name in models:
                raise InputError("a model of this chain has the same name; rename one of them")
            wanted = {"model": [stage.model], "teacher_model": [stage.teacher_model],
                      "models": stage.models}  # fmt: skip
            for key, names in wanted.items():
                for name in names:
                    if name and name not in models:
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
