"""Check a chain before anything expensive runs: `chainforge doctor [CHAIN]`.

Each stage's recipe is loaded, its settings are parsed with the recipe's own `CONFIGS`, and its
`preflight` is called, as the recipe does when it runs. What an earlier stage has not made yet is
replaced: a policy by the base model, since training changes neither shape nor tokenizer, and rows
by the tasks' gold answers. No weights are loaded. The machine and memory are checked besides.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chainforge.chain.plan import Step, option_words
from chainforge.chain.spec import RECIPES, Chain
from chainforge.core import paths
from chainforge.core.config import parse
from chainforge.core.errors import InputError, first_line
from chainforge.core.jsonl import Row
from chainforge.core.plugins import load_file
from chainforge.core.run_dir import DONE
from chainforge.core.transcript import DEFAULT, read, write
from chainforge.core.weights import hub_failures
from chainforge.data.sources import question, same_question
from chainforge.doctor import environment
from chainforge.doctor.environment import Finding, Level, Machine
from chainforge.doctor.memory import compare, estimate, read_shape
from chainforge.doctor.reward_check import first_rows
from chainforge.generate.settings import config_of
from chainforge.generate.teacher import key_of
from chainforge.rewards.audit import audit, completion_of, gold_answer
from chainforge.train.distributed import Layout

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
AUDITED, CONSTANTS_TRIED = 2, 50  # rows of each task: for all attacks, and for constant answers
PLACEHOLDERS = 64  # rows in place of those that a stage has not made yet
LIGHT = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]  # of a model, without weights


def examine(
    machine: Machine,
    chain: Chain | None = None,
    steps: list[Step] | None = None,
    online: bool = False,
) -> list[Finding]:
    """Check the machine, and each stage of a planned chain; `online` asks the Hub for configs."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports on every import
    findings = list(environment.check_machine(machine))
    if chain is None or not steps:
        return findings
    if online:
        findings += _fetch(chain)
    with tempfile.TemporaryDirectory() as folder:
        doctor = _Doctor(machine, chain, steps, online, Path(folder))
        for step in steps:
            findings += doctor.check(step)
    return findings


class _Doctor:
    """The stages of a chain, and what the preflight of each has loaded."""

    def __init__(
        self, machine: Machine, chain: Chain, steps: list[Step], online: bool, folder: Path
    ) -> None:
        self.machine, self.chain, self.online, self.folder = machine, chain, online, folder
        self.steps = {step.stage.name: step for step in steps}
        self.ready: dict[str, Any] = {}

    def check(self, step: Step) -> Iterator[Finding]:
        """Yield the findings of one stage."""
        from transformers import TrainingArguments

        name, part = step.stage.name, "settings"
        layout, found = environment.check_launch(step.command, name, self.machine)
        yield from found
        if unchecked := self._unchecked(step):
            yield unchecked
            return
        try:
            words = self._words(step)
            with (
                mock.patch.object(sys, "argv", words),
                mock.patch.object(TrainingArguments, "world_size", layout.processes),
                _warnings() as warned,
            ):
                recipe = load_file(Path(words[0]))
                configs = _parse(recipe, step)
                part = "preflight"
                with mock.patch.dict(os.environ, environment.launch_variables(layout)):
                    ready = self.ready[name] = recipe.preflight(configs)
                found = list(self._examine(step, configs, ready, layout))
        except Exception as error:  # a task, a reward or a template of the user may raise anything
            own = isinstance(error, InputError)
            text = str(error) if own else f"{type(error).__name__}: {first_line(error)}"
            yield Finding("error", part, text, name, _key(text))
            return
        for text in warned:
            yield Finding("warning", part, text, name, _key(text))
        if not warned:
            yield Finding("ok", part, "settings, rows and tokenizers are fine", name)
        yield from found

    def _unchecked(self, step: Step) -> Finding | None:
        """Return why a stage cannot be checked, if it cannot."""
        name, stage = step.stage.name, step.stage
        if stage.recipe not in RECIPES:
            return Finding("ok", "preflight", "a recipe of your own: it checks itself", name)
        models = [self._root(model) for model in (stage.model, stage.teacher_model) if model]
        missing = [model for model in models if not (Path(model).exists() or config_of(model))]
        if not missing or self.online or step.given.get("engine") == "api":
            return None
        text = f"{missing[0]} is not on this machine; --online fetches it, without weights"
        return Finding("warning", "preflight", text, name)

    def _examine(
        self, step: Step, configs: tuple[Any, ...], ready: Any, layout: Layout
    ) -> Iterator[Finding]:
        """Yield what goes beyond a preflight: rows and rewards, servers and memory."""
        name = step.stage.name
        settings: dict[str, Any] = {}
        for config in configs:
            settings |= vars(config)
        if step.stage.recipe in ("sft", "dpo"):
            yield from _check_forms(ready.rows, settings["transcript"], name)
        elif getattr(ready, "rewards", None):
            yield from _check_golds(step, ready)
            judges = [getattr(reward.function, "endpoint", None) for reward in ready.rewards]
            for one in filter(None, judges):
                yield Finding("ok", "judge", f"{one.model} at {one.host}", name)
        if step.stage.recipe == "evaluate":
            yield from self._check_apart(ready.rows, name)
        if step.stage.kind.trains:
            yield from self._check_training(step, settings, ready, layout)
        urls = [url for c in configs if getattr(c, "engine", "") == "api" for url in c.urls]
        for endpoint in getattr(ready, "endpoints", ()):
            args = next(config for config in configs if hasattr(config, "teacher"))
            key = f"{endpoint.variable} is {'set' if key_of(args) else 'not set'}"
            yield Finding("ok", "teacher", f"{endpoint.model} at {endpoint.host}, {key}", name)
            urls = endpoint.urls[:1] if args.urls or self.online else []
        yield from (environment.check_server(url, name) for url in urls)

    def _check_apart(self, tests: list[Row], name: str) -> Iterator[Finding]:
        """Check that no stage of SFT or DPO learns answers to questions of an evaluation."""
        asked = {same_question(question(row)) for row in tests if gold_answer(row)}
        for other in self.ready:
            if self.steps[other].stage.recipe in ("sft", "dpo"):
                rows = ({"prompt": turns} for turns in self.ready[other].rows["prompt"])
                if shared := sum(same_question(question(row)) in asked for row in rows):
                    text = (
                        f"{shared:,} rows of {other} have questions that this stage tests; leave "
                        "them out, by `chainforge.data.sources.split_of`"
                    )
                    yield Finding("warning", "rows", text, name)

    def _check_training(
        self, step: Step, settings: dict[str, Any], ready: Any, layout: Layout
    ) -> Iterator[Finding]:
        """Check the devices and memory of a training stage."""
        name, gpus = step.stage.name, self.machine.gpus
        if not settings["use_cpu"] and (layout.on_cpu or not gpus):
            text = "without `use_cpu: true` the stage asks for a GPU, and there is none"
            yield Finding("error" if layout.on_cpu else "warning", "machine", text, name, "use_cpu")
        device = min(gpus, default=None)
        if settings["use_cpu"]:
            device = self.machine.memory // max(1, layout.processes // layout.machines)
        known: dict[str, Any] = {"prompt_tokens": getattr(ready, "prompt_tokens", None)}
        known["device_bytes"] = device
        scorers = [getattr(one.function, "path", None) for one in getattr(ready, "rewards", ())]
        teacher = settings.get("teacher_model_name_or_path")
        try:
            shape = read_shape(ready.start.source.config)
            other = read_shape(config_of(teacher)) if teacher else None
            known["scorers"] = [read_shape(config_of(path)) for path in scorers if path]
            needed = estimate(step.stage.recipe, settings, shape, layout, teacher=other, **known)
        except InputError as error:
            yield Finding("warning", "memory", f"not known: {error}", name)
            return
        yield Finding(*compare(needed, device), stage=name)

    def _words(self, step: Step) -> list[str]:
        """Return a stage's script and options, with what is not made yet replaced."""
        first = next(number for number, word in enumerate(step.command) if word.endswith(".py"))
        words, more = step.command[first:], []
        for role, item in step.inputs.items():
            giver, path = self.steps.get(item.name), item.path
            if giver is None or giver.state == DONE:
                continue
            is_data = role.startswith("data.")
            if is_data and step.stage.recipe not in ("sft", "dpo"):
                # A pool is read when the stage runs; RL without one takes all prompts.
                if step.stage.recipe == "grpo":
                    del words[words.index(path) - 1 : words.index(path) + 1]
                continue
            new = self._placeholder(giver) if is_data else self._root(item.name)
            if not is_data:
                more += ["--adapter", "merge"] if path.endswith("adapter") else []
                for key in ("chat_template_path", "chat_template_kwargs"):
                    set_below = (below.given.get(key) for below in self._below(giver))
                    value = next(filter(None, set_below), None)
                    if value and key not in step.given:
                        more += option_words(key, value)
            swap = {path: new, f"{item.name}={path}": f"{item.name}={new}"}
            words = [swap.get(word, word) for word in words]
        return words + more

    def _placeholder(self, giver: Step) -> str:
        """Return a file of rows like those that a data stage will make."""
        form = str(giver.given.get("transcript", DEFAULT))
        sources = [self.ready.get(name) for name in (giver.stage.name, *giver.stage.data)]
        rows = [row for one in sources for row in getattr(one, "rows", ()) if "prompt" in row]
        pairs = [(row["prompt"], completion_of(gold_answer(row), form)) for row in rows]
        default = ([{"role": "user", "content": "1 + 1 ="}], write("1 + 1 = 2", "2", form))
        path = self.folder / f"{giver.stage.name}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for prompt, text in pairs[:PLACEHOLDERS] or [default] * PLACEHOLDERS:
                row = dict.fromkeys(("completion", "chosen", "rejected"), text)
                file.write(json.dumps({"prompt": prompt} | row) + "\n")
        return str(path)

    def _below(self, step: Step | None) -> Iterator[Step]:
        """Yield a stage, and the earlier stages that its policy was made from."""
        while step is not None:
            yield step
            step = self.steps.get(step.stage.model or "")

    def _root(self, name: str) -> str:
        """Return the chain's model that a stage's policy was made from, or the model itself."""
        for below in self._below(self.steps.get(name)):
            name = below.stage.model or ""
        return self.chain.models.get(name, name)


def _check_golds(step: Step, ready: Any) -> Iterator[Finding]:
    """Score the gold answers of a few rows, and attacks on them, by a stage's rewards."""
    name, form = step.stage.name, ready.transcript
    answered = [row for row in ready.rows if gold_answer(row).strip()]
    many, rows = first_rows(answered, CONSTANTS_TRIED), first_rows(answered, AUDITED)
    rules = [reward for reward in ready.rewards if not reward.is_opinion]  # no request, no weights
    if not (rows and rules):
        return
    report = audit(rules, rows, form, many)
    more = f"; see `chainforge check {paths.short(step.stage.config)}`" if step.stage.config else ""
    for error in [*report.errors, *map(str, report.constants[:2])]:
        yield Finding("error", "rewards", f"{error}{more}", name, "rewards")
    if not report.errors and report.failures:
        one = report.failures[0]
        text = (
            f"a wrong answer ({one.kind}) earns {one.total:g}, the gold answer "
            f"{one.row['answer']!r:.60} {one.gold:g}{more}"
        )
        yield Finding("error", "rewards", text, name, "rewards")
    elif not (report.errors or report.constants):
        yield Finding("ok", "rewards", "gold answers earn more than any other", name)


def _check_forms(rows: Any, form: str, stage: str) -> Iterator[Finding]:
    """Check that the completions of an SFT stage, or the chosen ones of DPO, are transcripts."""
    column = "completion" if "completion" in rows.column_names else "chosen"
    texts = [turns[0]["content"] for turns in rows[column]]
    odd = [number for number, text in enumerate(texts) if read(text, form) is None]
    if odd:
        text = (
            f"{len(odd):,} of {len(texts):,} completions are not transcripts of the form {form} "
            f"(the first is row {odd[0]}): correct them, or set `transcript`"
        )
        level: Level = "error" if len(odd) == len(texts) else "warning"
        yield Finding(level, "rows", text, stage, "transcript")


def _parse(recipe: Any, step: Step) -> tuple[Any, ...]:
    """Parse a stage's settings as the recipe does; without a GPU, as if the stage used none."""
    import torch

    on_cpu = step.stage.kind.trains and not torch.cuda.is_available()
    asked = sys.argv[1:] + (["--use_cpu", "true"] if on_cpu else [])
    configs = parse(*recipe.CONFIGS, argv=asked)
    for config in configs:
        if on_cpu and hasattr(config, "use_cpu"):
            config.use_cpu = bool(step.given.get("use_cpu"))
    return configs


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the warnings that are logged within this context; hide Python's, of libraries."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("chainforge")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield found
    finally:
        logger.removeHandler(handler)


def _fetch(chain: Chain) -> Iterator[Finding]:
    """Fetch configs and tokenizers of the chain's models from the Hub."""
    from huggingface_hub import snapshot_download

    for name in {name for name in chain.models.values() if not Path(name).exists()}:
        try:
            snapshot_download(name, allow_patterns=LIGHT, ignore_patterns=["*/*"])
        except hub_failures() as error:
            yield Finding("warning", "Hub", f"{name}: not found: {first_line(error)}")


def _key(text: str) -> str | None:
    """Return the setting that a message begins with."""
    words = [word.strip().lstrip("-").split(",")[0] for word in text.split(":")[:2]]
    return next((word for word in words if word.isidentifier() and "_" in word), None)


def worst(findings: list[Finding]) -> str:
    """Return the most severe level of all findings."""
    levels = {finding.level for finding in findings}
    return "error" if "error" in levels else "warning" if "warning" in levels else "ok"


def to_json(findings: list[Finding]) -> dict[str, Any]:
    """Return the findings for a machine to read."""
    return {"level": worst(findings), "findings": [vars(finding) for finding in findings]}


def print_findings(findings: list[Finding], console: Console) -> None:
    """Print a line for each finding: its level, what was checked, the stages, and the text."""
    lines: dict[tuple[str, str, str], list[str]] = {}  # the same text is printed once
    for finding in findings:
        stages = lines.setdefault((finding.level, finding.check, finding.text), [])
        stages += [finding.stage] if finding.stage and finding.stage not in stages else []
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for (level, check, text), stages in lines.items():
        words = f"{', '.join(stages)}: {text}" if stages else text
        table.add_row(Text(level, STYLES[level]), check, Text(words))
    console.print(table)
    counts = {one: sum(level == one for level, _, _ in lines) for one in ("error", "warning")}
    summary = (f"{number} {one}{'s' * (number != 1)}" for one, number in counts.items())
    console.print(f"\n{', '.join(summary)}", highlight=False)
