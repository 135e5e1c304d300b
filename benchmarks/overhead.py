"""Measure what a stage costs over a raw TRL script that does the same work.

    python benchmarks/overhead.py --runs 3
    python benchmarks/overhead.py --runs 3 --stages rl rl_final --rollout_engine chainforge
    python benchmarks/overhead.py --runs 1 --stages smollm2 --rollout_engine chainforge --add

An SFT and a GRPO stage of the quickstart, each against its script in `benchmarks/raw`: the same
rows in the same order, settings, rewards, seed, checkpoints and logs; fresh processes in turn, no
cache between them. The weights that both leave must be equal bit by bit. What ours does besides is
in its time: checking rows and settings, sealing checkpoints, keeping rollouts, watching health,
signing what it leaves. Without `--chain` the quickstart is run up to its cold start first. Writes
`overhead.json` and prints Markdown.

With TRL's own rollouts GRPO leaves the same weights as the script. `--rollout_engine chainforge`
measures ChainForge's instead, which draws other completions, and writes `rollouts.json`; `rl_final`
starts from the cold start, too. `smollm2` is a step of `recipes/smollm2-135m/grpo.yaml` with 96
completions of up to 128 tokens; `--smollm2_model` is where its cold start is. With `--add` the
file's earlier runs count too, and its other stages stay.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import astuple
from pathlib import Path
from typing import Any

from measuring import (
    QUICKSTART,
    Run,
    ratios,
    results,
    run,
    save,
    spread,
    stored,
    summary,
    turns,
    weights,
)
from sides import asked, caches, prepared, raw, recipe, tasks_of

LIMITS = {"trl": 1.02, "chainforge": 0.65}
SIDES = ("raw", "ours")
SMOLLM2 = "../smollm2-135m/grpo.yaml"  # seen from the quickstart


def main() -> None:
    """Run both stages on both sides, compare, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--stages", nargs="+", choices=("sft", "rl", "rl_final", "smollm2"), default=["sft", "rl"]
    )
    parser.add_argument("--sft_steps", type=int, default=376, help="the quickstart's: 376")
    parser.add_argument("--rl_steps", type=int, default=96, help="the quickstart's: 96")
    parser.add_argument("--rl_final_steps", type=int, default=40, help="the quickstart's: 40")
    parser.add_argument("--smollm2_steps", type=int, default=1)
    parser.add_argument("--smollm2_prompts", type=int, default=12, help="a step, 8 times each")
    parser.add_argument("--smollm2_model", default="runs/smollm2-135m/cold_start/model")
    parser.add_argument("--add", action="store_true", help="to the runs of the file")
    parser.add_argument("--rollout_engine", choices=sorted(LIMITS), default="trl")
    parser.add_argument("--chain", type=Path, default=Path("runs"), help="as --runs of chainforge")
    args = parser.parse_args()
    chain = prepared(args.chain, "cold_start")
    engine = args.rollout_engine
    name = "overhead" if engine == "trl" else "rollouts"
    before = stored(name) if args.add else None
    stages: dict[str, Any] = before["stages"] if before else {}
    for kind in args.stages:
        with tempfile.TemporaryDirectory() as folder:
            stages[kind] = compare(kind, args, chain, Path(folder), stages.get(kind))
    result = {"stages": stages, "limit": LIMITS[engine], "rollout_engine": engine}
    result["runs"] = min(len(one["each"]["ours"]) for one in stages.values())
    if "smollm2" in args.stages:
        result["smollm2_prompts"] = args.smollm2_prompts
    result["steps"] = (before or {}).get("steps", {}) | {k: steps(k, args) for k in args.stages}
    save(results() / f"{name}.json", result)
    print(table(result))


def steps(kind: str, args: argparse.Namespace) -> int:
    """Return how many steps a stage takes."""
    return int(getattr(args, f"{kind}_steps"))


def compare(
    kind: str, args: argparse.Namespace, chain: Path, folder: Path, before: Any
) -> dict[str, Any]:
    """Run a stage on both sides in turn; return what they took and whether they left the same."""
    each = before["each"] if before else {side: [] for side in SIDES}
    runs = {side: [Run(*one) for one in each[side]] for side in SIDES}
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
        "bit_equal": len(left) == 1 and (not before or before["bit_equal"]),
        "each": {side: [astuple(one) for one in of] for side, of in runs.items()},
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
    config = SMOLLM2 if kind == "smollm2" else f"{kind}.yaml"
    tasks_of(config, tasks)
    model = args.smollm2_model if kind == "smollm2" else chain / "cold_start/model"
    words = ["--batch", 32, "--updates", 4, "--save_steps", 32]
    own = ["--model_name_or_path", model, *most, "--rollout_engine", args.rollout_engine]
    if kind == "rl_final":
        words = ["--batch", 128, "--learning_rate", 2e-4, "--beta", 0.01, "--save_steps", 10]
        own += ["--tasks", json.dumps(asked(config))]
    elif kind == "smollm2":
        words = ["--batch", 8, "--accumulate", args.smollm2_prompts]
        words += ["--length", 128, "--learning_rate", 1e-5]
        own += ["--per_device_train_batch_size", 8,
                "--gradient_accumulation_steps", args.smollm2_prompts,
                "--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false",
                "--system_prompt", ""]  # fmt: skip
    words += ["--model", model, "--tasks", tasks, *most]
    return {
        "raw": raw("grpo", *words, "--output_dir", output),
        "ours": recipe("grpo", config, output, *own),
    }


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
