"""The command line: `chainforge plan | run | show | check | doctor | report | export | ...`.

Exit codes: 0 done, 1 a stage failed (or a reward its check, or a model a gate, or the doctor found
an error), 2 wrong input, 3 a stage stopped at a limit of its own (`max_usd`) and can go on, 128 and
a signal's number. What a command needs is imported when it runs, so that `chainforge --help`
answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chainforge import __version__
from chainforge.core.errors import InputError, Stopped
from chainforge.pipeline.cli_share import export, new

if TYPE_CHECKING:
    from chainforge.pipeline.chain import Chain
    from chainforge.pipeline.plan import Step

app = typer.Typer(
    name="chainforge",
    help="The DeepSeek-R1 recipe, whole, from one YAML, on TRL.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of every stage.")]


def main() -> None:
    """Run the command line; say what was wrong in one message, without a traceback."""
    from chainforge.pipeline.execute import Interrupted, StageFailed

    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except StageFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(error.code)
    except Interrupted as error:
        print(f"stopped by {error}; run the same command again to go on from here", file=sys.stderr)
        sys.exit(128 + error.signal)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chainforge {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def plan(
    chain: ChainName,
    runs: Runs = Path("runs"),
    launch: Launch = None,
    sets: Sets = None,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Print what `run` would do: each stage's state, inputs and plain command."""
    from chainforge.pipeline.plan import as_text, to_json

    loaded, steps = _planned(chain, runs, launch, sets, seed)
    if as_json:
        _print_json(to_json(loaded, runs, steps))
    else:
        print(as_text(loaded, runs, steps))


@app.command()
def run(
    chain: ChainName,
    runs: Runs = Path("runs"),
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Start here; take what is before as it is."),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run also what is done.")] = False,
    launch: Launch = None,
    sets: Sets = None,
    seed: Seed = None,
    ignore_gates: Annotated[
        bool, typer.Option("--ignore-gates", help="Go on where a stage's gate is not passed.")
    ] = False,
) -> None:
    """Run a chain: skip what is done, make anew what is stale, go on with what was cut."""
    from chainforge.pipeline.chain import load_chain
    from chainforge.pipeline.execute import StageFailed
    from chainforge.pipeline.plan import chain_directory
    from chainforge.pipeline.run import run_chain

    loaded = load_chain(chain)
    directory = chain_directory(loaded, runs)
    try:
        run_chain(
            loaded,
            runs,
            from_=from_,
            until=until,
            force=force,
            launch=launch,
            sets=sets or (),
            seed=seed,
            ignore_gates=ignore_gates,
        )
    except StageFailed:
        print(f"report: {directory / 'report.html'}")
        raise
    if until in (None, loaded.stages[-1].name):
        _finish(loaded, directory, from_)


@app.command()
def show(
    chain: ChainName,
    runs: Runs = Path("runs"),
    sets: Sets = None,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Show each stage of a chain: what it was made from, and whether it still holds."""
    from chainforge.pipeline import show as lineage

    loaded, steps = _planned(chain, runs, None, sets, seed)
    if as_json:
        _print_json(lineage.to_json(loaded, runs, steps))
        return
    from rich.console import Console

    lineage.print_chain(loaded, runs, steps, Console(highlight=False))


@app.command()
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
    samples: Annotated[
        Path | None,
        typer.Option(metavar="STAGE", help="Compare on the completions that a stage saved."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="With --samples: another judge; may be repeated."),
    ] = None,
    params: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A parameter of the reward; may be repeated."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="How many rows: 16 of a task, all samples.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Audit a reward or verifier: gold must beat wrong, empty and stuffed answers.

    With --samples: list the saved completions on which verifiers do not agree.
    """
    if (task and samples) or (against and not samples):
        raise InputError("give --task to audit, or --samples (and --against) to compare")
    from rich.console import Console

    if samples is not None:
        from chainforge.pipeline import agreement

        compared = agreement.compare_judges(reward, samples, against or (), params or (), rows)
        if as_json:
            _print_json(agreement.to_json(*compared))
        else:
            agreement.print_agreement(*compared, Console(highlight=False))
        return
    from chainforge.pipeline import check as audits

    audit = audits.check_reward(reward, task, params=params or (), rows=rows or 16)
    if as_json:
        _print_json(audits.to_json(audit))
    else:
        audits.print_audit(audit, Console(highlight=False))
    if not audit.passed:
        raise typer.Exit(1)


@app.command()
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
    from chainforge.pipeline import doctor as doctors
    from chainforge.pipeline.checkup.findings import Context, this_machine, worst

    context = Context(this_machine())
    if chain is not None:
        loaded, steps = _planned(chain, runs, launch, sets, seed)
        context = Context(this_machine(), loaded, tuple(steps), online)
    elif launch or sets:
        raise InputError("--launch and --set change a chain: name one, as chainforge doctor CHAIN")
    findings = doctors.examine(context, probed=probe)
    if as_json:
        _print_json(doctors.to_json(findings))
    else:
        from rich.console import Console

        doctors.print_findings(findings, Console(highlight=False))
    if worst(findings) == "error":
        raise typer.Exit(1)


@app.command()
def report(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Such as runs/quickstart.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Rewrite it while the chain runs.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between, with --watch.")] = 10.0,
) -> None:
    """Write a chain's report, one HTML page, and print its path."""
    from chainforge.pipeline import report as pages

    if not watch:
        print(pages.write_report(run_directory))
        return
    print(f"{run_directory / 'report.html'}; Ctrl-C ends this, not the chain", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        pages.watch(run_directory, every, lambda text: print(text, flush=True))


@app.command()
def merge(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="A run, an evaluation's folder or its results.json."),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the merged results.json.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Merge the results of several seeds: means, and intervals that know of the seeds too."""
    from rich.console import Console

    from chainforge.core.artifacts import write_json
    from chainforge.pipeline.merge import merge_results
    from chainforge.pipeline.results import show_results

    merged = merge_results(results)
    if output is not None:
        write_json(output, merged)
    if as_json:
        _print_json(merged)
    else:
        show_results(merged, Console(highlight=False))


app.command()(export)
app.command()(new)


def _planned(
    chain: str, runs: Path, launch: str | None, sets: list[str] | None, seed: int | None
) -> tuple[Chain, list[Step]]:
    from chainforge.pipeline.chain import load_chain
    from chainforge.pipeline.commands import read_sets
    from chainforge.pipeline.plan import Overrides, plan_chain

    loaded = load_chain(chain)
    overrides = Overrides(launch=launch, sets=read_sets(loaded, sets or ()), seed=seed)
    return loaded, plan_chain(loaded, runs, overrides)


def _finish(chain: Chain, directory: Path, first: str | None) -> None:
    """Print what the chain was worth and where its report is, which running it has written."""
    from rich.console import Console

    from chainforge.pipeline.results import print_results

    if not (path := directory / "report.html").is_file():
        from chainforge.pipeline.report import write_report

        write_report(directory)
    # What is before `first` may be stale or missing.
    which = f"the stages from {first} on" if first else f"all {len(chain.stages)} stages"
    print(f"{which} are done\n")
    print_results(chain, directory, Console(highlight=False))
    print(f"report: {path}")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


if __name__ == "__main__":
    main()
