"""Time the whole quickstart against the same stages as separate scripts by hand.

    python benchmarks/pipeline.py --runs 1

Both sides start from the same traces: a teacher's worked solutions have no counterpart among
scripts, so making them is timed apart. From there the peer runs `benchmarks/raw`, each stage a
process of its own that reads what the one before has written: the same settings, the same number of
rows, steps and samples. SFT and GRPO leave the same weights while their rows are the same, that is
until rejection sampling, where each side draws numbers of its own. The peer keeps no samples, no
rollouts, no manifest, and knows no intervals. Writes `pipeline.json` and prints Markdown.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from measuring import CHAINFORGE, QUICKSTART, Run, results, run, save, spread, turns
from sides import caches, raw, tasks_of

from chainforge.core.artifacts import read_json, read_manifest

LIMIT_SECONDS = 600
STAGES = ("cold_start", "rl", "rejection", "sft2", "rl_final", "distill_data", "student", "eval")
MODELS = ("base", "cold_start", "rl", "sft2", "rl_final", "student_base", "student")


def main() -> None:
    """Run both sides in turn, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs-pipeline"))
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    first = chain(args.work / "traces", "--until", "traces")
    traces = args.work / "traces/quickstart/traces"
    sides: dict[str, list[dict[str, Any]]] = {"ours": [], "raw": []}
    for side, number in turns(sides, args.runs):
        folder = args.work / f"{side}-{number}"
        took = ours(folder, traces) if side == "ours" else by_hand(folder, traces)
        sides[side].append(took)
        print(side, took, flush=True)
    result = summary(first, sides, args.runs)
    save(results() / "pipeline.json", result)
    print(table(result))


def chain(runs: Path, *words: str) -> Run:
    """Run the quickstart's chain, or a part of it."""
    command = [*CHAINFORGE, "run", str(QUICKSTART / "chain.yaml"), "--runs", str(runs)]
    return run([*command, *words], runs / "log.txt")


def ours(folder: Path, traces: Path) -> dict[str, Any]:
    """Run the chain from the cold start on; return its time, and what each stage says it took."""
    shutil.copytree(traces, folder / "quickstart/traces")
    whole = chain(folder, "--from", "cold_start")
    manifests = {name: read_manifest(folder / "quickstart" / name) for name in STAGES}
    models = read_json(folder / "quickstart/eval/results.json")["models"]
    return {
        "seconds": round(whole.seconds, 1),
        "cpu_seconds": round(whole.cpu_seconds, 1),
        "stages": {name: found.seconds for name, found in manifests.items() if found},
        "accuracy": {row["name"]: round(row["strict"]["mean"], 3) for row in models},
    }


def by_hand(folder: Path, traces: Path) -> dict[str, Any]:
    """Run the scripts one after another; return what each took, start-up and all."""
    folder.mkdir(parents=True)
    made = {name: folder / name for name in STAGES}
    rows = {name: tasks_of(f"{name}.yaml", folder / f"{name}.json")
            for name in ("rl", "rejection", "rl_final", "distill_data", "eval")}  # fmt: skip
    models = {"base": QUICKSTART / "base", "student_base": QUICKSTART / "student_base"}
    models |= {name: made[name] / "model" for name in MODELS if name in made}
    traced, kept = traces / "dataset/train.parquet", "train.parquet"

    def sft(name: str, model: str, *data: Path, epochs: int = 2) -> list[str]:
        return raw("sft", "--model", models[model], "--data", *data, "--epochs", epochs,
                   "--save_steps", 200, "--output_dir", made[name])  # fmt: skip

    def grpo(name: str, model: str, *words: Any) -> list[str]:
        return raw("grpo", "--model", models[model], "--tasks", rows[name],
                   "--output_dir", made[name], *words)  # fmt: skip

    def reject(name: str, model: str, samples: int) -> list[str]:
        return raw("reject", "--model", models[model], "--tasks", rows[name],
                   "--samples", samples, "--output_dir", made[name])  # fmt: skip

    commands = {
        "cold_start": sft("cold_start", "base", traced),
        "rl": grpo("rl", "cold_start", "--max_steps", 96, "--save_steps", 32,
                       "--batch", 32, "--updates", 4),
        "rejection": reject("rejection", "rl", 2),
        "sft2": sft("sft2", "base", made["rejection"] / kept, traced),
        "rl_final": grpo("rl_final", "sft2", "--max_steps", 40, "--save_steps", 10,
                      "--learning_rate", 2e-4, "--beta", 0.01),
        "distill_data": reject("distill_data", "rl_final", 1),
        "student": sft("student", "student_base", made["distill_data"] / kept, epochs=3),
        "eval": raw("evaluate", "--models", *(models[name] for name in MODELS),
                      "--tasks", rows["eval"], "--output", folder / "scores.json"),
    }  # fmt: skip
    took = {name: run(command, folder / f"{name}.log", **caches(folder / "cache"))
            for name, command in commands.items()}  # fmt: skip
    scores = read_json(folder / "scores.json")
    return {
        "seconds": round(sum(one.seconds for one in took.values()), 1),
        "cpu_seconds": round(sum(one.cpu_seconds for one in took.values()), 1),
        "stages": {name: round(one.seconds, 1) for name, one in took.items()},
        "accuracy": {name: round(scores[str(models[name])]["accuracy"], 3) for name in MODELS},
    }


def summary(first: Run, sides: dict[str, list[dict[str, Any]]], runs: int) -> dict[str, Any]:
    """Return medians, and the ratios of the runs."""
    pairs = list(zip(sides["ours"], sides["raw"], strict=True))
    return {
        "runs": runs,
        "limit_seconds": LIMIT_SECONDS,
        "traces_seconds": round(first.seconds, 1),
        "seconds": {side: spread([one["seconds"] for one in of], 1) for side, of in sides.items()},
        "whole_seconds": spread([one["seconds"] + first.seconds for one in sides["ours"]], 1),
        "ratio": spread([mine["seconds"] / theirs["seconds"] for mine, theirs in pairs]),
        "sides": sides,
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as Markdown; a stage's own time is without its process's imports."""
    mine, theirs = result["sides"]["ours"][0], result["sides"]["raw"][0]
    lines = ["| stage | ours, within the stage | by hand, the whole process |", "|---|--:|--:|"]
    for name in STAGES:
        lines.append(f"| {name} | {mine['stages'][name]:.1f} | {theirs['stages'][name]:.1f} |")
    lines.append(f"| all, by the clock | {mine['seconds']:.1f} | {theirs['seconds']:.1f} |")
    lines.append(f"| with the traces | {result['whole_seconds']['median']:.1f} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
