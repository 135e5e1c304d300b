"""Describe the settings of a recipe: for `--help`, the documentation, and wrong keys."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import runpy
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from chainforge.core.paths import shipped
from chainforge.core.secrets import is_secret_key

CLOSE = 0.85  # of difflib's ratio: one letter in six; local_rank is no lora_rank
# The options of TRL that people set.
OFTEN = {
    "model": "model_name_or_path dtype use_peft lora_r lora_target_modules load_in_4bit",
    "training": "learning_rate warmup_steps num_train_epochs max_steps per_device_train_batch_size "
    "gradient_accumulation_steps max_length packing",
    "generation": "num_generations max_completion_length temperature beta use_vllm "
    "teacher_model_name_or_path",
    "output": "output_dir save_steps report_to",
}


class Option(NamedTuple):
    """One setting, as text: its type, its default (empty for none) and its meaning."""

    name: str
    kind: str
    default: str
    help: str


def fields_of(kind: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that a user can see."""
    items = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return {item.name: item for item in items if item.init and not is_secret_key(item.name)}


@functools.cache
def recipes() -> dict[str, tuple[Any, ...]]:
    """Return the dataclasses of each shipped recipe; takes seconds, as it loads TRL."""
    scripts = sorted(shipped("recipes").glob("*.py"))
    return {file.stem: runpy.run_path(str(file), run_name=file.stem)["CONFIGS"] for file in scripts}


def grouped(kinds: Iterable[Any], everything: bool = False) -> dict[str, list[Option]]:
    """Return a recipe's settings by title: ChainForge's own, then TRL's, the most used first."""
    kinds, groups = list(kinds), {}
    known = {name: item for kind in kinds for name, item in fields_of(kind).items()}
    libraries = [kind for kind in kinds if kind.__module__.startswith(("trl.", "transformers."))]
    for kind in kinds:
        if kind not in libraries:
            groups[str(kind.__doc__).partition("\n")[0].rstrip(".")] = list(fields_of(kind))
    theirs = set(known).difference(*groups.values())
    for title, names in OFTEN.items():
        groups[f"TRL: {title}"] = [name for name in names.split() if name in theirs]
    if everything:
        above = {name for kind in libraries for one in kind.__mro__[1:] for name in fields_of(one)}
        groups["TRL: all others"] = [name for name in known if name not in above]
        groups["transformers.TrainingArguments: all others"] = list(known)
    found = {
        title: [_option(known.pop(name)) for name in names if name in known]
        for title, names in groups.items()
    }
    return {title: options for title, options in found.items() if options}


def help_text(kinds: Iterable[Any], everything: bool = False) -> str:
    """Return the help of a recipe, as wide as the terminal."""
    main, width = sys.modules["__main__"].__doc__ or "", shutil.get_terminal_size().columns
    lines = [f"usage: {Path(sys.argv[0]).name} [--config FILE] [--preset NAME] [--KEY VALUE ...]"]
    lines += ["", main.strip(), "", "FILE is a YAML of the settings below. A preset (a file, or a "
              "name in recipes/presets/) is", "under it, the command line over both."]  # fmt: skip
    groups = grouped(kinds, everything)
    for title, options in groups.items():
        lines += ["", f"{title}:"]
        for option in options:
            default = f" (default: {option.default})" if option.default else ""
            text = textwrap.fill(option.help + default, max(40, min(width, 100) - 6))
            lines += [f"  --{option.name}  {option.kind}", textwrap.indent(text, " " * 6)]
    total = sum(map(len, grouped(kinds, True).values()))
    shown = sum(map(len, groups.values()))
    lines += [f"\n... all {total} with --help-all"] if shown < total else []
    return "\n".join([*lines, ""])


def tables(kinds: Iterable[Any]) -> str:
    """Return what `--help` shows as Markdown: a heading and a table for each group."""
    lines = []
    for title, options in grouped(kinds).items():
        lines += [f"### {title}", "", "| setting | type | default | meaning |", "|---|---|---|---|"]
        for option in options:
            default = f"`{option.default}`" if option.default else ""
            cells = (f"`{option.name}`", f"`{option.kind}`", default, option.help)
            line = " | ".join(re.sub(r"(?=\|)", r"\\", cell) for cell in cells)
            lines.append(f"| {line.replace('<', '&lt;')} |")
        lines.append("")
    return "\n".join(lines)


# TRL says that it truncates a longer row; here that is refused before training.
OURS = {"max_length": "Longest row, in tokens; a longer one is an error, and is never cut."}


def _option(item: Any) -> Option:
    """Return a field as text."""
    kind = item.type if isinstance(item.type, str) else str(item.type).replace("typing.", "")
    kind = re.sub(r"<class '|'>|\b[a-z_]+\.(?:\w+\.)*(?=[A-Z])", "", kind)
    kind = re.sub(r"Literal\[(.*)\]", lambda m: re.sub("['\"]", "", m[1]).replace(",", " |"), kind)
    words = [word for word in kind.split(" | ") if word not in ("None", "NoneType")]
    make = item.default_factory
    value = item.default if make is dataclasses.MISSING else make()
    value = value.value if isinstance(value, Enum) else value
    unset = value in (None, "", []) or value is dataclasses.MISSING
    default = "" if unset else value if isinstance(value, str) else json.dumps(value, default=str)
    text = OURS.get(item.name) or " ".join(
        str(item.metadata.get("help") or "").replace("%%", "%").split()
    )
    return Option(item.name, " | ".join(item.metadata.get("choices") or words), default, text)


def meant(key: str, known: Collection[str], close: float = CLOSE) -> str:
    """Return what to write instead of an unknown key, as the end of a message; empty if unclear."""
    setting, remark = _answer(key, known, close)
    note = f" ({remark})" if remark else ""
    return f"; did you mean {setting!r}{note}?" if setting else f"; {remark}" if remark else ""


def elsewhere(key: str) -> str:
    """Return which recipes have a setting of this name or meaning, as the end of a message."""
    found = {}
    for recipe, kinds in recipes().items():
        known = {name for kind in kinds for name in fields_of(kind)}
        found[recipe] = key if key in known else _answer(key, known)[0]
    name = found["grpo"] or next(filter(None, found.values()), "")  # RL has most of such names
    name = key if key in found.values() else name
    where = [recipe for recipe, other in found.items() if other == name]
    return f"; {name!r} is a setting of {', '.join(where)}" if name else "; see --help-all"


def _answer(key: str, known: Collection[str], close: float = CLOSE) -> tuple[str, str]:
    """Return the setting that was meant and a remark, by `foreign.txt` or by spelling; or neither.

    Of a key with dots the last parts count, such as `rollout.n`.
    """
    parts = key.lower().replace("-", "_").split(".")
    for name in [".".join(parts[start:]) for start in range(len(parts))]:
        for settings, alone, names in _foreign():
            if any(fnmatchcase(name, other) for other in names):
                for setting, remark in settings:
                    if set(setting.split("+")) <= set(known):
                        return setting.partition("+")[0], remark
                if alone:
                    return "", alone
    near = difflib.get_close_matches(parts[-1], known, n=1, cutoff=close)
    return (near[0] if near else ""), ""


@functools.cache
def _foreign() -> list[tuple[list[tuple[str, str]], str, list[str]]]:
    """Return the entries of `foreign.txt`: settings with remarks, a remark alone, and names."""
    text = Path(__file__).with_name("foreign.txt").read_text(encoding="utf-8")
    entries = []
    for entry in text.replace(" | ", "\n").splitlines()[2:]:
        answer, _, names = entry.partition(" <- ")
        alone = answer[1:-1] if answer.startswith("(") else ""
        settings = [] if alone else re.findall(r"([\w+]+)(?: \((.*?)\))?", answer)
        entries.append((settings, alone, names.split()))
    return entries
