"""What several checks look at, each of it loaded once: settings and tokenizers. No weights."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from chainforge.chain.plan import Step
from chainforge.chain.spec import RECIPES
from chainforge.core.artifacts import read_json
from chainforge.core.config import values_of
from chainforge.core.errors import InputError, first_line
from chainforge.core.jsonl import Row
from chainforge.core.plugins import resolve
from chainforge.core.transcript import DEFAULT
from chainforge.core.weights import hub_failures
from chainforge.doctor.findings import Context, NotHere
from chainforge.train.architecture import cached
from chainforge.train.model_source import ADAPTER
from chainforge.train.templates import _QUESTION, _bounded, _flaw, set_template, shield

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


def tokenizer(context: Context, name: str, step: Step | None = None) -> Any:
    """Return the tokenizer that a model or a stage's policy goes back to.

    Its chat template is the one that `step`, or a stage that made the policy, sets. Raises
    `InputError` for a folder that has none, `NotHere` for a Hub id that is not cached.
    """
    root, template = context.root(name), _template(context, name, step)

    def make() -> Any:
        from transformers import AutoTokenizer

        folder = Path(root).is_dir()
        if folder and not (Path(root) / "tokenizer_config.json").exists():
            if (Path(root) / ADAPTER).exists():
                raise NotHere(f"{root}: an adapter without a tokenizer of its own")
            raise InputError(f"{root} has no tokenizer: it has no tokenizer_config.json")
        try:
            made = AutoTokenizer.from_pretrained(root, local_files_only=True)
        except (OSError, ValueError) as error:
            if folder:
                raise InputError(f"{root}: no tokenizer: {first_line(error)}") from None
            raise NotHere(f"{root} is not on this machine; {ONLINE}, but no weights") from None
        set_template(made, template)
        if made.chat_template:
            _bounded(made, lambda: _flaw(made, _QUESTION, "2", {}), template or root)
        return shield(made)

    return once(context, ("tokenizer", root, template), make)


def _template(context: Context, name: str, step: Step | None) -> str | None:
    """Return the `chat_template_path` that is in force in a stage, or in those below a policy."""
    path = step.given.get("chat_template_path") if step else None
    below = step_of(context, name)
    while below is not None and not path:
        path, below = below.given.get("chat_template_path"), step_of(context, sampled(below))
    return str(path) if path else None


def context_length(context: Context, name: str) -> int | None:
    """Return how many positions a model knows, where its config says so."""
    root = context.root(name)
    path = Path(root) / "config.json"
    found = str(path) if path.is_file() else cached(root)
    length = read_json(found).get("max_position_embeddings") if found else None
    return length if isinstance(length, int) else None


def prompt_tokens(tokenizer: Any, rows: Sequence[Row]) -> list[int]:
    """Return the tokens of each row's prompt, as it is sampled from."""
    from chainforge.generate.local import encode

    return [len(ids) for ids in encode(tokenizer, list(rows))]


def sampled(step: Step) -> str:
    """Return the model whose prompts a stage writes: its own, or the first that it measures."""
    return step.stage.model or (step.stage.models[0] if step.stage.models else "")


def step_of(context: Context, name: str) -> Step | None:
    """Return the stage of that name; None for a model, or a path."""
    return next((step for step in context.steps if step.stage.name == name), None)


def end_token(context: Context, name: str) -> str | None:
    """Return the token that ends a policy's completions; an SFT's `eos_token` changes it."""
    step = step_of(context, name)
    while step is not None:
        if changed := step.given.get("eos_token"):
            return str(changed)
        name = step.stage.model or ""
        step = step_of(context, name)
    return str(tokenizer(context, name).eos_token)
