"""The card of a data set that was selected: what the rows are, and where the others went.

`sections` and what they are made of serve any card; `write_sheet` writes that of a reject stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from chainforge import __version__
from chainforge.core.disk import replacing
from chainforge.core.jsonl import Row
from chainforge.core.secrets import public, public_settings
from chainforge.data.choice import difficulty
from chainforge.data.contamination import COMMON, COVERAGE, N

NAME = "README.md"
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
LIMITS = (
    "Right means that the final answer agreed with the gold answer; the reasoning before it was "
    "not checked, and a right answer can be reached by wrong steps.",
    "Every row was written by a model: it may state what is false, and it has that model's biases.",
    "Decontamination finds questions that stand in a prompt verbatim or nearly so; no method of "
    "this kind finds a paraphrase.",
    "The language filter counts words by script; languages of one script are told apart only "
    "where `language_vote` was on.",
)


def write_sheet(
    folder: Path,
    rows: Sequence[Row],
    funnel: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    pairs: int = 0,
    license: str = "other",
) -> Path:
    """Write `folder`/README.md about the kept `rows`.

    `funnel` says where the others went; `settings` are those of selection and filters.
    """
    configs = [{"config_name": "default", "data_files": "train.parquet", "default": True}]
    if pairs:
        configs.append({"config_name": "pairs", "data_files": "pairs/train.parquet"})
    head = {
        "license": license,
        "task_categories": ["text-generation"],
        "size_categories": [size_category(len(rows))],
        "tags": ["chainforge", "reasoning", "rejection-sampling", "synthetic"],
        "configs": configs,
    }
    parts = [
        front_matter(head),
        "# Selected reasoning",
        f"{len(rows):,} completions that ChainForge {__version__} selected out of "
        f"{funnel['in']:,} scored samples, for supervised fine-tuning. `prompt` and `completion` "
        "are messages; the other columns say how a row was sampled and judged.",
        section("Where they are from", _provenance(rows)),
        section("Where the samples went", funnel_table(funnel, "samples")),
        section("What was asked of them", _settings(settings)),
        section("Decontamination", _decontamination(funnel, settings)),
        section("Rows", counts_table("task", rows), _difficulties(rows), _lengths(rows)),
    ]
    if pairs:
        parts.append(section("Preference pairs", _pairs(pairs)))
    parts.append(section("Limits", "\n".join(f"- {limit}" for limit in LIMITS)))
    path = folder / NAME
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def front_matter(head: Mapping[str, Any]) -> str:
    """Return the YAML with which the Hub's cards begin."""
    return f"---\n{yaml.safe_dump(dict(head), sort_keys=False)}---"


def section(title: str, *paragraphs: str) -> str:
    """Return a section of Markdown; empty paragraphs are left out."""
    return "\n\n".join([f"## {title}", *(text for text in paragraphs if text)])


def funnel_table(funnel: Mapping[str, Any], what: str) -> str:
    """Return how many are left after each filter, in the order of the filters."""
    left = funnel["in"]
    lines = [f"| filter | {what} dropped | left |", "|---|---:|---:|", f"| all | | {left:,} |"]
    for reason, count in funnel["dropped"].items():
        left -= count
        lines.append(f"| `{code(reason)}` | {count:,} | {left:,} |")
    lines.append(f"| **kept** | | **{funnel['kept']:,}** |")
    return "\n".join(lines)


def counts_table(column: str, rows: Sequence[Row]) -> str:
    """Return how many rows have each value of a column."""
    counts = Counter(code(row.get(column)) for row in rows).most_common()
    lines = [f"| {column} | rows |", "|---|---:|"]
    return "\n".join(lines + [f"| `{name}` | {count:,} |" for name, count in counts])


def size_category(rows: int) -> str:
    """Return the Hub's name for the size of a data set."""
    return next((name for most, name in SIZES.items() if rows < most), "n>1M")


def code(value: Any) -> str:
    """Return text for a code span: on one line, with nothing that would end it."""
    return " ".join(str(value).replace("`", "'").replace("|", "/").split())


def _provenance(rows: Sequence[Row]) -> str:
    columns = ("source", "model", "stage")
    groups = Counter(tuple(code(row.get(name)) for name in columns) for row in rows).most_common()
    lines = [
        f"- {count:,} rows by `{public(model)}` (source `{source}`, stage `{stage}`)"
        for (source, model, stage), count in groups
    ]
    sampled = Counter(code(_sampling(row["sampling"])) for row in rows if row.get("sampling"))
    lines += [f"- {count:,} rows sampled with `{how}`" for how, count in sampled.most_common(5)]
    return "\n".join(lines)


def _sampling(given: Any) -> Any:
    """Return sampling parameters without what differs from row to row."""
    if not isinstance(given, dict):
        return given
    return {key: value for key, value in given.items() if key != "seed"}


def _settings(settings: Mapping[str, Any]) -> str:
    shown = yaml.safe_dump(public_settings(settings), sort_keys=False, allow_unicode=True)
    return f"```yaml\n{shown}```"


def _decontamination(funnel: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    found = funnel.get("decontamination")
    if not found:
        return "The prompts were **not** checked against any evaluation (`decontaminate`)."
    sources = ", ".join(
        f"`{code(public(str(entry)))}`" for entry in settings.get("decontaminate") or ()
    )
    return (
        f"{found['prompts']:,} prompts were checked against {found['questions']:,} questions of "
        f"{sources}; {found['prompts_dropped']:,} gave one away and were dropped with all their "
        f"samples. A prompt gives a question away when it holds all of its words in a row, or its "
        f"numbers and at least {COVERAGE:.0%} of its runs of {N} words; runs in more than "
        f"{COMMON:.0%} of the prompts, of a task's prompts or of the questions do not count."
    )


def _difficulties(rows: Sequence[Row]) -> str:
    counts = Counter(difficulty(row.get("pass_rate")) for row in rows)
    words = ", ".join(f"{name} {count:,}" for name, count in counts.most_common())
    return f"Difficulty, by the share of a prompt's samples that were right: {words}."


def _lengths(rows: Sequence[Row]) -> str:
    lengths = sorted(row["tokens"] for row in rows if row.get("tokens") is not None)
    if not lengths:
        return ""
    middle = lengths[len(lengths) // 2]
    return f"Tokens: {middle:,} in the middle, {lengths[0]:,} to {lengths[-1]:,}."


def _pairs(pairs: int) -> str:
    return (
        f"The configuration `pairs` holds {pairs:,} pairs in the format of TRL's DPOTrainer "
        "(`prompt`, `chosen`, `rejected`): a kept, right answer against a wrong one to the same "
        "prompt, whole and as near in length as there was."
    )
