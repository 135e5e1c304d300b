"""What `chainforge doctor` looks at, and how it says what it found."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from chainforge.chain.plan import Step
from chainforge.chain.spec import Chain
from chainforge.core.errors import InputError
from chainforge.train.architecture import Shape, shape_of
from chainforge.train.distributed import DDP, SINGLE, Layout, layout_of
from chainforge.train.settings import TRAINED, settings_of

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's: what was seen, where, and what to do about it."""

    level: Level
    check: str
    text: str
    stage: str | None = None
    data: dict[str, Any] | None = None  # what the text is made from, for --json


class NotHere(Exception):
    """What cannot be looked at on this machine, and why: no fault of the chain's."""


@dataclass(frozen=True)
class Machine:
    """What this machine has: the memory of each GPU and of the whole, in bytes; GPUs by name."""

    gpus: tuple[int, ...]
    memory: int
    cores: int
    cards: tuple[str, ...] = ()


def this_machine() -> Machine:
    """Look around; torch is not asked, because it takes seconds to load."""
    found = _gpus()
    sizes, names = tuple(size for size, _ in found), tuple(name for _, name in found)
    return Machine(sizes, _memory(), len(os.sched_getaffinity(0)), names)


def _gpus() -> list[tuple[int, str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.partition(",") for line in done.stdout.splitlines()]
    return [(int(size) * 2**20, name.strip()) for size, _, name in lines if size.strip().isdigit()]


def _memory() -> int:
    """Return the main memory: the machine's, or what a container is allowed of it."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(name).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            whole = min(whole, int(limit))
    return int(whole)


@dataclass(frozen=True)
class Training:
    """A stage that trains, as the checks look at it."""

    step: Step
    settings: dict[str, Any]  # TRL's defaults included
    layout: Layout

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.step.stage.name

    @property
    def recipe(self) -> str:
        """The stage's recipe."""
        return self.step.stage.recipe


@dataclass(frozen=True)
class Context:
    """What there is to check: a machine, and a chain that is planned, if one was named."""

    machine: Machine
    chain: Chain | None = None
    steps: tuple[Step, ...] = ()
    online: bool = False  # whether the Hub may be asked
    found: dict[Any, Any] = field(default_factory=dict, repr=False)  # what several checks look at

    @cached_property
    def training(self) -> list[Training]:
        """The stages that train."""
        return [
            Training(step, settings_of(step.stage.recipe, step.given), self.layout(step))
            for step in self.steps
            if step.stage.recipe in TRAINED
        ]

    def trained(self, step: Step) -> Training | None:
        """Return a stage as one that trains; None for the others."""
        return next((stage for stage in self.training if stage.step is step), None)

    def launch_file(self, step: Step) -> Path | None:
        """Return the launch file of a stage, one's own default included; None without any."""
        words = step.command
        if "--config_file" in words[:3]:
            return Path(words[words.index("--config_file") + 1])
        if words[0] == "python":
            return None
        home = os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface"
        default = Path(home) / "accelerate/default_config.yaml"
        return default if default.is_file() else None

    def layout(self, step: Step) -> Layout:
        """Return how a stage is spread over processes."""
        file = self.launch_file(step)
        if file is None and step.command[0] == "accelerate" and len(self.machine.gpus) > 1:
            return Layout(DDP, len(self.machine.gpus))  # what `accelerate launch` does by itself
        try:
            return layout_of(file)
        except (InputError, ValueError, TypeError):  # which the check of launch files says
            return Layout(SINGLE)

    def root(self, name: str) -> str:
        """Return the model that a model, or a stage's policy, goes back to: a path or a Hub id.

        Training changes no shape and no tokenizer, so that it stands for all that is made of it.
        """
        assert self.chain is not None
        while name not in self.chain.models:
            below = self.chain.stage(name).model
            if below is None:
                return name
            name = below
        return self.chain.models[name]

    def shape(self, name: str) -> Shape | str:
        """Return the shape of a model or a stage's policy, or the reason why it is not known."""
        root = self.root(name)
        try:
            return shape_of(root) or f"{root} is not on this machine; --online fetches its config"
        except InputError as error:
            return f"{root}: {error}"


def worst(findings: list[Finding]) -> Level:
    """Return the gravest level of all."""
    levels = {finding.level for finding in findings}
    return "error" if "error" in levels else "warning" if "warning" in levels else "ok"


def of_stage(
    check: str, stage: str, problems: list[str], fine: str, level: Level = "error"
) -> Iterator[Finding]:
    """Yield a finding for each problem of a stage, or one that all is fine."""
    for problem in problems:
        yield Finding(level, check, problem, stage)
    if not problems:
        yield Finding("ok", check, fine, stage)
