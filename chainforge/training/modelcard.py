"""The card of an exported model, adapter or data set: what it is, made from what, worth what.

Everything in it is from the manifests, funnels and results of the run. No path of this machine
goes into it, and of the settings nothing that is called a key or a token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from chainforge import __version__
from chainforge.core.transcript import DEFAULT, system_prompt, tags_of
from chainforge.core.upload import HUB_ID
from chainforge.data.selection.datasheet import code, front_matter, section
from chainforge.training.lineage import Ancestor, data_sets
from chainforge.training.provenance import VERBS, linked, results, story, terms

KINDS = {"adapter": "A LoRA adapter", "model": "A model"}
LIMITS = (
    "What was rewarded is the final answer; the reasoning before it can be wrong where the answer "
    "is right.",
    "It was trained and measured on the tasks above. Nothing is known of other tasks, of other "
    "languages, or of what it says when it is asked to do harm.",
)
_PRIVATE = re.compile(r"(?:^|_)(?:token|key|secret|password)$")


def model_card(
    what: str, title: str, base: str | None, stages: Sequence[Ancestor], licence: Mapping[str, str]
) -> str:
    """Return the card of an adapter or a model; `base` is what it goes on, or began with.

    `stages` is its lineage, the oldest first; `licence` the base's, as the Hub's cards have it.
    """
    stage = stages[-1] if stages else None
    return _joined(
        front_matter(_head(what, base, stages, licence)),
        f"# {title}",
        _opening(what, base, stage),
        section("Use", _use(what, title, stages)),
        *story(stages, stages),
        section("Results", *results(stage)) if stage else "",
        _settings(stage),
        _unless_empty("Licence and terms", _licence(base, licence), terms(stages)),
        section("Limits", "\n".join(f"- {limit}" for limit in LIMITS)) if stage else "",
    )


def data_card(own: str, stages: Sequence[Ancestor], licence: Mapping[str, str]) -> str:
    """Return a data set's own card, with how it came about and on which terms.

    `licence` takes the place of the one that the card says.
    """
    if licence and own.startswith("---\n"):
        head, _, rest = own.removeprefix("---\n").partition("\n---")
        own = front_matter(dict(yaml.safe_load(head) or {}) | dict(licence)) + rest
    told = "## Terms" in own  # the card of collected traces tells them itself, as each its funnel
    last = "" if told else _unless_empty("Licence and terms", terms(stages))
    return _joined(own.rstrip(), *story(stages, stages[:-1]), last)


def _unless_empty(title: str, *paragraphs: str) -> str:
    return section(title, *paragraphs) if any(paragraphs) else ""


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(
    what: str, base: str | None, stages: Sequence[Ancestor], licence: Mapping[str, str]
) -> dict[str, Any]:
    relation = "adapter" if what == "adapter" else "finetune"
    on_hub = base and HUB_ID.fullmatch(base)
    sets = data_sets(list(stages))
    return (
        dict(licence)
        | ({"base_model": base, "base_model_relation": relation} if on_hub else {})
        | {"library_name": "peft" if what == "adapter" else "transformers"}
        | {"pipeline_tag": "text-generation"}
        | ({"datasets": sets} if sets else {})
        | {"tags": ["chainforge", "trl", "reasoning", *(["lora"] if what == "adapter" else [])]}
    )


def _opening(what: str, base: str | None, stage: Ancestor | None) -> str:
    if stage is None:
        return f"{KINDS[what]}, uploaded by ChainForge {__version__}."
    on = "on" if what == "adapter" else "that began as"
    verb = VERBS.get(stage.manifest.recipe, stage.manifest.recipe)
    return (
        f"{KINDS[what]}{f' {on} {linked(base)}' if base else ''}, which reasons before it answers: "
        f"stage `{code(stage.name)}` ({verb}) of a chain of ChainForge {__version__}."
    )


def _use(what: str, title: str, stages: Sequence[Ancestor]) -> str:
    """Show how it is loaded and asked, with the system turn that it was trained under."""
    adapter = what == "adapter"
    auto = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    loaders = f"from peft import {auto}\nfrom transformers import AutoTokenizer"
    preset, asked = _form(stages)
    turns = [{"role": "system", "content": asked}] if asked else []
    turns += [{"role": "user", "content": "What is 7 + 5 - 3?"}]
    lines = [
        "```python",
        loaders if adapter else f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("{title}", dtype="auto", device_map="auto")',
        f'tokenizer = AutoTokenizer.from_pretrained("{title}")',
        "messages = [",
        *(f"    {json.dumps(turn, ensure_ascii=False)}," for turn in turns),
        "]",
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ").to(model.device)",
        "output = model.generate(**inputs, max_new_tokens=1024)",
        "print(tokenizer.decode(output[0]))",
        "```",
    ]
    if stages:
        tags = tags_of(preset)
        answer = f"between `{tags.answer_open}` and `{tags.answer_close}`"
        lines += [
            "",
            f"The reasoning stands between `{tags.reasoning_open}` and `{tags.reasoning_close}`, "
            f"the answer {answer if tags.answer_open else 'after it'}.",
        ]
    return "\n".join(lines)


def _form(stages: Sequence[Ancestor]) -> tuple[str, str]:
    """Return the transcript's preset and the system turn, of the last stage that set them."""
    preset, asked = DEFAULT, None if stages else ""
    for stage in stages:
        preset = str(stage.setting("transcript", preset))
        if stage.setting("tasks"):
            asked = stage.setting("system_prompt")
    return preset, system_prompt(preset) if asked is None else str(asked)


def _settings(stage: Ancestor | None) -> str:
    """Show the stage's settings as they were given: its YAML and what overrode it."""
    if stage is None:
        return ""
    given = {
        key: value
        for key, value in stage.manifest.given.items()
        if not _PRIVATE.search(key) and not key.startswith("hub_")
    }
    shown = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    fence = max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", shown))]) * "`"
    return section(f"Settings of {code(stage.name)}", f"{fence}yaml\n{shown}{fence}")


def _licence(base: str | None, licence: Mapping[str, str]) -> str:
    name = licence.get("license_name") or licence.get("license")
    said = f"Licence: `{code(name)}`." if name else ""
    return f"{said} That of {linked(base)} holds for this too.".strip() if base else said
