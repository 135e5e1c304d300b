"""Decide what a stage hands on: its `model/`, or its `adapter/` where the next one asks for that.

`adapter: continue` and `adapter: new` take the adapter of the stage before, and everything else
takes the merged model. A stage that does not keep what the next one needs is found out here, before
anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chainforge.chain.stages import Stage
from chainforge.core.errors import InputError
from chainforge.core.options import truth
from chainforge.train.model_source import merge_command
from chainforge.train.settings import TRAINED

ADAPTER = "adapter_config.json"
Settings = Mapping[str, Any]


def adapter_of(stage: Stage, settings: Settings) -> str:
    """Return what a stage does with an adapter that it is given: `merge` if it does not say."""
    return str(settings.get("adapter") or "merge") if stage.recipe in TRAINED else "merge"


def trains_adapter(stage: Stage, settings: Settings) -> bool:
    """Whether a stage trains a LoRA adapter, and not all weights."""
    return stage.recipe in TRAINED and _true(settings.get("use_peft"))


def part_of(
    giver: Stage, given: Settings, taker: Stage, asked: Settings, role: str = "model"
) -> str:
    """Return which directory of `giver` goes to `taker`: `model` or `adapter`.

    Raises `InputError` when `giver` makes or keeps no such thing.
    """
    how = adapter_of(taker, asked) if role == "model" else "merge"
    known = giver.recipe in TRAINED  # what one's own recipe leaves, only it knows
    if how == "continue" and known and not trains_adapter(giver, given):
        raise InputError(
            f"stage {taker.name}: adapter: continue: stage {giver.name} trains all weights, so "
            f"there is no adapter; set use_peft: true in {giver.name}, or adapter: merge here"
        )
    wants = how == "continue" or (how == "new" and trains_adapter(giver, given))
    part = "adapter" if wants else "model"
    kept = given.get("save")
    if known and kept is not None and part not in (kept if isinstance(kept, list) else [kept]):
        raise InputError(
            f"stage {taker.name} needs {giver.name}/{part}, which {giver.name} does not save "
            f"(save: {kept}); add {part} to it"
        )
    return part


def check_path(path: str, name: str, taker: Stage, asked: Settings, role: str = "model") -> None:
    """Raise `InputError` when a model that no stage made cannot serve as `taker` wants it."""
    if not Path(path).is_dir():
        return  # a Hub id: the stage itself will see
    adapter = (Path(path) / ADAPTER).exists()
    if adapter and (taker.recipe not in TRAINED or role != "model"):
        raise InputError(
            f"stage {taker.name}: {name} is a LoRA adapter ({path}); only {', '.join(TRAINED)} "
            f"open one, as their model; merge it first: {merge_command(path)}"
        )
    if not adapter and role == "model" and adapter_of(taker, asked) == "continue":
        raise InputError(
            f"stage {taker.name}: adapter: continue: {name} is a plain model ({path}); give an "
            "adapter, or say adapter: merge"
        )


def contract(stage: Stage, settings: Settings, path: str) -> list[tuple[str, str]]:
    """Return what a training stage trains and, in RL with a KL penalty, what it is held to."""
    if stage.recipe not in TRAINED:
        return []
    lines = [("trains", _in_words(stage, settings))]
    try:
        beta = float(settings.get("beta") or 0)
    except (TypeError, ValueError):
        beta = 0.0  # the recipe itself will refuse it, by name
    if stage.recipe == "grpo" and beta > 0:
        copy = "a frozen copy of " if adapter_of(stage, settings) == "continue" else ""
        moves = ", brought up to date on the way" if _true(settings.get("sync_ref_model")) else ""
        text = f"the policy it starts from: {copy}{path}{moves} (beta {beta:g})"
        lines.append(("KL reference", text))
    return lines


def _in_words(stage: Stage, settings: Settings) -> str:
    if not trains_adapter(stage, settings):
        return "all weights"
    quantised = _true(settings.get("load_in_4bit")) or _true(settings.get("load_in_8bit"))
    kind = "QLoRA" if quantised else "LoRA"
    if adapter_of(stage, settings) == "continue":
        return f"the {kind} adapter that it is given"
    return f"a fresh {kind} adapter"


def _true(value: Any) -> bool:
    return value is True or str(truth(value)).lower() in ("true", "1")
