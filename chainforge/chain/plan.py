"""Plan a chain: each stage's plain command, its inputs, and whether it must run.

A stage's fingerprint is known before it has run, because it is a hash of what the stage is made
from. So the state of every stage is known at once, and the command is what one would type by hand.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chainforge.chain.spec import RECIPES, Chain, Stage, at, check_setting
from chainforge.core import artifacts, paths, run_dir
from chainforge.core.config import given, read_settings, yaml_value
from chainforge.core.errors import InputError
from chainforge.core.run_dir import StageDir
from chainforge.core.secrets import check_settings

# The recipes whose rows are trained on, and so must not contain what is evaluated.
DECONTAMINATED = ("collect", "reject")
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Input:
    """What a stage takes: a stage's or model's name, its path, and what it is made from."""

    name: str
    path: str
    fingerprint: str


@dataclass(frozen=True)
class Step:
    """A stage with everything that running it needs, and its state on disk."""

    stage: Stage
    directory: Path
    command: list[str]
    inputs: dict[str, Input]
    given: dict[str, Any]
    fingerprint: str
    state: str
    why: list[str]

    @property
    def shell(self) -> str:
        """Return the command as one line for a shell."""
        return shlex.join(self.command)


@dataclass(frozen=True)
class Overrides:
    """What the command line changes about a chain."""

    launch: str | None = None
    sets: Mapping[str, Settings] = field(default_factory=dict)
    seed: int | None = None


def chain_directory(chain: Chain, runs: str | Path) -> Path:
    """Return the directory of a chain's stages."""
    if Path(runs).exists() and not Path(runs).is_dir():
        raise InputError(f"--runs {runs}: a file; name the folder that holds the chains' results")
    return Path(runs) / chain.name


def plan_chain(chain: Chain, runs: str | Path, overrides: Overrides | None = None) -> list[Step]:
    """Plan every stage of a chain, in the order in which they run."""
    known: dict[str, str] = {}
    steps: list[Step] = []
    for stage in chain.stages:
        step = plan_stage(chain, stage, runs, known, overrides or Overrides())
        known[stage.name] = step.fingerprint
        steps.append(step)
    return steps


def plan_stage(
    chain: Chain,
    stage: Stage,
    runs: str | Path,
    known: dict[str, str],
    overrides: Overrides,
    *,
    thorough: bool = False,
) -> Step:
    """Plan one stage. `known` holds the fingerprints of the stages before it, and of models.

    `thorough` hashes what a finished stage made, instead of comparing sizes and times only.
    """
    parent = chain_directory(chain, runs)
    directory = parent / stage.name
    with at(f"stage {stage.name}"):
        _check_place(directory)
    paths_by_role = _references(stage, chain, parent, overrides)
    settings = settings_of(stage, chain, overrides)
    words = _recipe_words(stage, paths_by_role, directory, settings)
    script = paths.short(paths.recipe_script(stage.recipe, chain.folder))
    inputs = {}
    for role, (name, path) in paths_by_role.items():
        if name not in known:
            known[name] = artifacts.input_fingerprint(path, thorough=thorough)
        inputs[role] = Input(name, path, known[name])
    settled, there = given(words), StageDir(directory)
    fingerprint = artifacts.fingerprint(
        _recipe_name(stage, there),
        settled,
        {role: item.fingerprint for role, item in inputs.items()},
        script if stage.recipe not in RECIPES else None,
    )
    named = {role: (item.name, item.fingerprint) for role, item in inputs.items()}
    state, why = run_dir.compare(there, fingerprint, settled, named, thorough=thorough)
    command = [*_launcher_words(stage, chain, overrides.launch), script, *words]
    return Step(stage, directory, command, inputs, settled, fingerprint, state, why)


def _check_place(directory: Path) -> None:
    """Raise `InputError` for a place where no stage's directory can be."""
    if directory.is_dir():
        return
    try:
        place = directory.resolve()
    except (OSError, RuntimeError):  # which one depends on the version of Python
        raise InputError(f"{directory} is a link that leads to itself; remove it") from None
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{place} is a file where a folder belongs; move it away")


def _recipe_name(stage: Stage, there: StageDir) -> str:
    """Return a built-in recipe's name; a user's own signs with a name that only it knows."""
    if stage.recipe in RECIPES:
        return stage.recipe
    if there.manifest:
        return there.manifest.recipe
    return str(there.started["recipe"]) if there.started else Path(stage.recipe).stem


# The settings of a stage --------------------------------------------------------------------------


def settings_of(stage: Stage, chain: Chain, overrides: Overrides) -> dict[str, Any]:
    """Return the stage's overrides: the chain's, then the stage's own, then the command line's.

    Of the chain's, those for its recipe win over those for all training. What makes data is kept
    free of the questions of the chain's own evaluations, beside those that the stage names itself.
    """
    settings = dict(chain.common)
    if chain.report_to and stage.kind.trains:
        settings["report_to"] = list(chain.report_to)
    if tasks := _tasks(stage, chain):
        settings["tasks"] = tasks
    for kind in stage.kinds:
        settings |= chain.settings.get(kind, {})
    settings |= stage.settings
    if overrides.seed is not None:
        settings["seed"] = overrides.seed
    settings |= overrides.sets.get(stage.name, {})
    if stage.recipe in DECONTAMINATED:
        entries = settings.get("decontaminate", _own(stage).get("decontaminate")) or []
        entries = entries if isinstance(entries, list) else [entries]
        entries += [entry for entry in _evaluated(chain) if entry not in entries]
        if entries:
            settings["decontaminate"] = entries
    return settings


def _own(stage: Stage) -> dict[str, Any]:
    return read_settings(stage.config) if stage.config else {}


def _tasks(stage: Stage, chain: Chain) -> list[dict[str, Any]]:
    """Return the chain's tasks, for a stage that asks any and whose own YAML has none.

    Evaluations ask the test split unless the task says otherwise; `size` is the stage's.
    """
    if not stage.asks or "tasks" in _own(stage):
        return []
    split = {"split": "test"} if stage.recipe == "evaluate" else {}
    tasks = [split | task for task in chain.tasks]
    sizes = stage.size * len(tasks) if len(stage.size) == 1 else stage.size
    for task, size in zip(tasks, sizes, strict=False):
        task["size"] = size
    return tasks


def _evaluated(chain: Chain) -> list[str]:
    """Return what the chain's evaluations ask: their configurations, or tasks as text."""
    found: list[str] = []
    for stage in chain.stages:
        if stage.recipe == "evaluate":
            tasks = _tasks(stage, chain)
            found += [json.dumps(task, ensure_ascii=False) for task in tasks]
            if stage.config is not None and not tasks:
                found.append(paths.short(stage.config))
    return found


def _settled(stage: Stage, chain: Chain, overrides: Overrides) -> dict[str, Any]:
    """Return a stage's settings as its recipe will read them: its YAML, then the overrides."""
    words = ["--config", str(stage.config)] if stage.config else []
    for key, value in settings_of(stage, chain, overrides).items():
        words += option_words(key, value)
    return given(words)


def read_sets(chain: Chain, texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read `STAGE.KEY=VALUE` texts; lists and mappings are written as in YAML.

    Instead of a stage it may name what a chain's `set` does: a recipe, or `training`.
    """
    sets: dict[str, dict[str, Any]] = {}
    for text in texts:
        target, equals, value = text.partition("=")
        name, dot, key = target.rpartition(".")
        if not (equals and dot and name):
            raise InputError(f"--set {text}: write it as STAGE.KEY=VALUE, such as rl.max_steps=20")
        parsed: Any = value
        if value.startswith(("[", "{")):
            with at(f"--set {text}"):
                parsed = yaml_value(value)
        check_settings({key: parsed}, f"--set {target}")
        check_setting(key, parsed)
        named = [stage for stage in chain.stages if stage.name == name]
        kind = [stage for stage in chain.stages if name in stage.kinds]
        for stage in named or kind or [chain.stage(name)]:
            sets.setdefault(stage.name, {})[key] = parsed
    return sets


# The inputs of a stage ----------------------------------------------------------------------------


def _references(
    stage: Stage, chain: Chain, directory: Path, overrides: Overrides
) -> dict[str, tuple[str, str]]:
    """Map each input's role (`model`, `data.0`, `models.base`) to its name and path.

    Raises `InputError` when a stage wants of another what that one does not leave.
    """
    asked = _settled(stage, chain, overrides)

    def model(name: str, role: str) -> str:
        adapter = _adapter(stage, asked) if role == "model" else "merge"
        if path := chain.models.get(name):
            _check_model(path, name, stage, role, adapter)
            return path
        giver = chain.stage(name)
        part = _part_of(giver, _settled(giver, chain, overrides), stage, adapter)
        return str(directory / name / part)

    found: dict[str, tuple[str, str]] = {}
    for role, one in (("model", stage.model), ("teacher", stage.teacher_model)):
        if one is not None:
            found[role] = (one, model(one, role))
    found |= {f"models.{name}": (name, model(name, "models")) for name in stage.models}
    stages = {other.name for other in chain.stages}
    for number, name in enumerate(stage.data):
        path = directory / name if name in stages else paths.data_path(name, chain.folder)
        found[f"data.{number}"] = (name, str(path))
    return {role: (name, _here(path)) for role, (name, path) in found.items()}


def _here(path: str) -> str:
    """Shorten a path that exists or will; a Hub id stays what it is."""
    return paths.short(path) if Path(path).is_absolute() or Path(path).exists() else path


def _adapter(stage: Stage, settings: Settings) -> str:
    """Return what a stage does with an adapter that it is given: `merge` if it does not say."""
    return str(settings.get("adapter") or "merge") if stage.kind.trains else "merge"


def _part_of(giver: Stage, made: Settings, taker: Stage, adapter: str) -> str:
    """Return which directory of `giver` goes to `taker`: `model` or `adapter`."""
    lora = giver.kind.trains and _true(made.get("use_peft"))
    if adapter == "continue" and giver.kind.trains and not lora:
        raise InputError(
            f"stage {taker.name}: adapter: continue: stage {giver.name} trains all weights, so "
            f"there is no adapter; set use_peft: true in {giver.name}, or adapter: merge here"
        )
    part = "adapter" if adapter == "continue" or (adapter == "new" and lora) else "model"
    saved = made.get("save", part) if giver.kind.trains else part
    if part not in (saved if isinstance(saved, list) else [saved]):
        raise InputError(
            f"stage {taker.name} needs {giver.name}/{part}, which {giver.name} does not save "
            f"(save: {saved}); add {part} to it"
        )
    return part


def _check_model(path: str, name: str, taker: Stage, role: str, adapter: str) -> None:
    """Raise `InputError` when a model that no stage made cannot serve as `taker` wants it."""
    if not Path(path).is_dir():
        return  # a Hub id: the stage itself will see
    is_adapter = (Path(path) / "adapter_config.json").exists()
    if is_adapter and not (taker.kind.trains and role == "model"):
        raise InputError(
            f"stage {taker.name}: {name} is a LoRA adapter ({path}); only stages that train open "
            f"one, as their model; merge it first: chainforge export {path} --what model --to DIR"
        )
    if not is_adapter and adapter == "continue":
        raise InputError(
            f"stage {taker.name}: adapter: continue: {name} is a plain model ({path}); give an "
            "adapter, or say adapter: merge"
        )


def _true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes", "on")


# The command of a stage ---------------------------------------------------------------------------


def _recipe_words(
    stage: Stage, inputs: Mapping[str, tuple[str, str]], output: Path, settings: Settings
) -> list[str]:
    """Return what follows the recipe's script on its command line."""
    words = ["--config", paths.short(stage.config)] if stage.config is not None else []
    if "model" in inputs:
        words += ["--model_name_or_path", inputs["model"][1]]
    if "teacher" in inputs:
        words += ["--teacher_model_name_or_path", inputs["teacher"][1]]
    if stage.models:
        words += ["--models", *(f"{name}={inputs[f'models.{name}'][1]}" for name in stage.models)]
    if stage.data:
        words.append(f"--{stage.kind.data_option}")
        words += [inputs[f"data.{number}"][1] for number in range(len(stage.data))]
    words += ["--output_dir", paths.short(output)]
    for key, value in settings.items():
        words += option_words(key, value)
    return words


def option_words(key: str, value: Any) -> list[str]:
    """Write one setting as words of a command line, so that `config.given` reads it back."""
    values = value if isinstance(value, list) else [value]
    if isinstance(value, dict) or not values or any(isinstance(v, dict | list) for v in values):
        return [f"--{key}", json.dumps(value, ensure_ascii=False)]
    words = [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
    return [f"--{key}={words[0]}"] if words[0].startswith("--") else [f"--{key}", *words]


def _launcher_words(stage: Stage, chain: Chain, launch: str | None) -> list[str]:
    """Return what precedes the recipe's script: `accelerate launch …`, or `python`.

    The command line's `launch` wins over the stage's, and that over the chain's. What samples
    runs in one process unless its own stage says `launch`.
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


# The plan for a reader ----------------------------------------------------------------------------


def contracts(step: Step) -> list[tuple[str, str]]:
    """Return where a stage starts and, in RL with a KL penalty, which policy it is held to."""
    lines: list[tuple[str, str]] = []
    if model := step.inputs.get("model"):
        lines.append(("starts from", f"{model.name}: {model.path}"))
        if step.stage.kind.trains:
            lines.append(("trains", _trains(step)))
        if step.stage.recipe == "grpo":
            lines += _kl_reference(step, model.path)
    if saved := step.given.get("save"):
        lines.append(("saves", ", ".join(saved) if isinstance(saved, list) else str(saved)))
    for role, item in step.inputs.items():
        if role == "teacher" or role.startswith("data."):
            lines.append((role.partition(".")[0], f"{item.name}: {item.path}"))
    if step.stage.models:
        lines.append(("models", ", ".join(step.stage.models)))
    if step.stage.gates:
        lines.append(("gate", ", and ".join(map(str, step.stage.gates))))
    return lines


def _trains(step: Step) -> str:
    if not _true(step.given.get("use_peft")):
        return "all weights"
    quantized = _true(step.given.get("load_in_4bit")) or _true(step.given.get("load_in_8bit"))
    kind = "QLoRA" if quantized else "LoRA"
    given_one = _adapter(step.stage, step.given) == "continue"
    return f"the {kind} adapter that it is given" if given_one else f"a fresh {kind} adapter"


def _kl_reference(step: Step, path: str) -> list[tuple[str, str]]:
    try:
        beta = float(step.given.get("beta") or 0)
    except (TypeError, ValueError):
        return []  # the recipe itself refuses it, by name
    if beta <= 0:
        return []
    copy = "a frozen copy of " if _adapter(step.stage, step.given) == "continue" else ""
    moves = ", updated during training" if _true(step.given.get("sync_ref_model")) else ""
    return [("KL reference", f"the policy it starts from: {copy}{path}{moves} (beta {beta:g})")]


def to_json(chain: Chain, runs: str | Path, steps: Iterable[Step]) -> dict[str, Any]:
    """Return the plan for a machine to read."""
    return {
        "name": chain.name,
        "file": str(chain.file),
        "directory": str(chain_directory(chain, runs)),
        "stages": [
            {
                "name": step.stage.name,
                "recipe": step.stage.recipe,
                "state": step.state,
                "why": step.why,
                "directory": str(step.directory),
                "command": step.shell,
                "inputs": {role: vars(item) for role, item in step.inputs.items()},
                "given": step.given,
                "fingerprint": step.fingerprint,
                "contract": dict(contracts(step)),
            }
            for step in steps
        ],
    }


def as_text(chain: Chain, runs: str | Path, steps: list[Step]) -> str:
    """Return the plan for a person: every command on one line of its own, ready to paste."""
    blocks = [f"{chain.name}: {len(steps)} stages in {chain_directory(chain, runs)}"]
    for number, step in enumerate(steps, start=1):
        lines = [f"{number}. {step.stage.name} ({Path(step.stage.recipe).stem}): {step.state}"]
        label = "because" if step.state == run_dir.STALE else "note"
        lines += [f"   {label:<14}{why}" for why in step.why]
        lines += [f"   {label:<14}{text}" for label, text in contracts(step)]
        blocks.append("\n".join([*lines, step.shell]))
    return "\n\n".join(blocks)
