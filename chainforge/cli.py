"""The command line: `chainforge plan | run | show | check | doctor | report | export | ...`.

Exit codes: 0 done, 1 a stage failed (or a reward its check, or a model a gate, or the doctor found
an error), 2 wrong input, 3 a stage stopped at a limit of its own (`max_usd`) and can go on, 128 and
a signal's number. What a command needs is imported when it runs, so that `chainforge --help`
answers at once.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chainforge import __version__
from chainforge.cli_check import check, doctor
from chainforge.cli_options import AsJson, ChainName, Launch, Runs, Seed, Sets, planned, print_json
from chainforge.cli_share import export, new
from chainforge.core.disk import writing
from chainforge.core.errors import Failed, InputError, Stopped
from chainforge.core.process import loading_fault
from chainforge.core.secrets import redact_output

if TYPE_CHECKING:
    from chainforge.chain.chain import Chain

app = typer.Typer(
    name="chainforge",
    help="The DeepSeek-R1 recipe, whole, from one YAML, on TRL.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; say what was wrong in one message, without a traceback."""
    from chainforge.chain.execute import Interrupted, StageFailed

    redact_output()
    try:
        with writing(Path.cwd()):
            app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (StageFailed, Failed) as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped as error:
        print(f"stopped: {error}", file=sys.stderr)
        sys.exit(error.code)
    except Interrupted as error:
        print(f"stopped by {error}; run the same command again to go on from here", file=sys.stderr)
        sys.exit(128 + error.signal)
    except Exception as error:
        if (fault := loading_fault(error)) is None:
            raise
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)


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
    from chainforge.chain.plan import as_text, to_json

    loaded, steps = planned(chain, runs, launch, sets, seed)
    if as_json:
        print_json(to_json(loaded, runs, steps))
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
    from chainforge.chain.chain import load_chain
    from chainforge.chain.execute import StageFailed
    from chainforge.chain.plan import chain_directory
    from chainforge.chain.run import run_chain

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
    from chainforge.chain import show as lineage

    loaded, steps = planned(chain, runs, None, sets, seed)
    if as_json:
        print_json(lineage.to_json(loaded, runs, steps))
        return
    from rich.console import Console

    lineage.print_chain(loaded, runs, steps, Console(highlight=False))


@app.command()
def report(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Such as runs/quickstart.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Rewrite it while the chain runs.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between, with --watch.")] = 10.0,
) -> None:
    """Write a chain's report, one HTML page, and print its path."""
    from chainforge.report import report as pages

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

    from chainforge.chain.results import show_results
    from chainforge.core.artifacts import write_json
    from chainforge.report.merge import merge_results

    merged = merge_results(results)
    if output is not None:
        write_json(output, merged)
    if as_json:
        print_json(merged)
    else:
        show_results(merged, Console(highlight=False))


app.command()(check)
app.command()(doctor)
app.command()(export)
app.command()(new)


def _finish(chain: Chain, directory: Path, first: str | None) -> None:
    """Print what the chain was worth and where its report is, which running it has written."""
    from rich.console import Console

    from chainforge.chain.results import print_results

    if not (path := directory / "report.html").is_file():
        from chainforge.report.report import write_report

        write_report(directory)
    # What is before `first` may be stale or missing.
    which = f"the stages from {first} on" if first else f"all {len(chain.stages)} stages"
    print(f"{which} are done\n")
    print_results(chain, directory, Console(highlight=False))
    print(f"report: {path}")


if __name__ == "__main__":
    main()
