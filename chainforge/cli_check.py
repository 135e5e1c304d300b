"""The commands that look before anything is spent: `chainforge check` and `chainforge doctor`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from chainforge.cli_options import AsJson, Launch, Runs, Seed, Sets, planned, print_json
from chainforge.core.errors import InputError


def check(
    reward: Annotated[
        str,
        typer.Argument(
            help="A reward or a verifier: built in, pkg.mod:fn or path/file.py:fn; or a recipe's "
            "YAML, for all its rewards together."
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A YAML with `tasks:`, a .jsonl, or one task as YAML."),
    ] = None,
    params: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A parameter of the reward; may be repeated."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows of the task to try.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Audit a reward or verifier: gold must beat wrong, empty and stuffed answers."""
    from rich.console import Console

    from chainforge.chain import check as audits

    audit = audits.check_reward(reward, task, params=params or (), rows=rows)
    if as_json:
        print_json(audits.to_json(audit))
    else:
        audits.print_audit(audit, Console(highlight=False))
    if not audit.passed:
        raise typer.Exit(1)


def doctor(
    chain: Annotated[
        str | None,
        typer.Argument(metavar="[CHAIN]", help="A chain to look over; the machine alone if none."),
    ] = None,
    runs: Runs = Path("runs"),
    launch: Launch = None,
    sets: Sets = None,
    seed: Seed = None,
    as_json: AsJson = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load models too, and see how many answers are cut.")
    ] = False,
    online: Annotated[
        bool, typer.Option("--online", help="Ask the Hub for what is not here, but no weights.")
    ] = False,
) -> None:
    """Look a chain over before it runs: settings, rows, tokens, rewards, keys, memory, time."""
    if not online:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from chainforge.doctor import doctor as doctors
    from chainforge.doctor.findings import Context, this_machine, worst

    if chain is None and (launch or sets):
        raise InputError("--launch and --set change a chain: name one, as chainforge doctor CHAIN")
    loaded, steps = planned(chain, runs, launch, sets, seed) if chain is not None else (None, [])
    context = Context(this_machine(), loaded, tuple(steps), online)
    findings = doctors.examine(context, probed=probe)
    if as_json:
        print_json(doctors.to_json(findings))
    else:
        from rich.console import Console

        doctors.print_findings(findings, Console(highlight=False))
    if worst(findings) == "error":
        raise typer.Exit(1)
