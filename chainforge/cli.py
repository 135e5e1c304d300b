"""The command line: `chainforge plan | run | show | check | doctor | report | export | ...`.

Exit codes: 0 done, 1 a stage failed (or a reward its check, or a model a gate, or the doctor found
an error), 2 wrong input, 3 a stage stopped at a limit of its own (`max_usd`) and can be resumed,
128 + N ended by signal N. What a command needs is imported when it runs, so that
`chainforge --help` answers at once.
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
from chainforge.core.config import SEEDS
from chainforge.core.disk import writing
from chainforge.core.errors import Failed, InputError, Stopped
from chainforge.core.process import loading_fault
from chainforge.core.secrets import redact_output

if TYPE_CHECKING:
    from rich.console import Console

    from chainforge.chain.plan import Step
    from chainforge.chain.spec import Chain

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
Seed = Annotated[int | None, typer.Option(min=SEEDS[0], max=SEEDS[1], help="Seed of every stage.")]


def main() -> None:
    """Run the command line; an error is one message, without a traceback."""
    from chainforge.chain.execute import Interrupted, StageFailed

    redact_output()
    try:
        with writing(Path.cwd()):
            app()
    except InputError as error:
        _end(f"error: {error}", 2)
    except (StageFailed, Failed) as error:
        _end(f"failed: {error}", 1)
    except Stopped as error:
        _end(f"stopped: {error}", error.code)
    except Interrupted as error:
        _end(f"stopped by {error}; run the same command again to resume", 128 + error.signal)
    except Exception as error:
        if (fault := loading_fault(error)) is None:
            raise
        _end(f"error: {fault}", 2)


def _end(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


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


def _planned(
    chain: str, runs: Path, launch: str | None, sets: list[str] | None, seed: int | None
) -> tuple[Chain, list[Step]]:
    """Return a chain and its steps, with what the command line changes of it."""
    from chainforge.chain.plan import Overrides, plan_chain, read_sets
    from chainforge.chain.spec import load_chain

    loaded = load_chain(chain)
    return loaded, plan_chain(loaded, runs, Overrides(launch, read_sets(loaded, sets or ()), seed))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


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
        bool, typer.Option("--ignore-gates", help="Continue where a quality gate is not passed.")
    ] = False,
) -> None:
    """Run a chain: skip what is done, make again what is stale, resume what was interrupted."""
    from chainforge.chain.execute import StageFailed
    from chainforge.chain.plan import chain_directory
    from chainforge.chain.run import run_chain
    from chainforge.chain.spec import load_chain
    from chainforge.core.run_dir import read_run
    from chainforge.report.tables import show_results

    loaded = load_chain(chain)
    page = chain_directory(loaded, runs) / "report.html"
    changes = {"launch": launch, "sets": sets or (), "seed": seed}
    which = {"from_": from_, "until": until, "force": force, "ignore_gates": ignore_gates}
    try:
        run_chain(loaded, runs, **which, **changes)  # type: ignore[arg-type]
    except StageFailed:
        print(f"report: {page}")
        raise
    if until in (None, loaded.stages[-1].name):
        # What is before `--from` may be stale or missing.
        done = f"the stages from {from_} on" if from_ else f"all {len(loaded.stages)} stages"
        print(f"{done} are done\n")
        for stage in read_run(page.parent).stages:
            if stage.results:
                show_results(stage.results, _console())
        print(f"report: {page}")


@app.command()
def show(
    chain: ChainName,
    runs: Runs = Path("runs"),
    sets: Sets = None,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Show each stage of a chain: what it was made from, and whether it still holds."""
    from chainforge.chain.show import print_chain, to_json

    loaded, steps = _planned(chain, runs, None, sets, seed)
    if as_json:
        _print_json(to_json(loaded, runs, steps))
    else:
        print_chain(loaded, runs, steps, _console())


@app.command()
def report(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Such as runs/quickstart.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Rewrite it while the chain runs.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between, with --watch.")] = 10.0,
) -> None:
    """Write a chain's report, one HTML page, and print its path."""
    from chainforge.report import html

    if not watch:
        print(html.write_report(run_directory))
        return
    print(f"{run_directory / 'report.html'}; Ctrl-C ends this, not the chain", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        html.watch(run_directory, every, lambda text: print(text, flush=True))


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
    """Merge the results of several seeds: means, with intervals over the seeds."""
    from chainforge.core.artifacts import write_json
    from chainforge.report.merge import merge_results
    from chainforge.report.tables import show_results

    merged = merge_results(results)
    if output is not None:
        write_json(output, merged)
    if as_json:
        _print_json(merged)
    else:
        show_results(merged, _console())


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
    params: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A parameter of the reward; may be repeated."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows of the task.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Audit a reward or verifier: gold must beat wrong, empty and stuffed answers."""
    from chainforge.chain import check as audits

    audit = audits.check_reward(reward, task, params=params or (), rows=rows)
    if as_json:
        _print_json(audits.to_json(audit))
    else:
        audits.print_audit(audit, _console())
    if not audit.passed:
        raise typer.Exit(1)


@app.command()
def doctor(
    chain: Annotated[
        str | None,
        typer.Argument(metavar="[CHAIN]", help="A chain to check; the machine alone if none."),
    ] = None,
    runs: Runs = Path("runs"),
    launch: Launch = None,
    sets: Sets = None,
    seed: Seed = None,
    as_json: AsJson = False,
    online: Annotated[
        bool, typer.Option("--online", help="Ask the Hub for what is not here, but no weights.")
    ] = False,
) -> None:
    """Check a chain before it runs: settings, rows, tokenizers, rewards, keys, memory, disk."""
    if not online:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from chainforge.doctor import preflight
    from chainforge.doctor.environment import this_machine

    if chain is None and (launch or sets):
        raise InputError("--launch and --set change a chain: name one, as chainforge doctor CHAIN")
    loaded, steps = _planned(chain, runs, launch, sets, seed) if chain is not None else (None, [])
    findings = preflight.examine(this_machine(), loaded, steps, online)
    if as_json:
        _print_json(preflight.to_json(findings))
    else:
        preflight.print_findings(findings, _console())
    if preflight.worst(findings) == "error":
        raise typer.Exit(1)


@app.command()
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
    from chainforge.hub.export import export as send

    for line in send(stage, to, what, base=base, licence=licence, public=public, dry_run=dry_run):
        print(line)


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The project's new folder.")],
    from_: Annotated[
        str, typer.Option("--from", metavar="RECIPE", help="A recipe folder, such as custom.")
    ],
) -> None:
    """Copy a recipe folder out, to change it."""
    from chainforge.chain.new import make_project

    for line in make_project(folder, from_):
        print(line)


if __name__ == "__main__":
    main()
