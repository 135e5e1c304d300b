"""What several checks look at, each of it loaded once: settings, tokenizers, rows. No weights."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import read_json
from chainforge.core.config import values_of
from chainforge.core.errors import InputError
from chainforge.core.records import Row
from chainforge.core.references import resolve
from chainforge.core.transcript import DEFAULT
from chainforge.core.upload import hub_failures
from chainforge.data.datasets import DataArgs, sft_mixture
from chainforge.data.tasks import load_examples
from chainforge.pipeline.checkup.findings import Context, NotHere
from chainforge.pipeline.plan import DONE, Step
from chainforge.pipeline.stages import RECIPES
from chainforge.rewards.attacks import completion_of, gold_answer
from chainforge.training.architecture import cached
from chainforge.training.sources import ADAPTER, first_line

MOST = 4096  # rows of a task that are looked at: enough for its longest, and seconds at most
ONLINE = "--online fetches it"
# All of a model that is looked at here: no weights.
LIGHT = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


def once(context: Context, key: Any, make: Callable[[], Any]) -> Any:
    """Return what `make` gives, or raise what it raised, as often as asked, but make it once."""
    if key not in context.found:
        try:
            context.found[key] = make()
        except (InputError, NotHere) as error:
            context.found[key] = error
    if isinstance(found := context.found[key], Exception):
        raise found
    return found


def settings(context: Context, step: Step) -> dict[str, Any]:
    """Return a stage's settings by the name of each dataclass that its recipe parses.

    TRL's own come as mappings, ours are built. Raises `InputError` for what cannot be parsed, and
    `NotHere` for a recipe of the user's own.
    """

    def make() -> dict[str, Any]:
        if step.stage.recipe not in RECIPES:
            raise NotHere("a recipe of your own: it alone knows its settings")
        place = next(i for i, word in enumerate(step.command) if word.endswith(".py"))
        kinds = kinds_of(Path(step.command[place]))
        values = values_of(*kinds, argv=step.command[place + 1 :])
        return {
            kind.__name__: given if kind.__module__.startswith("trl.") else kind(**given)
            for kind, given in zip(kinds, values, strict=True)
        }

    return dict(once(context, ("settings", step.stage.name), make))


def training_of(context: Context, step: Step) -> dict[str, Any]:
    """Return a training stage's TRL settings, TRL's defaults included, as one mapping."""
    found: dict[str, Any] = {}
    for values in settings(context, step).values():
        found |= values if isinstance(values, dict) else {}
    return found


def kinds_of(script: Path) -> list[Any]:
    """Return the dataclasses that a recipe parses, as its own call of `parse` names them."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    homes = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    names = [
        word.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "parse"
        for word in node.args
        if isinstance(word, ast.Name)
    ]
    return [
        getattr(importlib.import_module(homes[name]), name)
        if name in homes
        else resolve(f"{script}:{name}", {})
        for name in names
    ]


def fetch(context: Context) -> Iterator[str]:
    """Fetch configs and tokenizers of the chain's models from the Hub; yield what was refused."""
    from huggingface_hub import snapshot_download

    models = context.chain.models.values() if context.chain else ()
    for name in {name for name in models if not Path(name).exists()}:
        try:
            snapshot_download(name, allow_patterns=LIGHT, ignore_patterns=["*/*"])
        except hub_failures() as error:
            yield f"{name}: the Hub does not give it: {first_line(error)}"


def transcript_of(step: Step) -> str:
    """Return the preset of a stage's transcript."""
    return str(step.given.get("transcript", DEFAULT))


def tokenizer(context: Context, name: str) -> Any:
    """Return the tokenizer that a model or a stage's policy goes back to.

    Raises `InputError` for a folder that has none, `NotHere` for a Hub id that is not cached.
    """
    root = context.root(name)

    def make() -> Any:
        from transformers import AutoTokenizer

        folder = Path(root).is_dir()
        if folder and not (Path(root) / "tokenizer_config.json").exists():
            if (Path(root) / ADAPTER).exists():
                raise NotHere(f"{root}: an adapter without a tokenizer of its own")
            raise InputError(f"{root} has no tokenizer: it has no tokenizer_config.json")
        try:
            return AutoTokenizer.from_pretrained(root, local_files_only=True)
        except (OSError, ValueError) as error:
            if folder:
                raise InputError(f"{root}: no tokenizer: {first_line(error)}") from None
            raise NotHere(f"{root} is not on this machine; {ONLINE}, but no weights") from None

    return once(context, ("tokenizer", root), make)


def context_length(context: Context, name: str) -> int | None:
    """Return how many positions a model knows, where its config says so."""
    root = context.root(name)
    path = Path(root) / "config.json"
    found = str(path) if path.is_file() else cached(root)
    length = read_json(found).get("max_position_embeddings") if found else None
    return length if isinstance(length, int) else None


def encoded(tokenizer: Any, rows: list[Row]) -> list[list[int]]:
    """Return the token ids of each row's prompt, as it is sampled from."""
    from chainforge.data.sampling.local_engine import encode

    return encode(tokenizer, rows)


def sampled(step: Step) -> str:
    """Return the model whose prompts a stage writes: its own, or the first that it measures."""
    return step.stage.model or (step.stage.models[0] if step.stage.models else "")


def examples(context: Context, step: Step) -> list[Row]:
    """Return the rows of a stage's tasks, `MOST` of each task at most; none without tasks."""
    args = settings(context, step).get("TaskArgs")
    if args is None or not args.tasks:
        return []
    seed, form = int(step.given.get("seed", 42)), transcript_of(step)

    def make() -> list[Row]:
        few = replace(args, tasks=[_at_most(task) for task in args.tasks])
        try:
            return load_examples(few, form, seed)
        except InputError as error:
            names = [name for task in args.tasks if (name := _on_hub(task))]
            if not context.online and names:
                raise NotHere(f"no data set {names[0]} on this machine; {ONLINE}") from None
            raise InputError(first_line(error)) from None
        except Exception as error:  # a task of the user's own may raise anything
            raise InputError(f"tasks: {type(error).__name__}: {error}") from error

    key = json.dumps([args.tasks, args.system_prompt, seed, form], default=str)
    return list(once(context, ("examples", key), make))


def _at_most(task: Any) -> Any:
    size = task.get("size") if isinstance(task, dict) else None
    return task | {"size": MOST} if isinstance(size, int) and size > MOST else task


def _on_hub(task: Any) -> str | None:
    """Return the name of a task's data set where it is one of the Hub's."""
    params = task.get("params") if isinstance(task, dict) and task.get("fn") == "hub" else None
    name = str(params.get("dataset")) if isinstance(params, dict) else None
    return None if name is None or Path(name).exists() else name


@dataclass(frozen=True)
class Learnt:
    """Rows that an SFT stage learns from: `prompt` and `completion` messages.

    `real` when these rows, or worked solutions just like them, will be trained on; else they are
    the prompts with gold answers in the transcript's form, and say nothing of lengths.
    """

    rows: list[Row]
    real: bool
    source: str


def learnt_from(context: Context, step: Step) -> list[Learnt]:
    """Return what an SFT stage learns from: rows that are there, or such as will be."""

    def make() -> list[Learnt]:
        args = settings(context, step).get("DataArgs")
        assert isinstance(args, DataArgs)
        found = []
        for place, name in enumerate(step.stage.data):
            giver = _step(context, name)
            if giver is None or giver.state == DONE:
                path = step.inputs[f"data.{place}"].path
                rows, _ = sft_mixture(replace(args, data=[path], data_weights=[]))
                found.append(Learnt(list(rows), True, name))
            else:
                key, make_up = ("foreseen", name), partial(_foreseen, context, giver)
                found += [part for part in (once(context, key, make_up),) if part]
        return found

    return list(once(context, ("learnt", step.stage.name), make))


def _step(context: Context, name: str) -> Step | None:
    return next((step for step in context.steps if step.stage.name == name), None)


def _foreseen(context: Context, giver: Step) -> Learnt | None:
    """Return rows as a data stage that has not run will leave them; None where nobody knows."""
    rows, form = examples(context, giver), transcript_of(giver)
    args = settings(context, giver).get("TeacherArgs")
    if args is not None and args.teacher == "offline":
        from chainforge.data.collection.offline import OfflineTeacher

        teacher = OfflineTeacher(args.styles, int(giver.given.get("seed", 42)), form)
        teacher.check(rows)
        texts = [teacher.answer(row, 0)["completion"] for row in rows]
    else:
        rows = [row for row in rows if gold_answer(row).strip()]
        texts = [completion_of(gold_answer(row), form) for row in rows]
    if not rows:
        return None
    pairs = [
        {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": text}]}
        for row, text in zip(rows, texts, strict=True)
    ]
    return Learnt(pairs, args is not None and args.teacher == "offline", giver.stage.name)


def taught(context: Context, name: str) -> list[Learnt]:
    """Return what the last SFT below a policy learns from: how long its answers are."""
    step = _step(context, name)
    while step is not None and step.stage.recipe != "sft":
        step = _step(context, step.stage.model or "")
    return learnt_from(context, step) if step else []


def end_token(context: Context, name: str) -> str | None:
    """Return the token that ends a policy's completions; an SFT's `eos_token` changes it."""
    step = _step(context, name)
    while step is not None:
        if changed := step.given.get("eos_token"):
            return str(changed)
        name = step.stage.model or ""
        step = _step(context, name)
    return str(tokenizer(context, name).eos_token)
