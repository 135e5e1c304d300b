"""Build a data set from scored samples, of collect and of reject alike: filter, select, write.

A stage leaves `samples.jsonl` (every sample with `drop` and `drop_detail`), `dataset/` (the kept
rows with their card) and `funnel.json`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from chainforge.core import artifacts
from chainforge.core.config import resolved
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, many_rows
from chainforge.data.card import write_card
from chainforge.data.datasets import save_dataset
from chainforge.data.filters import FilterArgs, SelectionArgs
from chainforge.data.pool import read_pool
from chainforge.data.select import select
from chainforge.generate.rollouts import score_samples
from chainforge.generate.shards import merge
from chainforge.rewards.reward import RewardArgs, load_rewards


@dataclass
class BuildArgs:
    """What is made of the samples besides the data set itself."""

    dry_run: bool = field(
        default=False,
        metadata={"help": "Print the funnel that these settings give on `pool`; write nothing."},
    )
    rescore: bool = field(
        default=True,
        metadata={
            "help": "Score a pool's samples again with these rewards. false uses the scores that "
            "they have, which is much faster for millions of rows."
        },
    )
    dataset_license: str = field(
        default="other", metadata={"help": "Licence on the card, as the Hub abbreviates it."}
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Upload dataset/ when it is done; the token is HF_TOKEN."}
    )
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Where to, as owner/name."})
    hub_private: bool = field(
        default=True, metadata={"help": "Make the repository private, where it is new."}
    )


def open_pool(paths: list[str], args: BuildArgs, rewarding: RewardArgs) -> tuple[list[Row], Row]:
    """Return existing samples, scored again with `rescore`, and their origin."""
    rows = read_pool(paths)
    if args.rescore:
        rewards = load_rewards(rewarding, set().union(*rows))
        rows = score_samples(rows, rewarding.transcript, rewards)
    return rows, {"pool": dict(Counter(row["pooled_from"] for row in rows))}


@many_rows()
def build(
    rows: list[Row],
    directory: Path,
    selection: SelectionArgs,
    texts: FilterArgs,
    args: BuildArgs,
    seed: int = 0,
    *,
    lost: Mapping[str, int] | None = None,
    report: Row | None = None,
    sections: Callable[[list[Row]], dict[str, str]] = lambda kept: {},
) -> dict[str, Any]:
    """Select from scored samples (`rows`), write everything to `directory`, and return the funnel.

    `lost` counts answers without a sample, by reason; `report` is added to the funnel, `sections`
    makes further sections of the card. Raises `InputError` when no row is kept.
    """
    marked, funnel = select(rows, selection, texts, seed)
    merge(directory / "samples.jsonl", marked)
    kept = [row for row in marked if row["drop"] is None]
    funnel["in"] += sum((lost or {}).values())
    funnel["dropped"] = {**(lost or {}), **funnel["dropped"]}
    funnel |= report or {}
    artifacts.write_json(directory / "funnel.json", funnel)
    if not kept:
        raise InputError(_why_none(funnel, marked))
    folder = save_dataset(kept, directory / "dataset").parent
    settings = resolved(selection, texts)
    settings |= {"max_per_prompt": selection.max_per_prompt, "select": selection.select}
    write_card(
        folder, kept, funnel, settings, license=args.dataset_license, sections=sections(kept)
    )
    return funnel


def _why_none(funnel: Row, marked: list[Row]) -> str:
    """Return why no row is kept: the commonest reason, and an answer."""
    (reason, count), *_ = Counter(row["drop"] for row in marked).most_common()
    row = next(row for row in marked if row["drop"] == reason)
    return (
        f"no row was kept; {count:,} of {funnel['in']:,} are dropped as {reason} "
        f"({row['drop_detail']}). One of them, where {str(row.get('answer'))[:60]!r} is right: "
        f"{row['completion'][:200]!r}. funnel.json has all reasons"
    )


def preview(rows: list[Row], selection: SelectionArgs, texts: FilterArgs, seed: int = 0) -> Table:
    """Return the funnel that selection would give, as a table; nothing is written."""
    _, funnel = select(rows, selection, texts, seed)
    title = f"{funnel['in']:,} samples of {funnel['prompts']['in']:,} prompts"
    table = Table("filter", "dropped", "share", title=title)
    for reason, count in funnel["dropped"].items():
        table.add_row(reason, f"{count:,}", f"{count / funnel['in']:.1%}")
    table.add_section()
    words = f"kept, of {funnel['prompts']['kept']:,} prompts"
    table.add_row(words, f"{funnel['kept']:,}", f"{funnel['kept'] / funnel['in']:.1%}")
    return table
