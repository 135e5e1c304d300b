"""Write the plain command of a stage: what one would type by hand, and what `run` executes."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from chainforge.chain import handover
from chainforge.chain.chain import Chain
from chainforge.chain.handover import Settings
from chainforge.chain.stages import Stage, check_setting
from chainforge.core import paths
from chainforge.core.config import given, read_settings
from chainforge.core.errors import InputError
from chainforge.core.secrets import check_settings
from chainforge.core.yaml12 import yaml_value
from chainforge.train.settings import TRAINED

# The recipes whose rows are trained on, and so must not give away what is evaluated.
DECONTAMINATED = ("collect", "reject")


def references(
    stage: Stage, chain: Chain, directory: Path, settled: Callable[[Stage], Settings]
) -> dict[str, tuple[str, str]]:
    """Map each input's role (`model`, `data.0`, `models.base`) to its name and where it lies.

    `directory` holds the stages' directories; `settled` gives a stage's settings. Raises
    `InputError` when a stage wants of another what that one does not leave.
    """

    def model(name: str, role: str) -> str:
        if name in chain.models:
            handover.check_path(chain.models[name], name, stage, settled(stage), role)
            return chain.models[name]
        giver = chain.stage(name)
        part = handover.part_of(giver, settled(giver), stage, settled(stage), role)
        return str(directory / name / part)

    def data(name: str) -> str:
        path = directory / name if chain.is_stage(name) else paths.data_path(name, chain.folder)
        return str(path)

    found: dict[str, tuple[str, str]] = {}
    for role, name in (("model", stage.model), ("teacher", stage.teacher_model)):
        if name is not None:
            found[role] = (name, _here(model(name, role)))
    for name in stage.models:
        found[f"models.{name}"] = (name, _here(model(name, "models")))
    for number, name in enumerate(stage.data):
        found[f"data.{number}"] = (name, _here(data(name)))
    return found


def recipe_words(
    stage: Stage, inputs: Mapping[str, tuple[str, str]], output: Path, settings: Mapping[str, Any]
) -> list[str]:
    """Return what stands after the recipe's script on its command line."""
    words: list[str] = []
    if stage.config is not None:
        words += ["--config", paths.short(stage.config)]
    for role, option in (
        ("model", "--model_name_or_path"),
        ("teacher", "--teacher_model_name_or_path"),
    ):
        if role in inputs:
            words += [option, inputs[role][1]]
    if stage.models:
        words += ["--models", *(f"{name}={inputs[f'models.{name}'][1]}" for name in stage.models)]
    if stage.data:
        words += [
            f"--{stage.kind.data_option}",
            *(inputs[f"data.{i}"][1] for i in range(len(stage.data))),
        ]
    words += ["--output_dir", paths.short(output)]
    for key, value in settings.items():
        words += option_words(key, value)
    return words


def launcher_words(stage: Stage, chain: Chain, launch: str | None) -> list[str]:
    """Return what stands before the recipe's script: `accelerate launch …`, or `python`.

    The command line's `launch` wins over the stage's, and that over the chain's. What samples
    runs in one process unless its own stage says `launch`, and needs no launcher's start-up time.
    """
    name = launch or stage.launch or chain.launch
    asked = stage.kind.launched == "always" or (stage.kind.launched == "asked" and stage.launch)
    if not asked or name == paths.NO_LAUNCHER:
        return ["python"]
    if name is None:
        return ["accelerate", "launch"]
    file = paths.launch_file(name, Path.cwd() if launch else chain.folder)
    return ["accelerate", "launch", "--config_file", paths.short(str(file))]


def executable(words: list[str]) -> list[str]:
    """Return a printed command with this interpreter's own `python` and `accelerate`."""
    if words[0] == "accelerate":
        return [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
    return [sys.executable, *words[1:]]


def option_words(key: str, value: Any) -> list[str]:
    """Write one setting as words of a command line, so that `config.given` reads it back."""
    if isinstance(value, dict):
        return [f"--{key}", json.dumps(value, ensure_ascii=False)]
    if isinstance(value, list):
        if len(value) == 0 or any(isinstance(item, dict | list) for item in value):
            return [f"--{key}", json.dumps(value, ensure_ascii=False)]
        return [f"--{key}", *(_scalar(item) for item in value)]
    word = _scalar(value)
    return [f"--{key}={word}"] if word.startswith("--") else [f"--{key}", word]


def settings_of(
    stage: Stage, chain: Chain, sets: Mapping[str, Mapping[str, Any]], seed: int | None
) -> dict[str, Any]:
    """Return the stage's overrides: the chain's, then the stage's own, then the command line's.

    Of the chain's, those for its recipe win over those for all training. What makes data looks out
    for the questions of the chain's own evaluations, beside those that the stage names itself.
    """
    common: dict[str, Any] = {"seed": chain.seed, "transcript": chain.transcript}
    if chain.report_to and stage.recipe in TRAINED:
        common["report_to"] = list(chain.report_to)
    settings = {key: value for key, value in common.items() if value is not None}
    for kind in stage.kinds:
        settings |= chain.settings.get(kind, {})
    settings |= stage.settings
    if seed is not None:
        settings["seed"] = seed
    settings |= dict(sets.get(stage.name, {}))
    if stage.recipe in DECONTAMINATED:
        evaluations = [
            paths.short(other.config)
            for other in chain.stages
            if other.recipe == "evaluate" and other.config is not None
        ]
        own = read_settings(stage.config).get("decontaminate") if stage.config else None
        entries = settings.get("decontaminate", own) or []
        entries = entries if isinstance(entries, list) else [entries]
        if entries or evaluations:
            more = [file for file in evaluations if file not in entries]
            settings["decontaminate"] = [*entries, *more]
    return settings


def settled(stage: Stage, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's settings as its recipe will read them: its YAML, then the overrides."""
    words = ["--config", str(stage.config)] if stage.config else []
    for key, value in settings.items():
        words += option_words(key, value)
    return given(words)


def read_sets(chain: Chain, texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read `STAGE.KEY=VALUE` texts; lists and mappings are written as in YAML.

    In a stage's place may stand what a chain's `set` takes: a recipe, or `training` for all that
    train.
    """
    sets: dict[str, dict[str, Any]] = {}
    for text in texts:
        target, equals, value = text.partition("=")
        name, dot, key = target.rpartition(".")
        if not (equals and dot and name):
            raise InputError(f"--set {text}: write it as STAGE.KEY=VALUE, reason.max_steps=20")
        parsed = _value(text, value)
        check_settings({key: parsed}, f"--set {target}")
        check_setting(key, parsed)
        named = [stage for stage in chain.stages if stage.name == name]
        kind = [stage for stage in chain.stages if name in stage.kinds]
        for stage in named or kind or [chain.stage(name)]:
            sets.setdefault(stage.name, {})[key] = parsed
    return sets


def shell(words: Iterable[str]) -> str:
    """Quote a command for a shell."""
    return shlex.join(words)


def _value(text: str, value: str) -> Any:
    if not value.startswith(("[", "{")):
        return value
    try:
        return yaml_value(value)
    except InputError as error:
        raise InputError(f"--set {text}: {error}") from None


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _here(path: str) -> str:
    """Shorten a path that exists or will; a Hub id stays what it is."""
    return paths.short(path) if Path(path).is_absolute() or Path(path).exists() else path
