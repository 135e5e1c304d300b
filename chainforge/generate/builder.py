"""Build a data set out of scored samples: decide, mark, write and describe.

What a stage leaves: `samples.jsonl` (every sample with `drop` and `drop_detail`), `dataset/` (the
kept rows and, if asked for, preference pairs, with their card) and `funnel.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from chainforge.core import artifacts
from chainforge.core.config import resolved
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, many_rows, write_rows
from chainforge.data.card import write_card
from chainforge.data.datasets import save_dataset
from chainforge.data.filters import FilterArgs
from chainforge.data.pool import Features, Pool, find_samples, measure
from chainforge.data.rows import SHARE
from chainforge.data.select import SelectionArgs, decide, match_pairs, save_pairs
from chainforge.generate.harvest import origins, read_pool
from chainforge.generate.rollouts import judge
from chainforge.rewards.reward import RewardArgs, load_rewards

Write = Callable[[Path, Iterable[Row]], None]


@dataclass
class BuildArgs:
    """What is made of the samples beside the data set itself."""

    dry_run: bool = field(
        default=False,
        metadata={"help": "Print the funnel that these settings give on `pool`; leave nothing."},
    )
    rescore: bool = field(
        default=True,
        metadata={
            "help": "Judge a pool's samples anew by these rewards. False takes the scores that "
            "they have, which for millions of rows is the difference."
        },
    )
    preference_pairs: int = field(
        default=0,
        metadata={"help": "Pairs of each prompt, right against wrong, for DPO; 0: none."},
    )
    max_bad_rows: float = field(
        default=SHARE,
        metadata={"help": "Share of malformed rows above which a pool stops the run."},
    )
    dataset_license: str = field(
        default="other", metadata={"help": "Licence on the card, as the Hub abbreviates it."}
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Upload dataset/ once it is done; the token is HF_TOKEN."}
    )
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Where to, as owner/name."})
    hub_private: bool = field(
        default=True, metadata={"help": "Make the repository private, where it is new."}
    )


class Source(Protocol):
    """Scored samples: rows in memory, or files of them."""

    def measure(self, args: SelectionArgs, texts: FilterArgs | None) -> Features:
        """Measure every sample."""

    def rows(self) -> Iterator[Row]:
        """Yield the samples in the order in which they were measured."""


@dataclass(frozen=True)
class Rows:
    """Samples in memory."""

    samples: list[Row]

    def measure(self, args: SelectionArgs, texts: FilterArgs | None) -> Features:
        """Measure every sample."""
        return measure(self.samples, args, texts)

    def rows(self) -> Iterator[Row]:
        """Yield the samples."""
        return iter(self.samples)


def pooled(paths: list[str], args: BuildArgs) -> Pool:
    """Return the samples of stages and files that are there already."""
    if not paths:
        raise InputError("pool: name the samples, as --pool runs/quickstart/rejection")
    return Pool(find_samples(paths), args.max_bad_rows)


def open_pool(paths: list[str], args: BuildArgs, judges: RewardArgs) -> tuple[Source, Row]:
    """Return samples that are there already, anew scored with `rescore`, and their origin."""
    if not args.rescore:
        return pooled(paths, args), {"pool": paths}
    rows = read_pool(paths)
    rewards = load_rewards(judges, set().union(*rows))
    return Rows(judge(rows, judges.transcript, rewards)), {"pool": origins(rows)}


@many_rows()
def build(
    source: Source,
    directory: Path,
    selection: SelectionArgs,
    texts: FilterArgs,
    args: BuildArgs,
    seed: int = 0,
    *,
    report: Row | None = None,
    write: Write = write_rows,
) -> dict[str, Any]:
    """Select from scored samples, leave everything in `directory`, and return the funnel.

    `report` is added to the funnel; `write` puts the marked samples in place.
    """
    decisions = decide(source.measure(selection, texts), selection, seed)
    matched = match_pairs(decisions, args.preference_pairs)
    wanted = {position for pair in matched for position in pair}
    kept: list[Row] = []
    paired: dict[int, Row] = {}

    def marked() -> Iterator[Row]:
        for position, row in enumerate(source.rows()):
            row = decisions.mark(position, row)
            if row["drop"] is None:
                kept.append(row)
            if position in wanted:
                paired[position] = row
            yield row

    write(directory / "samples.jsonl", marked())
    funnel = decisions.funnel() | ({"pairs": len(matched)} if args.preference_pairs else {})
    funnel |= report or {}
    artifacts.write_json(directory / "funnel.json", funnel)
    folder = save_dataset(kept, directory / "dataset").parent
    if matched:
        save_pairs(matched, paired, folder)
    settings = resolved(selection, texts) | {
        "max_per_prompt": selection.max_per_prompt,
        "select": selection.select,
    }
    write_card(folder, kept, funnel, settings, pairs=len(matched), license=args.dataset_license)
    return funnel


def rehearse(source: Source, selection: SelectionArgs, texts: FilterArgs, seed: int = 0) -> Table:
    """Return the funnel that selection would give, as a table; nothing is written."""
    decisions = decide(source.measure(selection, texts), selection, seed)
    funnel = decisions.funnel()
    table = Table(title=f"{funnel['in']:,} samples of {funnel['prompts']['in']:,} prompts")
    for name in ("filter", "dropped", "share", "left"):
        table.add_column(name, justify="left" if name == "filter" else "right")
    left = funnel["in"]
    for reason, count in funnel["dropped"].items():
        left -= count
        table.add_row(reason, f"{count:,}", f"{count / funnel['in']:.1%}", f"{left:,}")
    share = f"{funnel['kept'] / funnel['in']:.1%}"
    prompts = f"of {funnel['prompts']['kept']:,} prompts"
    table.add_section()
    table.add_row(f"kept, {prompts}", f"{funnel['kept']:,}", share, "")
    return table
