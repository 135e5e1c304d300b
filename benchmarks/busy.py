"""Measure what other work on the same cores costs a training stage on the CPU.

    python benchmarks/busy.py --runs 5
    python benchmarks/busy.py --runs 1 --loads busy --add      # adds a run to the written ones

The quickstart's cold start, quiet and beside a loop on each core: with OpenMP's own way to wait at
a barrier, and with the bounded spin that `chainforge run` sets. `--sides` can add
`OMP_WAIT_POLICY=PASSIVE`. Fresh processes in turn, whose weights must be equal bit by bit. Beside
the loops a whole stage takes twenty minutes by default, so it ends after `--busy_steps`: the share
of its time falls with more of them, because imports do not wait at barriers. Writes `busy.json` and
prints Markdown.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import QUICKSTART, results, run, save, spread, stored, turns, weights
from sides import caches, prepared, recipe

from chainforge.chain.execute import BOUNDED_SPIN

SIDES = {"default": {}, "bounded": BOUNDED_SPIN, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
LIMITS = {"busy": 0.5, "quiet": 1.01}  # of the time by default
LOOP = """
import os
parent = os.getppid()
while os.getppid() == parent:  # it ends with the benchmark, also when that is killed
    sum(range(1_000_000))
"""


def main() -> None:
    """Run the stage in each way, compare, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quiet_steps", type=int, default=376, help="the quickstart's: 376")
    parser.add_argument("--busy_steps", type=int, default=20)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["default", "bounded"])
    parser.add_argument("--loads", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--add", action="store_true", help="add to the runs that were written")
    parser.add_argument("--chain", type=Path, default=Path("runs"), help="as --runs of chainforge")
    args = parser.parse_args()
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        os.environ.pop(name, None)
    chain = prepared(args.chain, "traces")
    steps = {"quiet": args.quiet_steps, "busy": args.busy_steps}
    found = (stored("busy") if args.add else None) or {"steps": steps, "loads": {}}
    if found["steps"] != steps:
        raise SystemExit(f"the runs that were written took {found['steps']} steps")
    for load in args.loads:
        sides = found["loads"].setdefault(load, {})
        left = set()
        for side, _ in turns(args.sides, args.runs):
            seconds, weight = one_run(chain, steps[load], load, SIDES[side])
            sides.setdefault(side, {"runs": []})["runs"].append(round(seconds, 2))
            left.add(weight)
            print(load, side, round(seconds, 1), flush=True)
        compare(sides)
        found["bit_equal"] = len(left) == 1 and found.get("bit_equal", True)
    save(results() / "busy.json", found | {"loops": os.cpu_count(), "limits": LIMITS})
    print(table(found))


def one_run(chain: Path, steps: int, load: str, environment: dict[str, str]) -> tuple[float, str]:
    """Run the cold start once; return its seconds and the hash of its weights."""
    words = ["--model_name_or_path", QUICKSTART / "base", "--data", chain / "traces"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = recipe("sft", "cold_start.yaml", folder / "out", *words, "--max_steps", steps)
        environment = environment | caches(folder / "cache")
        with loops() if load == "busy" else contextlib.nullcontext():
            took = run(command, folder / "log", **environment)
        return took.seconds, weights(folder / "out/model")


@contextlib.contextmanager
def loops() -> Iterator[None]:
    """Keep each core busy with a loop."""
    children = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def compare(sides: dict[str, dict[str, Any]]) -> None:
    """Add each side's median and spread, and the share of the default's median."""
    usual = statistics.median(sides["default"]["runs"])
    for one in sides.values():
        ratio = round(statistics.median(one["runs"]) / usual, 3)
        one |= {"n": len(one["runs"]), "seconds": spread(one["runs"], 2), "ratio": ratio}


def table(found: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = ["| load | side | n | seconds (range) | of the default |", "|---|---|--:|--:|--:|"]
    for load, sides in found["loads"].items():
        for side, one in sides.items():
            clock = one["seconds"]
            lines.append(
                f"| {load}, {found['steps'][load]} steps | {side} | {one['n']} | "
                f"{clock['median']:.1f} ({clock['low']:.1f} to {clock['high']:.1f}) | "
                f"{one['ratio']:.3f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
