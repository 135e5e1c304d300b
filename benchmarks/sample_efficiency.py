"""Measure accuracy per generated token: plain GRPO, a gate, minibatches.

    python benchmarks/sample_efficiency.py --cold runs/quickstart/cold_start/model

Each side trains the quickstart's `rl` stage from the same cold start, over several seeds, at a
constant learning rate, and is measured on the same held-out rows every few steps. What counts is
accuracy against generated tokens: all that were sampled, the gate's own measurement included;
between measurements the curve is a straight line. Reported are the accuracy where plain GRPO ends,
and the tokens to the best accuracy that plain GRPO came to, and to some below it. `minibatches`
splits a rollout into four updates, as DeepSeek-R1's and DAPO's settings do into sixteen; sides
with a plus have both. Without a cold start the quickstart's chain is run up to it first. What is
done is skipped. Writes `benchmarks/results/sample_efficiency.json` and prints Markdown.
"""

import argparse
import statistics
import subprocess
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from measuring import QUICKSTART, results, save, spread
from sides import prepared, recipe

from chainforge.core.artifacts import read_manifest
from chainforge.core.config import read_settings
from chainforge.core.jsonl import read_rows

REASON = QUICKSTART / "rl.yaml"
SPLIT = 4  # updates a rollout where it is split
SIDES = ("plain", "gate", "minibatches", "gate+minibatches")
LEVELS = (0.7, 0.8, 0.85)
TARGET = 1.3
Curve = list[tuple[float, float]]  # generated tokens, held-out accuracy


def main() -> None:
    """Run, collect, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cold", type=Path, default=Path("runs/quickstart/cold_start/model"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=24, help="of plain GRPO")
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--heldout", type=int, default=300)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:3]))
    parser.add_argument("--gate_samples", type=int, default=4)
    parser.add_argument("--size", type=int, default=1000, help="training prompts")
    parser.add_argument("--runs", type=Path, default=Path("runs-efficiency"))
    parser.add_argument("--out", type=Path, default=results() / "sample_efficiency.json")
    args = parser.parse_args()
    if not args.cold.exists():
        prepared(Path("runs"), "cold_start")
    args.sides = ["plain", *(side for side in args.sides if side != "plain")]
    runs = [one_seed(seed, args) for seed in args.seeds]
    given = ("seeds", "sides", "steps", "every", "heldout", "gate_samples", "size")
    result: dict[str, Any] = {name: getattr(args, name) for name in given}
    found = summary(runs)
    result |= {"summary": found, "target": TARGET, "row": verdict(found, runs), "runs": runs}
    save(args.out, result)
    print(table(result))


def one_seed(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train every side with one seed; return its curve up to the tokens of plain GRPO."""
    directory = args.runs / str(seed)
    tasks = [task | {"size": args.size} for task in read_settings(REASON)["tasks"]]
    pool = directory / "pool"
    gated = any(side.startswith("gate") for side in args.sides)
    if gated:
        stage("reject", pool, args.cold, seed, directory, {
            "tasks": tasks, "system_prompt": "", "num_samples": args.gate_samples,
            "max_new_tokens": read_settings(REASON)["max_completion_length"],
        })  # fmt: skip
    run: dict[str, Any] = {"seed": seed, "sides": {}}
    for name in args.sides:
        settings = settings_of(name, tasks, pool, args)
        stage("grpo", directory / name, args.cold, seed, directory, settings)
        run["sides"][name] = measured(directory / name)
    curves = {name: side["curve"] for name, side in run["sides"].items()}
    if gated:
        # The pool is the gate's own cost, unless an earlier stage has left one.
        paid = run["pool_tokens"] = sum(row["tokens"] for row in read_rows(pool / "samples.jsonl"))
        for name in [name for name in curves if name.startswith("gate")]:
            moved = [(tokens + paid, accuracy) for tokens, accuracy in curves[name]]
            curves[f"{name}, paid"] = moved
    run["tokens"] = budget = curves["plain"][-1][0]
    best = max(accuracy for _, accuracy in curves["plain"])
    run["best_of_plain"] = best
    run["accuracy"] = {name: at(curve, budget) for name, curve in curves.items()}
    run["mean_accuracy"] = {name: area(curve, budget) for name, curve in curves.items()}
    run["tokens_to"] = {
        name: {"best of plain": tokens_to(curve, best)}
        | {str(level): tokens_to(curve, level) for level in LEVELS}
        for name, curve in curves.items()
    }
    return run


def settings_of(
    name: str, tasks: list[dict[str, Any]], pool: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the settings of a side: the quickstart's own, and what makes it a side."""
    reason = read_settings(REASON)
    # The others may write shorter completions, and so need more rollouts for as many tokens.
    rollouts = args.steps if name == "plain" else args.steps + 2 * args.every
    split = SPLIT if name.endswith("minibatches") else 1
    settings = reason | {
        "tasks": tasks, "lr_scheduler_type": "constant", "max_steps": split * rollouts,
        "save_strategy": "no", "heldout_size": args.heldout, "eval_steps": split * args.every,
        "per_device_eval_batch_size": 100, "report_to": "none", "health": "off",
    }  # fmt: skip
    del settings["save_steps"], settings["model_name_or_path"]
    rollout = reason["per_device_train_batch_size"] * reason.get("steps_per_generation", 1)
    settings |= {"per_device_train_batch_size": rollout // split, "steps_per_generation": split}
    if name.startswith("gate"):
        settings["gate_pool"] = str(pool)
    return settings


def stage(
    kind: str, target: Path, model: Path, seed: int, folder: Path, settings: dict[str, Any]
) -> None:
    """Run a recipe, unless it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"{target.name}.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = recipe(kind, config.resolve(), target, "--model_name_or_path", model, seed=seed)
    with open(folder / f"{target.name}.log", "a", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)


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
    shares = [log[key] for log in logs if (key := "frac_mixed_correctness") in log]
    manifest = read_manifest(directory)
    assert manifest is not None
    return {"curve": curve, "seconds": manifest.seconds, "mixed": statistics.mean(shares)}


def at(curve: Curve, tokens: float) -> float:
    """Return the accuracy where so many tokens were generated."""
    before = curve[0]
    for point in curve:
        if point[0] >= tokens:
            share = (tokens - before[0]) / ((point[0] - before[0]) or 1)
            return before[1] + max(0.0, share) * (point[1] - before[1])
        before = point
    raise ValueError(f"a side ends at {before[0]} tokens, before {tokens}: give it more steps")


def tokens_to(curve: Curve, accuracy: float) -> float | None:
    """Return how many tokens it took to come to an accuracy first; None where it never did."""
    for before, after in pairwise([(0.0, 0.0), *curve]):
        if after[1] >= accuracy:
            share = (accuracy - before[1]) / (after[1] - before[1])
            return before[0] + share * (after[0] - before[0])
    return None


def area(curve: Curve, tokens: float) -> float:
    """Return the mean accuracy on the way to so many tokens; before a curve begins it is flat."""
    points = [(0.0, curve[0][1]), *[p for p in curve if 0 < p[0] < tokens]]
    points.append((tokens, at(curve, tokens)))
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points)) / tokens


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians and spread over the seeds, and the differences to plain GRPO, by seed."""
    found: dict[str, Any] = {side: {} for side in runs[0]["accuracy"]}
    for measure in ("accuracy", "mean_accuracy"):
        for side, of_side in found.items():
            values = [run[measure][side] for run in runs]
            gains = [run[measure][side] - run[measure]["plain"] for run in runs]
            of_side[measure] = spread(values, 6) | {
                "over_plain": {"median": statistics.median(gains), "by_seed": gains}
            }
    for side, of_side in found.items():
        of_side["fewer_tokens_to"] = {
            level: fewer(
                [(run["tokens_to"]["plain"][level], run["tokens_to"][side][level]) for run in runs]
            )
            for level in runs[0]["tokens_to"]["plain"]
        }
    return found


def verdict(found: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the line of the table: how many times fewer tokens each side took to plain's best."""
    ratios = {side: of["fewer_tokens_to"]["best of plain"]["median"] for side, of in found.items()
              if side != "plain"}  # fmt: skip
    words = ", ".join(f"{side} {ratio:.2f}x" for side, ratio in ratios.items())
    return {"measured": f"{words} ({len(runs)} seeds)", "met": max(ratios.values()) >= TARGET}


def fewer(pairs: list[tuple[float | None, float | None]]) -> dict[str, Any]:
    """Return how many times fewer tokens a side took than plain GRPO; 0 where it never came."""
    known = [pair for pair in pairs if pair[0]]
    ratios = [plain / mine if mine else 0.0 for plain, mine in known if plain]
    return spread(ratios, 6) | {"by_seed": ratios} if ratios else {"by_seed": []}


def table(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    tokens = statistics.median(run["tokens"] for run in result["runs"])
    count, seeds = result["heldout"], len(result["seeds"])
    lines = [
        f"At {tokens:,.0f} generated tokens; {count} held-out rows, {seeds} seeds, medians (range)",
        "",
        "| side | accuracy % | over plain, points | times fewer tokens to plain's best | "
        + " | ".join(f"to {100 * level:.0f} %" for level in LEVELS) + " |",
        "|---|--:|--:|--:|" + "--:|" * len(LEVELS),
    ]  # fmt: skip
    for side, measures in result["summary"].items():
        one, ratios = measures["accuracy"], measures["fewer_tokens_to"]
        gains = one["over_plain"]["by_seed"]
        accuracy = f"{100 * one['median']:.1f} ({100 * one['low']:.1f} to {100 * one['high']:.1f})"
        gain = f"{100 * one['over_plain']['median']:+.1f} " + (
            f"({100 * min(gains):+.1f} to {100 * max(gains):+.1f})"
        )
        cells = [side, accuracy, gain, *(written(ratio) for ratio in ratios.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def written(ratio: dict[str, Any]) -> str:
    if "median" not in ratio:
        return "plain never there"
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


if __name__ == "__main__":
    main()
