"""Read a chain: which stages there are, what each takes, and in which order they run.

A chain is data, so that it can be checked whole before anything starts. Every mistake is an
`InputError` that names the file, the stage, the key and what to write instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chainforge.chain.stages import (
    RECIPES,
    REFERENCES,
    TRAINING,
    Stage,
    at,
    check_references,
    check_setting,
    in_order,
    safe_name,
)
from chainforge.core import paths
from chainforge.core.errors import InputError, hint, refuse_unknown
from chainforge.core.options import SEEDS
from chainforge.core.paths import anchored
from chainforge.core.secrets import check_settings
from chainforge.core.transcript import PRESETS
from chainforge.core.yaml12 import read_yaml
from chainforge.report.gates import read_gates

CHAIN_KEYS = (
    "name", "base", "models", "seed", "transcript", "launch", "report_to", "set", "stages",
)  # fmt: skip
STAGE_KEYS = ("name", "recipe", "config", *REFERENCES, "launch", "set", "gate")


@dataclass(frozen=True)
class Chain:
    """A checked chain; `stages` stand in the order in which they run."""

    name: str
    file: Path
    models: dict[str, str]
    stages: tuple[Stage, ...]
    seed: int | None = None
    transcript: str | None = None
    launch: str | None = None
    report_to: tuple[str, ...] = ()  # trackers, of the stages that train
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # by kind of stage

    @property
    def folder(self) -> Path:
        """Where the chain file lies, and the configurations that it names."""
        return self.file.parent

    def stage(self, name: str) -> Stage:
        """Return the stage of that name."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise InputError(f"{self.file}: no stage {name!r}: {hint(name, names)}")

    def is_stage(self, name: str) -> bool:
        """Tell a stage's name from a model's or a path."""
        return any(stage.name == name for stage in self.stages)


def load_chain(reference: str | Path) -> Chain:
    """Read and check a chain file, given by its path or by a recipe folder's name."""
    file = paths.find_chain(reference)
    given = read_yaml(file)
    check_settings(given, str(file))
    try:
        _check_keys(given, CHAIN_KEYS)
        name = safe_name(given.get("name"), "name")
        models = _models(given, file.parent)
        stages = _stages(given.get("stages"), file.parent)
        check_references(stages, models, file.parent)
        return Chain(
            name=name,
            file=file,
            models=models,
            stages=tuple(in_order(stages)),
            seed=_seed(given.get("seed")),
            transcript=_transcript(given.get("transcript")),
            launch=_launch(given, file.parent),
            report_to=_names(given, "report_to"),
            settings=_settings_by_kind(given, stages, file.parent),
        )
    except InputError as error:
        raise InputError(f"{paths.short(file)}: {error}") from None


def _check_keys(given: Any, known: tuple[str, ...]) -> None:
    if not isinstance(given, dict):
        raise InputError(f"expected `key: value` lines, not a {type(given).__name__}")
    refuse_unknown(given, known)


def _text(given: dict[str, Any], key: str) -> str | None:
    value = given.get(key)
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    raise InputError(f"key {key!r} must be a text, not {value!r}")


def _seed(value: Any) -> int | None:
    if value is None or (type(value) is int and SEEDS[0] <= value <= SEEDS[1]):
        return value
    raise InputError(f"key 'seed' must be a whole number from 0 to {SEEDS[1]}, not {value!r}")


def _transcript(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value in PRESETS):
        return value
    raise InputError(f"key 'transcript': no preset {value!r}: {hint(str(value), PRESETS)}")


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


def _stages(given: Any, folder: Path) -> list[Stage]:
    if not isinstance(given, list) or not given:
        raise InputError("key 'stages' must be a list of stages, each with a name and a recipe")
    stages: list[Stage] = []
    for number, entry in enumerate(given, start=1):
        label = entry.get("name") if isinstance(entry, dict) else None
        with at(f"stage {label or number}"):
            stage = _stage(entry, folder)
            if stage.name in {other.name for other in stages}:
                raise InputError("two stages have this name; each needs its own")
            stages.append(stage)
    return stages


def _stage(given: Any, folder: Path) -> Stage:
    _check_keys(given, STAGE_KEYS)
    name = safe_name(given.get("name"), "name")
    recipe = _recipe(given, folder)
    stage = Stage(
        name=name,
        recipe=recipe,
        config=_config(given, folder),
        model=_text(given, "model"),
        teacher_model=_text(given, "teacher_model"),
        models=_names(given, "models"),
        data=_names(given, "data"),
        launch=_launch(given, folder),
        settings=_settings(given, folder),
        gates=read_gates(given.get("gate"), _names(given, "models")),
    )
    if stage.launch and stage.kind.launched == "never":
        raise InputError(f"recipe {recipe} runs in one process; leave the key 'launch' out")
    for key in REFERENCES:
        if key in stage.kind.needs and not given.get(key):
            raise InputError(f"recipe {recipe} needs the key {key!r}")
        if given.get(key) and key not in stage.kind.needs + stage.kind.takes + stage.kind.one_of:
            raise InputError(f"recipe {recipe} takes no {key!r}; leave the key out")
    if stage.kind.one_of and sum(bool(given.get(key)) for key in stage.kind.one_of) != 1:
        keys = " or ".join(map(repr, stage.kind.one_of))
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


def _settings(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    settings = given.get("set") or {}
    if not isinstance(settings, dict):
        raise InputError("key 'set' must map option names to values, such as {max_steps: 10}")
    for key, value in settings.items():
        with at("key 'set'"):
            check_setting(str(key), value)
    with at("key 'set'"):
        return anchored(settings, folder)


def _settings_by_kind(
    given: dict[str, Any], stages: list[Stage], folder: Path
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


def _names(given: dict[str, Any], key: str) -> tuple[str, ...]:
    """A list of references, or one alone."""
    value = given.get(key)
    names = value if isinstance(value, list) else [] if value is None else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise InputError(f"key {key!r} must be a name or a list of names, not {value!r}")
    if len(set(names)) < len(names):
        raise InputError(f"key {key!r} names the same thing twice: {', '.join(names)}")
    return tuple(names)
