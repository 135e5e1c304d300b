"""What several commands take and do alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chainforge.core.options import SEEDS

if TYPE_CHECKING:
    from chainforge.chain.chain import Chain
    from chainforge.chain.plan import Step

ChainName = Annotated[
    str, typer.Argument(metavar="CHAIN", help="A chain.yaml, its folder, or a recipe's name.")
]
Runs = Annotated[Path, typer.Option(help="Folder that holds the chains' results.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a machine to read.")]
Launch = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="A file of accelerate_configs/, or 'none' for plain python."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="STAGE.KEY=VALUE", help="Change one setting of one stage."),
]
Seed = Annotated[int | None, typer.Option(min=SEEDS[0], max=SEEDS[1], help="Seed of every stage.")]


def planned(
    chain: str, runs: Path, launch: str | None, sets: list[str] | None, seed: int | None
) -> tuple[Chain, list[Step]]:
    """Return a chain and its steps, with what the command line changes of it."""
    from chainforge.chain.chain import load_chain
    from chainforge.chain.commands import read_sets
    from chainforge.chain.plan import Overrides, plan_chain

    loaded = load_chain(chain)
    overrides = Overrides(launch=launch, sets=read_sets(loaded, sets or ()), seed=seed)
    return loaded, plan_chain(loaded, runs, overrides)


def print_json(value: Any) -> None:
    """Print JSON for a machine to read."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))
