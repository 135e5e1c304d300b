"""Measure what a stage costs over a raw TRL script that does the same work.

    python benchmarks/overhead.py --runs 3
    python benchmarks/overhead.py --runs 3 --stages rl rl_final --rollout_engine chainforge

An SFT and a GRPO stage of the quickstart, each against its script in `benchmarks/raw`: the same
rows in the same order, settings, rewards, seed, checkpoints and logs; fresh processes in turn, no
cache between them. The weights that both leave must be equal bit by bit. What ours does besides is
in its time: checking rows and settings, sealing checkpoints, keeping rollouts, watching health,
signing what it leaves. Without `--chain` the quickstart is run up to its cold start first. Writes
`overhead.json` and prints Markdown.

With TRL's own rollouts GRPO leaves the same weights as the script. `--rollout_engine chainforge`
measures ChainForge's instead, which draws other completions, and writes `rollouts.json`; `rl_final`
starts from the cold start, too.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from measuring import QUICKSTART, Run, ratios, results, run, save, spread, summary, turns, weights
from sides import asked, caches, prepared, raw, recipe, tasks_of

LIMITS = {"trl": 1.02, "chainforge": 0.65}
SIDES = ("raw", "ours")


def main() -> None:
    """Run both stages on both sides, compare, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--stages", nargs="+", choices=("sft", "rl", "rl_final"), default=["sft", "rl"]
    )
    parser.add_argument("--sft_steps", type=int, default=376, help="the quickstart's: 376")
    parser.add_argument("--rl_steps", type=int, default=96, help="the quickstart's: 96")
    parser.add_argument("--rl_final_steps", type=int, default=40, help="the quickstart's: 40")
    parser.add_argument("--rollout_engine", choices=sorted(LIMITS), default="trl")
    parser.add_argument("--chain", type=Path, default=Path("runs"), help="as --runs of chainforge")
    args = parser.parse_args()
    chain = prepared(args.chain, "cold_start")
    engine = args.rollout_engine
    result: dict[str, Any] = {"runs": args.runs, "limit": LIMITS[engine], "stages": {}}
    result |= {"rollout_engine": engine, "steps": {kind: steps(kind, args) for kind in args.stages}}
    for kind in args.stages:
        with tempfile.TemporaryDirectory() as folder:
            result["stages"][kind] = compare(kind, args, chain, Path(folder))
    save(results() / ("overhead.json" if engine == "trl" else "rollouts.json"), result)
    print(table(result))


def steps(kind: str, args: argparse.Namespace) -> int:
    """Return how many steps a stage takes."""
    return int(getattr(args, f"{kind}_steps"))


def compare(kind: str, args: argparse.Namespace, chain: Path, folder: Path) -> dict[str, Any]:
    """Run a stage on both sides in turn; return what they took and whether they left the same."""
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    left: set[str] = set()
    for side, _ in turns(SIDES, args.runs):
        output = folder / "out"
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        command = commands(kind, args, chain, output, folder / "tasks.json")[side]
        runs[side].append(run(command, folder / f"{side}.log", **caches(folder / "cache")))
        left.add(weights(output / "model"))
        print(kind, side, runs[side][-1], flush=True)
    return {
        side: summary(of) for side, of in runs.items()
    } | {
        "ratio": {name: ratios(runs["ours"], runs["raw"], name)
                  for name in ("seconds", "cpu_seconds", "peak_bytes")},
        "extra_seconds": spread([a.seconds - b.seconds for a, b in zip(runs["ours"], runs["raw"])]),
        "bit_equal": len(left) == 1,
    }  # fmt: skip


def commands(
    kind: str, args: argparse.Namespace, chain: Path, output: Path, tasks: Path
) -> dict[str, list[str]]:
    """Return the command of each side."""
    most = ["--max_steps", steps(kind, args)]
    if kind == "sft":
        base, data = QUICKSTART / "base", chain / "traces"
        words = ["--model", base, "--data", data / "dataset/train.parquet", "--save_steps", 200]
        return {
            "raw": raw("sft", *words, *most, "--output_dir", output),
            "ours": recipe("sft", "cold_start.yaml", output, "--model_name_or_path", base,
                           "--data", data, *most),
        }  # fmt: skip
    tasks_of(f"{kind}.yaml", tasks)
    words = ["--batch", 32, "--updates", 4, "--save_steps", 32]
    own = ["--model_name_or_path", chain / "cold_start/model", *most]
    if kind == "rl_final":
        words = ["--batch", 128, "--learning_rate", 2e-4, "--beta", 0.01, "--save_steps", 10]
        own += ["--tasks", json.dumps(asked("rl_final.yaml"))]
    words += ["--model", chain / "cold_start/model", "--tasks", tasks, *most]
    return {
        "raw": raw("grpo", *words, "--output_dir", output),
        "ours": recipe("grpo", f"{kind}.yaml", output, *own,
                       "--rollout_engine", args.rollout_engine),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = ["| stage | side | seconds (range) | CPU seconds | peak MB |", "|---|---|--:|--:|--:|"]
    for kind, stage in result["stages"].items():
        for side in SIDES:
            took = stage[side]
            lines.append(
                f"| {kind} | {side} | {took['seconds']['median']:.1f} ({took['seconds']['low']:.1f}"
                f" to {took['seconds']['high']:.1f}) | {took['cpu_seconds']['median']:.1f} "
                f"| {took['peak_bytes']['median'] / 1e6:.0f} |"
            )
        ratio = stage["ratio"]
        lines.append(
            f"| {kind} | ratio | {ratio['seconds']['median']:.3f} | "
            f"{ratio['cpu_seconds']['median']:.3f} | {ratio['peak_bytes']['median']:.3f} |"
        )
        lines.append(f"| {kind} | weights | {'equal' if stage['bit_equal'] else 'differ'} | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
