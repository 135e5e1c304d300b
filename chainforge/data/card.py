"""Write the card of a data set: what the rows are, who wrote them, and where the others went."""

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
from chainforge.data.decontaminate import COVERAGE, N

TEMPLATE = Path(__file__).with_name("card.md.jinja")
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}


def write_card(
    folder: Path,
    rows: Sequence[Row],
    funnel: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    license: str = "other",
    sections: Mapping[str, str] | None = None,
) -> None:
    """Write `folder`/README.md about the kept `rows` of a collect or reject stage.

    `funnel` counts the dropped samples; `settings` are those of selection and filters; `sections`
    are further ones, Markdown by title.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    head = DatasetCardData(
        license=license,
        task_categories=["text-generation"],
        size_categories=[next((name for most, name in SIZES.items() if len(rows) < most), "n>1M")],
        tags=["chainforge", "reasoning", "synthetic"],
        configs=[{"config_name": "default", "data_files": "train.parquet", "default": True}],
    )
    shown = yaml.safe_dump(public_settings(settings), sort_keys=False, allow_unicode=True)
    lengths = sorted(row["tokens"] for row in rows if row.get("tokens") is not None)
    card = DatasetCard.from_template(
        head,
        template_path=str(TEMPLATE),
        version=__version__,
        rows=len(rows),
        funnel=funnel,
        origin=_origin(rows),
        sections=sections or {},
        funnel_table=funnel_table(funnel, "samples"),
        settings=shown.replace("```", "'''"),
        decontamination=_decontamination(funnel, settings),
        tasks=[(name, count) for (name,), count in _groups(rows, "task")],
        right=sum(row.get("correct") is True for row in rows),
        unknown=sum(row.get("correct") is None for row in rows),
        lengths=lengths,
    )
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(str(card), encoding="utf-8")


def funnel_table(funnel: Mapping[str, Any], what: str) -> str:
    """Return how many are left after each filter, in the order of the filters."""
    left = funnel["in"]
    lines = [f"| filter | {what} dropped | left |", "|---|---:|---:|", f"| all | | {left:,} |"]
    for reason, count in funnel["dropped"].items():
        left -= count
        lines.append(f"| `{code(reason)}` | {count:,} | {left:,} |")
    lines.append(f"| **kept** | | **{funnel['kept']:,}** |")
    return "\n".join(lines)


def code(value: Any) -> str:
    """Return text for a code span: on one line, with nothing that would end it."""
    return " ".join(str(value).replace("`", "'").replace("|", "/").split())


def _groups(rows: Sequence[Row], *columns: str) -> list[tuple[tuple[str, ...], int]]:
    return Counter(tuple(code(row.get(name)) for name in columns) for row in rows).most_common()


def _origin(rows: Sequence[Row]) -> str:
    """Return who wrote the rows, with which sampling parameters."""
    lines = [
        f"- {count:,} rows by `{public(model)}` (source `{source}`, stage `{stage}`)"
        for (source, model, stage), count in _groups(rows, "source", "model", "stage")
    ]
    given = [row["sampling"] for row in rows if isinstance(row.get("sampling"), dict)]
    # Without what differs from row to row.
    common = Counter(code({k: v for k, v in one.items() if k != "seed"}) for one in given)
    lines += [f"- {count:,} rows sampled with `{how}`" for how, count in common.most_common(5)]
    return "\n".join(lines)


def _decontamination(funnel: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    found = funnel.get("decontamination")
    if not found:
        return "The prompts were **not** checked against any evaluation (`decontaminate`)."
    entries = settings.get("decontaminate") or ()
    return (
        f"{found['prompts']:,} prompts were checked against {found['questions']:,} questions of "
        f"{', '.join(f'`{code(public(str(entry)))}`' for entry in entries)}; "
        f"{found['prompts_dropped']:,} contained one (all of its words in a row, or its numbers "
        f"and at least {COVERAGE:.0%} of its rare runs of {N} words) and were dropped with all "
        "their samples."
    )
