"""Read and check a chain file: its stages, and what each takes from the stages above it.

A chain is data, so that all of it is checked before anything starts. Every mistake is an
`InputError` that names the file, the stage and the key.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from chainforge.core import paths
from chainforge.core.artifacts import PATH_KEYS
from chainforge.core.config import SEEDS, read_yaml
from chainforge.core.errors import InputError, hint, plain
from chainforge.core.options import meant
from chainforge.core.secrets import check_settings
from chainforge.core.transcript import PRESETS
from chainforge.report.gates import Gate, read_gates

SAFE_NAME = re.compile(r"[A-Za-z0-9](?!.*\.\.)[A-Za-z0-9._-]{0,63}")
# What is beside the stages, and what a stage is called while it is made again.
TAKEN_NAMES = re.compile(r"chain\.json|report\..*|.*\.old-\d+")
REFERENCES = ("model", "models", "data", "teacher_model")
NO_LAUNCHER = "none"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TRAINING = "training"  # what a chain's `set` calls all recipes that train

Text = Annotated[str, Meta(min_length=1)]
Names = tuple[Text, ...]
Settings = dict[str, Any]
T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True)
class Recipe:
    """The keys that a recipe needs, the optional keys that it takes, and its outputs (`leaves`).

    The stages named under `data` must leave one of `reads`, and are passed to the recipe as the
    option `data_option`. `launched` by `accelerate launch`: always, when the stage itself asks
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
    "dpo": Recipe(needs=("model", "data"), leaves=("model",), trains=True, asks=False),
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


class Stage(msgspec.Struct, frozen=True):
    """One stage, by the keys of the chain file; references are names of stages or models, or paths.

    `size` is of the chain's tasks.
    """

    name: str
    recipe: Text
    config: Text | None = None
    model: Text | None = None
    teacher_model: Text | None = None
    models: Names = ()
    data: Names = ()
    launch: Text | None = None
    size: tuple[Annotated[int, Meta(gt=0)], ...] = ()
    settings: Settings = msgspec.field(name="set", default_factory=dict)
    gate: Any = None

    @property
    def kind(self) -> Recipe:
        """Return what its recipe needs, takes and leaves."""
        return RECIPES.get(self.recipe, OWN_RECIPE)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the names under which a chain's `set` reaches this stage, the widest first."""
        return (TRAINING, self.recipe) if self.kind.trains else (self.recipe,)

    @property
    def asks(self) -> bool:
        """Return whether it asks the questions of `tasks`; one that selects from data does not."""
        return self.kind.asks and not (self.kind.one_of and self.data)

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Return its quality gates."""
        return read_gates(self.gate, self.models)

    @property
    def references(self) -> list[tuple[str, str]]:
        """Return what the stage takes from elsewhere: each key with each of its names."""
        one = (("model", self.model), ("teacher_model", self.teacher_model))
        many = (("models", self.models), ("data", self.data))
        single = [(key, name) for key, name in one if name]
        return single + [(key, name) for key, names in many for name in names]


class Chain(msgspec.Struct, frozen=True):
    """A checked chain, by the keys of its file; `stages` run in the order of the file."""

    name: str
    stages: tuple[Stage, ...]
    base: Text | None = None
    models: dict[str, Text] = msgspec.field(default_factory=dict)  # with `base`, once checked
    seed: Annotated[int, Meta(ge=SEEDS[0], le=SEEDS[1])] | None = None
    transcript: str | None = None
    launch: Text | None = None
    report_to: Names = ()  # of the stages that train
    tasks: tuple[Settings, ...] = ()
    prompts: tuple[Text, ...] = ()  # without answers, beside `tasks`
    settings: dict[str, Settings] = msgspec.field(name="set", default_factory=dict)  # by recipe
    file: str = ""

    @property
    def folder(self) -> Path:
        """Return the folder of the chain file and of the configurations that it names."""
        return Path(self.file).parent

    def stage(self, name: str) -> Stage:
        """Return the stage of that name."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise InputError(f"{self.file}: no stage {name!r}: {hint(name, names)}")


def load_chain(reference: str | Path) -> Chain:
    """Read and check a chain file, given by its path or by a recipe folder's name."""
    file = find_chain(reference)
    given, folder = read_yaml(file), file.parent
    check_settings(given, str(file))
    with at(paths.short(file)):
        entries = given.get("stages")
        if not isinstance(entries, list) or not entries:
            raise InputError("key 'stages' must be a list of stages, each with a name and a recipe")
        stages = [_stage(entry, number, folder) for number, entry in enumerate(entries, start=1)]
        tasks, place = given.get("tasks"), folder
        if isinstance(tasks, str):
            path = existing(tasks, folder, "data")
            tasks, place = read_yaml(path).get("tasks"), path.parent
        check_settings(tasks, "key 'tasks'")
        chain = _convert(given | {"stages": stages, "tasks": tasks, "file": str(file)}, Chain)
        models = ({"base": chain.base} if chain.base else {}) | chain.models
        _check_chain(chain, list(models))
        return replace(
            chain,
            models={name: _model(name, value, folder) for name, value in models.items()},
            tasks=tuple(paths.anchored({"tasks": list(chain.tasks)}, place)["tasks"]),
            settings={kind: _settings(given, folder) for kind, given in chain.settings.items()},
        )


@contextlib.contextmanager
def at(where: str) -> Iterator[None]:
    """Prefix an `InputError` with the place where it was raised."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def safe_name(name: str) -> str:
    """Return a name that may become a folder's name and a word on a command line."""
    if not SAFE_NAME.fullmatch(name) or TAKEN_NAMES.fullmatch(name):
        raise InputError(
            f"{name!r} cannot name a folder of results: use 1 to 64 of A-Z a-z 0-9 . _ -, a letter "
            "or digit first, and not chain.json or report"
        )
    return name


def check_setting(key: Any, value: Any) -> None:
    """Refuse an override of what the chain itself decides, and what cannot be an option."""
    if key in PATH_KEYS:
        raise InputError(f"{key!r} is decided by the chain and cannot be set")
    if not str(key).isidentifier() or value is None:
        raise InputError(f"{key!r}: expected the name of an option and a value")


def _settings(given: Settings, folder: Path) -> Settings:
    """Check the overrides of a `set`, and return them with their paths as seen from here."""
    with at("key 'set'"):
        for key, value in given.items():
            check_setting(key, value)
        return paths.anchored(given, folder)


def _convert(given: Any, kind: type[T]) -> T:
    """Return a mapping as a `kind`; a single item becomes a list, and a null key is ignored."""
    if not isinstance(given, dict):
        raise InputError(f"expected `key: value` lines, not a {type(given).__name__}")
    known = [field.encode_name for field in msgspec.structs.fields(kind)]
    if odd := [key for key in map(str, given) if key not in known]:
        lines = [f"unknown key {key!r}{meant(key, known, close=0.6)}" for key in odd]
        lines += [f"the keys here are {', '.join(known)}; a recipe's settings go under `set`"]
        raise InputError("\n  ".join(lines))
    lists = {"models", "data", "size", "report_to"}
    values = {
        key: [value] if key in lists and isinstance(value, str | int) else value
        for key, value in given.items()
        if value is not None
    }
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        place, said = plain(error)
        if place == ".set[...]":
            said += "; it holds settings under a recipe's name or `training`"
        raise InputError(f"key {place[1:]!r}: {said}" if place else said) from None


def _stage(given: Any, number: int, folder: Path) -> Stage:
    """Read one stage, and check all that does not depend on others."""
    name = given.get("name") if isinstance(given, dict) else None
    with at(f"stage {name or number}"):
        stage = _convert(given, Stage)
        recipe, kind = stage.recipe, stage.kind
        safe_name(stage.name)
        if recipe not in RECIPES and not recipe.endswith(".py"):
            near = hint(recipe, RECIPES)
            raise InputError(f"no recipe {recipe!r} (or give your own .py): {near}")
        used = {key for key, _ in stage.references}
        if missing := set(kind.needs) - used:
            raise InputError(f"recipe {recipe} needs the key {missing.pop()!r}")
        if more := used - {*kind.needs, *kind.takes, *kind.one_of}:
            raise InputError(f"recipe {recipe} takes no {more.pop()!r}; leave the key out")
        if kind.one_of and len(used) != 1:
            raise InputError(f"recipe {recipe} needs one of the keys {' and '.join(kind.one_of)}")
        if stage.launch and kind.launched == "never":
            raise InputError(f"recipe {recipe} runs in one process; leave the key 'launch' out")
        read_gates(stage.gate, stage.models)
        return replace(
            stage,
            recipe=str(recipe_script(recipe, folder)) if kind is OWN_RECIPE else recipe,
            config=stage.config and str(folder / stage.config),
            settings=_settings(stage.settings, folder),
        )


def _check_chain(chain: Chain, models: Sequence[str]) -> None:
    """Check the chain's own keys, and what its stages take from one another."""
    safe_name(chain.name)
    if chain.transcript is not None and chain.transcript not in PRESETS:
        near = hint(chain.transcript, PRESETS)
        raise InputError(f"key 'transcript': no preset {chain.transcript!r}: {near}")
    known = {kind for stage in chain.stages for kind in (TRAINING, stage.recipe)}
    for kind in chain.settings.keys() - known:
        raise InputError(f"key 'set': no stage is of {kind!r}; {hint(kind, known)}")
    names = [*models, *(stage.name for stage in chain.stages)]
    for stage in chain.stages:
        with at(f"stage {stage.name}"):
            if names.count(stage.name) > 1:
                raise InputError("another stage or model has this name; rename one of them")
            if len(stage.size) > 1 and len(stage.size) != len(chain.tasks):
                raise InputError("key 'size': give one number, or one for each of `tasks`")
            for key, name in stage.references:
                _check_reference(key, name, stage, chain, models)


def _check_reference(
    key: str, name: str, stage: Stage, chain: Chain, models: Sequence[str]
) -> None:
    """Check that what a stage takes is a model, a path of data, or left by a stage above it."""
    what = "data" if key == "data" else "model"
    wanted = set(stage.kind.reads if what == "data" else ("model",))
    names = [other.name for other in chain.stages]
    giving = [other.name for other in chain.stages if wanted & set(other.kind.leaves)]
    giving += [] if what == "data" else models
    is_path = what == "data" and ("/" in name or name.endswith(".jsonl"))
    if what == "model" and "/" in name and name not in giving:
        raise InputError(f"key {key!r}: give {name!r} a name under `models` of the chain; use that")
    if name not in giving and not (is_path and name not in names):
        raise InputError(f"key {key!r}: {name!r} produces no {what}: {hint(name, giving)}")
    if name in names[names.index(stage.name) :]:
        move = f"move {name} up" if name != stage.name else "it is this one; name another"
        raise InputError(f"key {key!r}: stage {name} is not above this one; {move}")


def _model(name: str, value: str, folder: Path) -> str:
    """Return the directory or the Hub id of a model that the chain starts from."""
    with at(f"key {name!r}"):
        safe_name(name)
        found = paths.beside(value, folder)
        if any((found / file).is_file() for file in ("config.json", "adapter_config.json")):
            return str(found)
        if found.exists():
            raise InputError(f"{found} is not a model directory: it has no config.json")
        if not _HUB_ID.fullmatch(value):
            raise InputError(f"{value!r} is neither a folder in {paths.short(folder)} nor a Hub id")
        return value


def find_chain(reference: str | Path) -> Path:
    """Return the chain file for a path, a folder with a `chain.yaml`, or a recipe folder's name."""
    path, recipes = Path(reference), paths.shipped("recipes")
    for candidate in (path, path / "chain.yaml", recipes / path / "chain.yaml"):
        if candidate.is_file():
            return candidate
    names = [file.parent.name for file in recipes.glob("*/chain.yaml")]
    raise InputError(
        f"{reference}: no such chain; give the path of a chain.yaml, or a recipe folder's name: "
        f"{hint(str(reference), names)}"
    )


def recipe_script(recipe: str, folder: Path) -> Path:
    """Return the script of a built-in recipe, or the user's own `.py` file."""
    own = recipe.endswith(".py")
    return existing(recipe, folder, "recipe") if own else paths.shipped("recipes") / f"{recipe}.py"


def launch_file(name: str, folder: Path) -> Path:
    """Return the accelerate configuration that `launch:` names."""
    configs = {file.stem: file for file in paths.shipped("accelerate_configs").glob("*.yaml")}
    if name in configs:
        return configs[name]
    if name.endswith((".yaml", ".yml")):
        return existing(name, folder, "launch file")
    names = hint(name, [*configs, NO_LAUNCHER])
    raise InputError(f"no launch file {name!r} (or give a path to a .yaml): {names}")


def existing(name: str, folder: Path, what: str) -> Path:
    """Return where a path of a chain file leads; raise `InputError` where nothing is there."""
    found = paths.beside(name, folder)
    if not found.exists():
        raise InputError(
            f"no {what} {name!r} in {paths.short(folder)}: a path in a YAML starts at its folder"
        )
    return found
