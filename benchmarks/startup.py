"""Measure start-up: commands that only look, and a stage's first training step.

    python benchmarks/startup.py --runs 10 --steps 5

The commands run in turn with `trl --help`; `plan` and `show` also on a chain that has run, where
there are manifests to read. The first step of SFT and GRPO is timed from the command line to the
step, on the quickstart, against the raw scripts; the process is ended then. Writes `startup.json`
and prints Markdown.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import QUICKSTART, results, run, save, spread, summary, tail, turns
from overhead import commands
from sides import caches, prepared

LIMIT_SECONDS = 0.3
STAGES = {"sft": "sft", "grpo": "rl"}  # as `overhead.py` names them
TWENTY = argparse.Namespace(sft_steps=20, rl_steps=20, rollout_engine="trl")
FIRST = re.compile(rb"\| *[1-9]\d*/\d+ \[")  # the bar after a step


def main() -> None:
    """Time the commands and the first steps, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10, help="of each command")
    parser.add_argument("--steps", type=int, default=5, help="first steps on each side; 0: none")
    parser.add_argument("--kinds", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--chain", type=Path, default=Path("runs"), help="as --runs of chainforge")
    args = parser.parse_args()
    result: dict[str, Any] = {"runs": args.runs, "steps": args.steps, "limit": LIMIT_SECONDS}
    result["commands"] = time_commands(args.runs, args.chain)
    result["first_step"] = {}
    chain = prepared(args.chain, "cold_start") if args.steps else args.chain
    for kind in args.kinds if args.steps else ():
        result["first_step"][kind] = time_first_steps(kind, args.steps, chain)
    save(results() / "startup.json", result)
    print(table(result))


def time_commands(repeats: int, chain: Path) -> dict[str, Any]:
    """Time each command, all of them in turn."""
    ours, peer = [program("chainforge")], [program("trl")]
    quickstart, nowhere = str(QUICKSTART / "chain.yaml"), str(chain / "nowhere")
    commands = {
        "trl --help": [*peer, "--help"],
        "chainforge --help": [*ours, "--help"],
        "plan": [*ours, "plan", quickstart, "--runs", nowhere],
        "show": [*ours, "show", quickstart, "--runs", nowhere],
        "plan, chain that has run": [*ours, "plan", quickstart, "--runs", str(chain)],
        "show, chain that has run": [*ours, "show", quickstart, "--runs", str(chain)],
    }
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        for command in commands.values():
            run(command, log)  # what is compiled and cached then, is on neither's account
        found: dict[str, list[Any]] = {name: [] for name in commands}
        for name, _ in turns(commands, repeats):
            found[name].append(run(commands[name], log))
    return {name: summary(of) for name, of in found.items()}


def program(name: str) -> str:
    """Return a console script of this environment."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not installed beside {sys.executable}")
    return found


def time_first_steps(kind: str, repeats: int, chain: Path) -> dict[str, Any]:
    """Time the first step of both sides in turn; return medians and the ratios of each turn."""
    found: dict[str, list[float]] = {"raw": [], "ours": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side, _ in turns(found, repeats):
            for old in ("out", "cache"):
                shutil.rmtree(folder / old, ignore_errors=True)
            of = commands(STAGES[kind], TWENTY, chain, folder / "out", folder / "tasks.json")
            found[side].append(first_step(of[side], folder))
            print(kind, side, round(found[side][-1], 2), flush=True)
    pairs = zip(found["ours"], found["raw"], strict=True)
    return {side: spread(of) for side, of in found.items()} | {
        "ratio": spread([ours / raw for ours, raw in pairs])
    }


def first_step(command: list[str], folder: Path) -> float:
    """Return how long a command takes to its first step, by its bar; end it then."""
    log = folder / "log"
    with open(log, "wb") as output:
        started = time.perf_counter()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True, env=os.environ | caches(folder / "cache"),
        )  # fmt: skip
        try:
            while not FIRST.search(log.read_bytes()):
                if child.poll() is not None:
                    raise RuntimeError(tail(log))
                time.sleep(0.02)
            return time.perf_counter() - started
        finally:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def table(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = ["| command | seconds (range) | CPU seconds |", "|---|--:|--:|"]
    for name, took in result["commands"].items():
        clock = took["seconds"]
        lines.append(f"| {name} | {clock['median']:.2f} ({clock['low']:.2f} to "
                     f"{clock['high']:.2f}) | {took['cpu_seconds']['median']:.2f} |")  # fmt: skip
    for kind, took in result["first_step"].items():
        mine, theirs = took["ours"]["median"], took["raw"]["median"]
        lines.append(f"| first step of {kind}: ours, raw | {mine:.2f}, {theirs:.2f} "
                     f"| ratio {took['ratio']['median']:.3f} |")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
