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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from chainforge.chain.spec import (
    NO_LAUNCHER,
    Chain,
    Stage,
    at,
    check_setting,
    existing,
    launch_file,
    recipe_script,
)
from chainforge.core import artifacts, paths, run_dir
from chainforge.core.config import given, read_settings, yaml_value
from chainforge.core.errors import InputError
from chainforge.core.run_dir import StageDir
from chainforge.core.secrets import check_settings

# The recipes whose rows are trained on, and so must not contain what is evaluated.
DECONTAMINATED = ("collect", "reject")
OPTIONS = {
    "model": "model_name_or_path",
    "teacher_model": "teacher_model_name_or_path",
    "models": "models",
}
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
    inputs: dict[str, Input]  # by role: model, teacher, data.0, models.base
    given: dict[str, Any]
    fingerprint: str
    state: str
    why: list[str]

    @property
    def shell(self) -> str:
        """Return the command as one line for a shell."""
        return shlex.join(self.command)


def chain_directory(chain: Chain, runs: str | Path) -> Path:
    """Return the directory of a chain's stages."""
    return Path(runs) / chain.name


def plan_chain(chain: Chain, runs: str | Path) -> list[Step]:
    """Plan every stage of a chain, in the order in which they run."""
    known: dict[str, str] = {}
    steps: list[Step] = []
    for stage in chain.stages:
        steps.append(plan_stage(chain, stage, runs, known))
        for giver in steps if stage.recipe == "dpo" else ():
            if giver.stage.name in stage.data and not giver.given.get("preference_pairs"):
                words = f"{giver.stage.name} writes no pairs: set `preference_pairs: 1` there"
                raise InputError(f"{paths.short(chain.file)}: stage {stage.name}: {words}")
        known[stage.name] = steps[-1].fingerprint
    return steps


def plan_stage(
    chain: Chain,
    stage: Stage,
    runs: str | Path,
    known: dict[str, str],
    *,
    thorough: bool = False,
) -> Step:
    """Plan one stage. `known` holds the fingerprints of the stages before it, and of models.

    `thorough` hashes what a finished stage made, instead of comparing sizes and times only.
    """
    directory = chain_directory(chain, runs) / stage.name
    with at(f"{paths.short(chain.file)}: stage {stage.name}"):
        if file := next((p for p in (directory, *directory.parents) if p.is_file()), None):
            raise InputError(f"{file} is a file where a folder belongs")
        options, inputs = [], {}
        for key, name in stage.references:
            path = _path(key, name, stage, chain, directory.parent)
            if name not in known:
                known[name] = artifacts.input_fingerprint(path, thorough=thorough)
            inputs[_role(key, name, stage)] = Input(name, path, known[name])
            option = f"--{OPTIONS.get(key, stage.kind.data_option)}"
            options += [] if option in options else [option]
            options.append(f"{name}={path}" if key == "models" else path)
        options += ["--output_dir", paths.short(directory)]
        words = _words(stage, options, settings_of(stage, chain))
        launcher = _launcher_words(stage, chain)
    settled, script = given(words), paths.short(recipe_script(stage.recipe, chain.folder))
    made_from = {role: item.fingerprint for role, item in inputs.items()}
    fingerprint = artifacts.fingerprint(stage.recipe, settled, made_from, script)
    named = {role: (item.name, item.fingerprint) for role, item in inputs.items()}
    there = StageDir(directory)
    state, why = run_dir.compare(there, fingerprint, settled, named, thorough=thorough)
    command = [*launcher, script, *words]
    return Step(stage, directory, command, inputs, settled, fingerprint, state, why)


# The settings of a stage --------------------------------------------------------------------------


def settings_of(stage: Stage, chain: Chain) -> dict[str, Any]:
    """Return the stage's overrides: the chain's, then the stage's own.

    Of the chain's, those for its recipe win over those for all training. A stage that makes data
    is decontaminated from the chain's own evaluations, beside those that it names itself.
    """
    tasks, prompts = _asked(stage, chain)
    common = {
        "seed": chain.seed,
        "transcript": chain.transcript,
        "report_to": list(chain.report_to) if stage.kind.trains else None,
        "tasks": tasks,
        "prompts": prompts,
    }
    settings = {key: value for key, value in common.items() if value not in (None, [])}
    for kind in stage.kinds:
        settings |= chain.settings.get(kind, {})
    settings |= stage.settings
    if stage.recipe in DECONTAMINATED:
        entries = settings.get("decontaminate", _own(stage).get("decontaminate")) or []
        entries = entries if isinstance(entries, list) else [entries]
        if entries := [*entries, *(e for e in _evaluated(chain) if e not in entries)]:
            settings["decontaminate"] = entries
    return settings


def _own(stage: Stage) -> dict[str, Any]:
    return read_settings(stage.config) if stage.config else {}


def _asked(stage: Stage, chain: Chain) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the chain's tasks and prompts, for a stage that asks any and whose YAML has none.

    Evaluations ask the test split unless the task says otherwise; `size` is the stage's.
    """
    if not stage.asks or {"tasks", "prompts"} & _own(stage).keys():
        return [], []
    split = {"split": "test"} if stage.recipe == "evaluate" else {}
    sizes = stage.size * len(chain.tasks) if len(stage.size) == 1 else stage.size
    sized = [{"size": size} for size in sizes] or [{} for _ in chain.tasks]
    tasks = [split | task | size for task, size in zip(chain.tasks, sized, strict=True)]
    return tasks, list(chain.prompts)


def _evaluated(chain: Chain) -> list[str]:
    """Return the questions of the chain's evaluations: their YAML files, or tasks as text."""
    found: list[str] = []
    for stage in chain.stages:
        if stage.recipe == "evaluate":
            tasks, prompts = _asked(stage, chain)
            found += [json.dumps(task, ensure_ascii=False) for task in tasks]
            if stage.config and not (tasks or prompts):
                found.append(paths.short(stage.config))
    return found


def _settled(stage: Stage, chain: Chain) -> dict[str, Any]:
    """Return a stage's settings as its recipe will read them: its YAML, then the overrides."""
    return given(_words(stage, (), settings_of(stage, chain)))


def override(
    chain: Chain, sets: Iterable[str] = (), seed: int | None = None, launch: str | None = None
) -> Chain:
    """Return a chain as the command line changes it.

    `sets` are `STAGE.KEY=VALUE` texts; lists and mappings are written as in YAML. Instead of a
    stage one may name what a chain's `set` does: a recipe, or `training`.
    """
    seeded = {} if seed is None else {"seed": seed}
    changed = {stage.name: stage.settings | seeded for stage in chain.stages}
    for text in sets:
        target, equals, value = text.partition("=")
        name, dot, key = target.rpartition(".")
        if not (equals and dot and name):
            raise InputError(f"--set {text}: write it as STAGE.KEY=VALUE, such as rl.max_steps=20")
        with at(f"--set {target}"):
            parsed = yaml_value(value) if value.startswith(("[", "{")) else value
            check_settings({key: parsed}, f"--set {target}")
            check_setting(key, parsed)
            named = [s for s in chain.stages if s.name == name or name in s.kinds]
            for stage in named or [chain.stage(name)]:
                changed[stage.name][key] = parsed
    if launch and launch.endswith((".yaml", ".yml", ".json")):
        launch = os.path.abspath(launch)
    stages = [replace(stage, settings=changed[stage.name]) for stage in chain.stages]
    if launch:
        stages = [replace(s, launch=launch) if launchable(s) else s for s in stages]
    return replace(chain, stages=tuple(stages))


def launchable(stage: Stage) -> bool:
    """Return whether a stage starts with `accelerate launch`; one that samples only on request."""
    return stage.kind.launched == "always" or bool(stage.kind.launched == "asked" and stage.launch)


# The inputs of a stage ----------------------------------------------------------------------------


def _role(key: str, name: str, stage: Stage) -> str:
    """Return the role of an input in a stage: `model`, `teacher`, `data.0` or `models.base`."""
    if key == "data":
        return f"data.{stage.data.index(name)}"
    return {"models": f"models.{name}", "teacher_model": "teacher"}.get(key, key)


def _path(key: str, name: str, stage: Stage, chain: Chain, directory: Path) -> str:
    """Return where an input is, or the Hub id of a model."""
    if key != "data":
        path = _model_path(name, key, stage, chain, directory)
    elif any(other.name == name for other in chain.stages):
        path = str(directory / name)
    else:
        path = str(existing(name, chain.folder, "data"))
    is_file = Path(path).is_absolute() or Path(path).exists()
    return paths.short(path) if is_file else path


def _model_path(name: str, key: str, stage: Stage, chain: Chain, directory: Path) -> str:
    """Return which model a stage gets: the chain's, or a stage's `model/` or `adapter/`."""
    opens = stage.kind.trains and key == "model"  # whether it may open an adapter as one
    adapter = _settled(stage, chain).get("adapter") or "merge" if opens else "merge"
    if path := chain.models.get(name):
        is_adapter = (Path(path) / "adapter_config.json").exists()
        if is_adapter and not opens:
            raise InputError(
                f"{name} is a LoRA adapter ({path}); merge it first: chainforge export {path} "
                "--what model --to DIR"
            )
        if Path(path).is_dir() and not is_adapter and adapter == "continue":
            raise InputError(f"adapter: continue: {name} is a plain model ({path}), no adapter")
        return path
    giver = chain.stage(name)
    made = _settled(giver, chain) if giver.kind.trains else {}
    lora = made.get("use_peft", not giver.kind.trains)
    if adapter == "continue" and not lora:
        raise InputError(
            f"adapter: continue: stage {name} trains all weights; set use_peft: true there, or "
            "adapter: merge here"
        )
    part = "model" if adapter == "merge" or not lora else "adapter"
    saved = made.get("save", part)
    if part not in (saved if isinstance(saved, list) else [saved]):
        raise InputError(f"needs {name}/{part}, which {name} does not save; add {part} to its save")
    return str(directory / name / part)


# The command of a stage ---------------------------------------------------------------------------


def _words(stage: Stage, options: Iterable[str], settings: Settings) -> list[str]:
    """Return the arguments of the recipe's script on its command line."""
    words = ["--config", paths.short(stage.config)] if stage.config else []
    words += options
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


def _launcher_words(stage: Stage, chain: Chain) -> list[str]:
    """Return what precedes the recipe's script: `accelerate launch …`, or `python`."""
    name = stage.launch or chain.launch
    if not launchable(stage) or name == NO_LAUNCHER:
        return ["python"]
    if name is None:
        return ["accelerate", "launch"]
    file = launch_file(name, chain.folder)
    return ["accelerate", "launch", "--config_file", paths.short(file)]


def executable(words: list[str]) -> list[str]:
    """Return a printed command with this interpreter's own `python` and `accelerate`."""
    if words[0] == "accelerate":
        return [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
    return [sys.executable, *words[1:]]


# The plan for a reader ----------------------------------------------------------------------------


def contracts(step: Step) -> dict[str, str]:
    """Return a stage's start, what it trains, its KL reference and its gates, by label."""
    lines: dict[str, str] = {}
    settings, stage = step.given, step.stage
    if model := step.inputs.get("model"):
        lines["starts from"] = f"{model.name}: {model.path}"
        continues = settings.get("adapter") == "continue"
        if stage.kind.trains:
            bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")
            kind = f"{'the' if continues else 'a fresh'} {'QLoRA' if bits else 'LoRA'} adapter"
            kind += " that it is given" if continues else ""
            lines["trains"] = kind if settings.get("use_peft") else "all weights"
        beta = settings.get("beta", 0.1 if stage.recipe == "dpo" else 0.0)  # TRL's defaults
        if stage.recipe in ("grpo", "dpo") and beta:
            policy = f"a frozen copy of {model.path}" if continues else model.path
            lines["KL reference"] = f"the policy it starts from: {policy} (beta {beta})"
    if stage.gates:
        lines["gate"] = ", and ".join(map(str, stage.gates))
    return lines


def to_json(chain: Chain, runs: str | Path, steps: Iterable[Step]) -> dict[str, Any]:
    """Return the plan for a machine to read."""
    return {
        "name": chain.name,
        "file": chain.file,
        "directory": str(chain_directory(chain, runs)),
        "stages": [
            {
                "name": step.stage.name,
                "recipe": step.stage.recipe,
                "directory": str(step.directory),
                "command": step.shell,
                "inputs": {role: vars(item) for role, item in step.inputs.items()},
                "contract": contracts(step),
            }
            | {key: getattr(step, key) for key in ("state", "why", "given", "fingerprint")}
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
        lines += [f"   {label:<14}{text}" for label, text in contracts(step).items()]
        blocks.append("\n".join([*lines, step.shell]))
    return "\n\n".join(blocks)
