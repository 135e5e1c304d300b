"""The command line: `chainforge plan | run | show | check | doctor | report | export | ...`.

Exit codes: 0 done, 1 a stage, a reward's check or a quality gate failed (or the doctor found an
error), 2 wrong input, 3 a stage stopped at a limit of its own (`max_usd`) and can be resumed,
128 + N ended by signal N. Each command imports what it needs when it runs, so that
`chainforge --help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from chainforge import __version__
from chainforge.core.config import SEEDS
from chainforge.core.errors import InputError
from chainforge.core.process import ending
from chainforge.core.secrets import redact_output

if TYPE_CHECKING:
    from rich.console import Console

    from chainforge.chain.plan import Step
    from chainforge.chain.spec import Chain

app = typer.Typer(
    name="chainforge",
    help="The whole DeepSeek-R1 recipe from one YAML file, on TRL.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Text = str | None
ChainName = Annotated[
    str, Argument(metavar="CHAIN", help="A chain.yaml, its folder, or a recipe's name.")
]
MaybeChain = Annotated[
    Text, Argument(metavar="[CHAIN]", help="A chain; without one, only the machine is checked.")
]
Runs = Annotated[Path, Option(help="Folder that holds the chains' results.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON for a machine to read.")]
Launch = Annotated[Text, Option(metavar="FILE", help="A file of accelerate_configs/, or 'none'.")]
Sets = Annotated[
    list[str] | None,
    Option("--set", metavar="STAGE.KEY=VALUE", help="Change one setting of one stage."),
]
Seed = Annotated[int | None, Option(min=SEEDS[0], max=SEEDS[1], help="Seed of every stage.")]
From = Annotated[Text, Option("--from", metavar="STAGE", help="Start here; earlier stages stay.")]
Until = Annotated[Text, Option(metavar="STAGE", help="Stop after this stage.")]
IgnoreGates = Annotated[
    bool, Option("--ignore-gates", help="Continue when a model does not pass a quality gate.")
]
Without = Annotated[list[str] | None, Option(metavar="STAGE", help="Only this; give several.")]
Results = Annotated[
    list[Path], Argument(metavar="RUN...", help="Runs, evaluations' folders or results.json files.")
]


def main() -> None:
    """Run the command line; an error is one message, without a traceback."""
    redact_output()
    with ending():
        app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chainforge {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass


def _changed(chain: str, launch: Text, sets: list[str] | None, seed: int | None) -> Chain:
    """Return a chain as the command line changes it."""
    from chainforge.chain.plan import override
    from chainforge.chain.spec import load_chain

    return override(load_chain(chain), sets or (), seed, launch)


def _planned(chain: str, runs: Path, *changes: Any) -> tuple[Chain, list[Step]]:
    from chainforge.chain.plan import plan_chain

    loaded = _changed(chain, *changes)
    return loaded, plan_chain(loaded, runs)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))  # in ASCII: a model may write half characters


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
    from_: From = None,
    until: Until = None,
    force: Annotated[bool, Option("--force", help="Run finished stages again, too.")] = False,
    launch: Launch = None,
    sets: Sets = None,
    seed: Seed = None,
    ignore_gates: IgnoreGates = False,
) -> None:
    """Run a chain: skip what is done, make again what is stale, resume what was interrupted."""
    from chainforge.chain.execute import StageFailed
    from chainforge.chain.plan import chain_directory
    from chainforge.chain.run import run_chain
    from chainforge.core.run_dir import read_run
    from chainforge.report.formatting import show_results

    loaded = _changed(chain, launch, sets, seed)
    directory = chain_directory(loaded, runs)
    which: dict[str, Any] = {"from_": from_, "until": until, "force": force}
    try:
        run_chain(loaded, runs, ignore_gates=ignore_gates, **which)
    except StageFailed:
        print(f"report: {directory / 'report.html'}")
        raise
    if until in (None, loaded.stages[-1].name):
        # What is before `--from` may be stale or missing.
        done = f"the stages from {from_} on" if from_ else f"all {len(loaded.stages)} stages"
        print(f"{done} are done\n")
        for stage in read_run(directory).stages:
            if stage.results:
                show_results(stage.results, _console())
        print(f"report: {directory / 'report.html'}")


@app.command()
def ablate(
    chain: ChainName,
    runs: Runs = Path("runs"),
    without: Without = None,
    launch: Launch = None,
    sets: Sets = None,
    seed: Seed = None,
) -> None:
    """Leave out one stage at a time, and show what each is worth."""
    from chainforge.chain.ablate import ablate as compare
    from chainforge.report.formatting import show_results

    loaded = _changed(chain, launch, sets, seed)
    show_results(compare(loaded, runs, without or ()), _console())
    print(f"written: {runs / loaded.name}-ablation/results.json")


@app.command()
def show(
    chain: ChainName,
    runs: Runs = Path("runs"),
    sets: Sets = None,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Show each stage of a chain: what it was made from, and whether it is up to date."""
    from chainforge.chain.show import print_chain, to_json

    loaded, steps = _planned(chain, runs, None, sets, seed)
    if as_json:
        _print_json(to_json(loaded, runs, steps))
    else:
        print_chain(loaded, runs, steps, _console())


@app.command()
def report(
    run_directory: Annotated[Path, Argument(metavar="RUN", help="Such as runs/quickstart.")],
    watch: Annotated[bool, Option("--watch", help="Rewrite it while the chain runs.")] = False,
) -> None:
    """Write a chain's report, one HTML page, and print its path."""
    from chainforge.report import html

    print(html.write_report(run_directory), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        if watch:
            html.watch(run_directory, lambda text: print(text, flush=True))


@app.command()
def merge(
    results: Results,
    output: Annotated[Path | None, Option(metavar="FILE", help="Write a results.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Merge the results of several seeds: means, with intervals over the seeds."""
    from chainforge.core.artifacts import write_json
    from chainforge.report.formatting import show_results
    from chainforge.report.seeds import merge_results

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
        str, Argument(help="A reward (built in, module:fn, file.py:fn), a verifier, or a YAML.")
    ],
    task: Annotated[Text, Option(metavar="FILE", help="A YAML with `tasks:`, or a .jsonl.")] = None,
    rows: Annotated[int, Option(min=1, help="How many rows of each task.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Audit a reward or verifier: gold must beat wrong, empty and stuffed answers."""
    from chainforge.doctor.reward_check import check_reward, print_audit, to_json

    audit = check_reward(reward, task, rows)
    if as_json:
        _print_json(to_json(audit))
    else:
        print_audit(audit, _console())
    if not audit.passed:
        raise typer.Exit(1)


@app.command()
def doctor(
    chain: MaybeChain = None,
    runs: Runs = Path("runs"),
    launch: Launch = None,
    sets: Sets = None,
    seed: Seed = None,
    as_json: AsJson = False,
    online: Annotated[bool, Option("--online", help="Use the Hub, but fetch no weights.")] = False,
) -> None:
    """Check a chain before it runs: settings, rows, tokenizers, rewards, keys, memory."""
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
    stage: Annotated[Path, Argument(metavar="STAGE", help="A stage, an adapter or a model.")],
    to: Annotated[str, Option(metavar="owner/name|DIR", help="A repository, or a folder.")],
    what: Annotated[
        Text,
        Option(metavar="adapter|model|dataset", help="The adapter if there is one. model: merged."),
    ] = None,
    base: Annotated[Text, Option(metavar="HUB_ID", help="The adapter's base on the Hub.")] = None,
    licence: Annotated[
        Text, Option("--license", metavar="ID", help="By default the base's.")
    ] = None,
    public: Annotated[bool, Option("--public/--private", help="Of a new repository.")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Send nothing; show files and card.")
    ] = False,
    gguf: Annotated[
        Text, Option(metavar="TYPE", help="Add a GGUF file of the model: q8_0, f16, bf16, f32.")
    ] = None,
) -> None:
    """Put an adapter, a merged model or a data set on the Hub, with a card, or into a folder."""
    from chainforge.hub.export import export as send

    options = {"base": base, "licence": licence, "gguf": gguf}
    for line in send(stage, to, what, public=public, dry_run=dry_run, **options):
        print(line)


@app.command()
def verify(
    published: Annotated[str, Argument(metavar="DIR|owner/name", help="What was exported.")],
    as_json: AsJson = False,
) -> None:
    """Check a published model: its files, lineage, samples, results and card."""
    from chainforge.hub.verify import verify as checks

    found = []
    for check in checks(published):
        found.append(check._asdict())
        lines = [f"{'FAILED' if check.faults else 'passed'}  {check.name:<20} {check.looked_at}"]
        lines += [f"        {fault:.300}" for fault in check.faults[:5]]
        for line in [] if as_json else lines:  # of one line each, whatever the folder holds
            print("".join(c if c.isprintable() else " " for c in line), flush=True)
    if as_json:
        _print_json(found)
    if any(check["faults"] for check in found):
        raise typer.Exit(1)


@app.command()
def new(
    folder: Annotated[Path, Argument(metavar="DIR", help="The project's new folder.")],
    from_: Annotated[str, Option("--from", metavar="RECIPE", help="A recipe's name.")] = "custom",
) -> None:
    """Copy a recipe folder to a new project of your own."""
    from chainforge.chain.new import make_project

    for line in make_project(folder, from_):
        print(line)


if __name__ == "__main__":
    main()
