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
from chainforge.core.sharing import public, public_settings
from chainforge.core.transcript import DEFAULT, system_prompt, tags_of
from chainforge.core.upload import HUB_ID
from chainforge.data.datasheet import code, front_matter, section
from chainforge.train.lineage import Ancestor, Origin
from chainforge.train.measured import results
from chainforge.train.provenance import VERBS, data_sets, named, story, terms

KINDS = {"adapter": "A LoRA adapter", "model": "A model"}
LONGEST = 1024  # tokens to sample where no stage said
LIMITS = (
    "What was rewarded is the final answer; the reasoning before it can be wrong where the answer "
    "is right.",
    "It was trained and measured on the tasks above. Nothing is known of other tasks, of other "
    "languages, or of what it says when it is asked to do harm.",
)


def model_card(
    what: str,
    title: str,
    base: Origin | None,
    stages: Sequence[Ancestor],
    licence: Mapping[str, str],
) -> str:
    """Return the card of an adapter or a model; `base` is what it goes on, or began with.

    `title` is what it is loaded by; `stages` its lineage, the oldest first; `licence` the base's,
    as the Hub's cards have it.
    """
    stage = stages[-1] if stages else None
    return _joined(
        front_matter(_head(what, base, stages, licence)),
        f"# {_plain(title)}",
        _opening(what, base, stage),
        section("Use", _use(what, title, base, stages)),
        section("Results", *results(stages)) if stage else "",
        *story(stages, stages),
        _settings(stage),
        _unless_empty("Licence and terms", _licence(base, licence), terms(stages, what)),
        section("Limits", "\n".join(f"- {limit}" for limit in LIMITS)) if stage else "",
    )


def data_card(own: str, stages: Sequence[Ancestor], licence: Mapping[str, str]) -> str:
    """Return a data set's own card, with how it came about and on which terms.

    `licence` takes the place of the one that the card says.
    """
    head, rest = head_of(own)
    if licence:
        own = front_matter(head | dict(licence)) + "\n\n" + rest.lstrip("\n")
    told = "## Terms" in own  # the card of collected traces tells them itself, as each its funnel
    last = "" if told else _unless_empty("Licence and terms", terms(stages, "dataset"))
    return _joined(own.rstrip(), *story(stages, stages[:-1]), last)


def head_of(card: str) -> tuple[dict[str, Any], str]:
    """Return the YAML that a card begins with, and the rest; nothing where it cannot be read."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", card, re.DOTALL)
    if found is None:
        return {}, card
    try:
        head = yaml.safe_load(found[1])
    except yaml.YAMLError:
        head = None
    return (head if isinstance(head, dict) else {}), card[found.end() :]


def _unless_empty(title: str, *paragraphs: str) -> str:
    return section(title, *paragraphs) if any(paragraphs) else ""


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(title: str) -> str:
    """Return a title for a heading: on one line, and with nothing that Markdown would read."""
    return re.sub(r"([\\`*_\[\]<>#|!&])", r"\\\1", " ".join(title.split()))


def _head(
    what: str, base: Origin | None, stages: Sequence[Ancestor], licence: Mapping[str, str]
) -> dict[str, Any]:
    relation = "adapter" if what == "adapter" else "finetune"
    on_hub = base is not None and base.on_hub and HUB_ID.fullmatch(base.name)
    sets = data_sets(stages)
    return (
        dict(licence)
        | ({"base_model": base.name, "base_model_relation": relation} if base and on_hub else {})
        | {"library_name": "peft" if what == "adapter" else "transformers"}
        | {"pipeline_tag": "text-generation"}
        | ({"datasets": sets} if sets else {})
        | {"tags": ["chainforge", "trl", "reasoning", *(["lora"] if what == "adapter" else [])]}
    )


def _opening(what: str, base: Origin | None, stage: Ancestor | None) -> str:
    if stage is None:
        return f"{KINDS[what]}, uploaded by ChainForge {__version__}."
    on = "on" if what == "adapter" else "that began as"
    verb = VERBS.get(stage.manifest.recipe, code(stage.manifest.recipe))
    return (
        f"{KINDS[what]}{f' {on} {named(base)}' if base else ''}, which reasons before it answers: "
        f"stage `{code(stage.name)}` ({verb}) of a chain of ChainForge {__version__}."
    )


def _use(what: str, title: str, base: Origin | None, stages: Sequence[Ancestor]) -> str:
    """Show how it is loaded and asked, with the system turn that it was trained under."""
    preset, asked, longest = _form(stages)
    turns = [{"role": "system", "content": asked}] if asked else []
    turns += [{"role": "user", "content": "What is 7 + 5 - 3?"}]
    lines = [
        *_loading(what, title, base),
        "messages = [",
        *(f"    {json.dumps(turn, ensure_ascii=False)}," for turn in turns),
        "]",
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ").to(model.device)",
        f"output = model.generate(**inputs, max_new_tokens={longest})",
        'print(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :]))',
    ]
    text = _fenced("python", "\n".join(lines))
    if stages:
        tags = tags_of(preset)
        answer = f"between `{tags.answer_open}` and `{tags.answer_close}`"
        text += (
            f"\n\nThe reasoning stands between `{tags.reasoning_open}` and "
            f"`{tags.reasoning_close}`, the answer {answer if tags.answer_open else 'after it'}."
        )
    return text


def _loading(what: str, title: str, base: Origin | None) -> list[str]:
    """Return the lines that load it; an adapter finds a base on the Hub by itself."""
    where = json.dumps(title, ensure_ascii=False)
    last = f"tokenizer = AutoTokenizer.from_pretrained({where})"
    options = 'dtype="auto", device_map="auto"'
    if what == "adapter" and base is not None and not base.on_hub:
        under = json.dumps(public(base.name), ensure_ascii=False)
        return [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            "# The model that it was trained on, from where you have it.",
            f"base = AutoModelForCausalLM.from_pretrained({under}, {options})",
            f"model = PeftModel.from_pretrained(base, {where})",
            last,
        ]
    auto = "AutoPeftModelForCausalLM" if what == "adapter" else "AutoModelForCausalLM"
    adapter = [f"from peft import {auto}", "from transformers import AutoTokenizer"]
    imports = adapter if what == "adapter" else [f"from transformers import {auto}, AutoTokenizer"]
    return [*imports, "", f"model = {auto}.from_pretrained({where}, {options})", last]


def _fenced(language: str, text: str) -> str:
    """Put text into a block of code that nothing in it can end."""
    fence = max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))]) * "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _form(stages: Sequence[Ancestor]) -> tuple[str, str, int]:
    """Return the transcript's preset, the system turn and the length of answers, as last set.

    Where all rows were somebody's own no system turn is known.
    """
    preset, asked, longest = DEFAULT, "", LONGEST
    for stage in stages:
        preset = str(stage.setting("transcript", preset))
        longest = stage.setting("max_completion_length", stage.setting("max_new_tokens", longest))
        if stage.setting("tasks"):
            own = stage.setting("system_prompt")
            asked = system_prompt(preset) if own is None else str(own)
    return preset, asked, int(longest)


def _settings(stage: Ancestor | None) -> str:
    """Show the stage's settings as they were given: its YAML and what overrode it."""
    if stage is None:
        return ""
    given = {k: v for k, v in stage.manifest.given.items() if not k.startswith("hub_")}
    shown = yaml.safe_dump(public_settings(given), sort_keys=False, allow_unicode=True)
    return section(f"Settings of `{code(stage.name)}`", _fenced("yaml", shown.rstrip("\n")))


def _licence(base: Origin | None, licence: Mapping[str, str]) -> str:
    name = licence.get("license_name") or licence.get("license")
    said = f"Licence: `{code(name)}`." if name else ""
    theirs = "That" if name else "The licence"
    return f"{said} {theirs} of {named(base)} holds for this too.".strip() if base else said
