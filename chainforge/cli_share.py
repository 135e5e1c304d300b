"""The commands that bring things in and out: `chainforge new` and `chainforge export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    stage: Annotated[
        Path,
        typer.Argument(
            metavar="STAGE",
            help="A finished stage, such as runs/quickstart/rl_final, or an adapter or a model.",
        ),
    ],
    to: Annotated[
        str, typer.Option(metavar="owner/name|DIR", help="A repository of the Hub, or a folder.")
    ],
    what: Annotated[
        str | None,
        typer.Option(
            metavar="adapter|model|dataset",
            help="What of it; the adapter if it has one. model: an adapter is merged, if need be.",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="HUB_ID", help="Where the adapter's base is on the Hub.")
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Licence; that of the base if left out."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public/--private", help="Who may see a repository that is new.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the files and the card; send nothing.")
    ] = False,
) -> None:
    """Put an adapter, a merged model or a data set on the Hub, with a card, or into a folder."""
    from chainforge.hub.export import ExportRequest
    from chainforge.hub.export import export as send

    for line in send(ExportRequest(stage, to, what, base, licence, public, dry_run)):
        print(line)


def new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The project's new folder.")],
    from_: Annotated[
        str, typer.Option("--from", metavar="RECIPE", help="A recipe folder, such as custom.")
    ],
) -> None:
    """Copy a recipe folder out, to make it one's own."""
    from chainforge.chain.new import make_project

    for line in make_project(folder, from_):
        print(line)
