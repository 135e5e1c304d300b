"""Measure what mixed groups are worth: plain GRPO, a pass-rate gate, and dynamic sampling.

    python benchmarks/dynamic_sampling.py --cold runs/quickstart/cold/model

Each side trains the quickstart's `reason` stage from the same cold start, over several seeds, at a
constant learning rate, and is measured on the same held-out rows every few steps. What counts is
accuracy against generated tokens: all that were sampled, discarded groups and the gate's own
measurement included. A side ends where plain GRPO has generated as many; between measurements the
curve is a straight line. Without a cold start the quickstart's chain is run up to it first. What is
done is skipped. Writes `benchmarks/results/dynamic_sampling.json` and prints Markdown.
"""

import argparse
import statistics
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from measuring import results

from chainforge.core.artifacts import read_manifest, write_json
from chainforge.core.config import read_yaml
from chainforge.core.records import read_rows
from chainforge.training.stage import device, versions

ROOT = Path(__file__).parents[1]
REASON = ROOT / "recipes/quickstart/reason.yaml"
SIDES = ("plain", "gate", "dynamic")
Curve = list[tuple[float, float]]  # generated tokens, held-out accuracy


def main() -> None:
    """Run, collect, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cold", type=Path, default=Path("runs/quickstart/cold/model"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=32, help="of plain GRPO")
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--heldout", type=int, default=500)
    parser.add_argument("--gate_samples", type=int, default=4)
    parser.add_argument("--size", type=int, default=1000, help="training prompts")
    parser.add_argument("--runs", type=Path, default=Path("runs-dynamic"))
    parser.add_argument("--out", type=Path,
                        default=results() / "dynamic_sampling.json")  # fmt: skip
    args = parser.parse_args()
    if not args.cold.exists():
        chain = [sys.executable, "-m", "chainforge.pipeline.cli", "run"]
        subprocess.run([*chain, str(ROOT / "recipes/quickstart/chain.yaml"), "--until", "cold"],
                       check=True)  # fmt: skip
    runs = [one_seed(seed, args) for seed in args.seeds]
    given = ("seeds", "steps", "every", "heldout", "gate_samples", "size")
    result: dict[str, Any] = {name: getattr(args, name) for name in given}
    result |= {"summary": summary(runs), "runs": runs}
    result |= {"versions": versions(), "hardware": device()}
    write_json(args.out, result)
    print(table(result))


def one_seed(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train every side with one seed; return its curve up to the tokens of plain GRPO."""
    directory = args.runs / str(seed)
    tasks = [task | {"size": args.size} for task in read_yaml(REASON)["tasks"]]
    pool = directory / "pool"
    stage("reject", pool, args.cold, seed, directory, {
        "tasks": tasks, "system_prompt": "", "num_samples": args.gate_samples,
        "max_new_tokens": read_yaml(REASON)["max_completion_length"],
    })  # fmt: skip
    common = read_yaml(REASON) | {
        "tasks": tasks, "lr_scheduler_type": "constant", "max_steps": args.steps,
        "save_strategy": "no", "heldout_size": args.heldout, "heldout_steps": args.every,
        "per_device_eval_batch_size": 100, "report_to": "none", "health": "off",
    }  # fmt: skip
    del common["save_steps"], common["model_name_or_path"]
    # The other sides may write shorter completions, and so need more steps for as many tokens.
    longer = {"max_steps": args.steps + args.every}
    own: dict[str, dict[str, Any]] = {
        "plain": {},
        "gate": longer | {"gate_pool": str(pool)},
        "dynamic": longer | {"dynamic_sampling": True},
    }
    run: dict[str, Any] = {"seed": seed, "sides": {}}
    for name in SIDES:
        stage("grpo", directory / name, args.cold, seed, directory, common | own[name])
        run["sides"][name] = measured(directory / name)
    run["pool_tokens"] = sum(row["tokens"] for row in read_rows(pool / "samples.jsonl"))
    curves = {name: side["curve"] for name, side in run["sides"].items()}
    # The pool is the gate's own cost, unless an earlier stage has left one.
    paid = run["pool_tokens"]
    curves["gate_paid"] = [(tokens + paid, accuracy) for tokens, accuracy in curves["gate"]]
    run["tokens"] = budget = curves["plain"][-1][0]
    run["accuracy"] = {name: at(curve, budget) for name, curve in curves.items()}
    run["mean_accuracy"] = {name: area(curve, budget) for name, curve in curves.items()}
    return run


def stage(
    recipe: str, target: Path, model: Path, seed: int, folder: Path, settings: dict[str, Any]
) -> None:
    """Run a recipe, unless it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"{target.name}.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, str(ROOT / f"recipes/{recipe}.py"), "--config", str(config)]
    command += ["--model_name_or_path", str(model), "--output_dir", str(target)]
    with open(folder / f"{target.name}.log", "a", encoding="utf-8") as log:
        subprocess.run([*command, "--seed", str(seed)], check=True, stdout=log, stderr=log)


def measured(directory: Path) -> dict[str, Any]:
    """Return the curve of a finished stage, and what its batches were made of."""
    by_step: Counter[int] = Counter()
    for row in read_rows(directory / "rollouts.jsonl"):
        by_step[row["step"]] += row["tokens"]
    logs = read_rows(directory / "metrics.jsonl")
    curve = [
        (sum(tokens for step, tokens in by_step.items() if step <= log["step"]), log[key])
        for log in logs
        if (key := "eval_accuracy") in log
    ]
    shares = [log[key] for log in logs if (key := "groups/mixed_correctness") in log]
    manifest = read_manifest(directory)
    assert manifest is not None
    found = {"curve": curve, "seconds": manifest.seconds, "mixed": statistics.mean(shares)}
    for key in ("generated", "rounds", "filled"):
        if values := [log[name] for log in logs if (name := f"dynamic/{key}") in log]:
            found[key] = statistics.mean(values)
    return found


def at(curve: Curve, tokens: float) -> float:
    """Return the accuracy where so many tokens were generated."""
    before = curve[0]
    for point in curve:
        if point[0] >= tokens:
            share = (tokens - before[0]) / ((point[0] - before[0]) or 1)
            return before[1] + max(0.0, share) * (point[1] - before[1])
        before = point
    raise ValueError(f"a side ends at {before[0]} tokens, before {tokens}: give it more steps")


def area(curve: Curve, tokens: float) -> float:
    """Return the mean accuracy on the way to so many tokens; before a curve begins it is flat."""
    points = [(0.0, curve[0][1]), *[p for p in curve if 0 < p[0] < tokens]]
    points.append((tokens, at(curve, tokens)))
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points)) / tokens


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians and spread over the seeds, and the differences to plain GRPO, by seed."""
    found: dict[str, Any] = {}
    for measure in ("accuracy", "mean_accuracy"):
        for side in ("plain", "gate", "gate_paid", "dynamic"):
            values = [run[measure][side] for run in runs]
            gains = [run[measure][side] - run[measure]["plain"] for run in runs]
            found.setdefault(side, {})[measure] = {
                "median": statistics.median(values),
                "low": min(values),
                "high": max(values),
                "over_plain": {"median": statistics.median(gains), "by_seed": gains},
            }
    return found


def table(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    tokens = statistics.median(run["tokens"] for run in result["runs"])
    count, seeds = result["heldout"], len(result["seeds"])
    lines = [
        f"At {tokens:,.0f} generated tokens; {count} held-out rows, {seeds} seeds, medians (range)",
        "",
        "| side | accuracy % | over plain, points | mean on the way % | over plain, points |",
        "|---|--:|--:|--:|--:|",
    ]
    for side, measures in result["summary"].items():
        cells = [side]
        for one in measures.values():
            gains = one["over_plain"]["by_seed"]
            cells.append(
                f"{100 * one['median']:.1f} ({100 * one['low']:.1f} to {100 * one['high']:.1f})"
            )
            cells.append("" if side == "plain" else
                         f"{100 * one['over_plain']['median']:+.1f} "
                         f"({100 * min(gains):+.1f} to {100 * max(gains):+.1f})")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
