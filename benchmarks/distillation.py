"""Run the quickstart's three ways of distilling, and keep what each student came to.

    python benchmarks/distillation.py --runs runs-distillation

What is done is skipped, so the command can be cut and repeated. Writes
`benchmarks/results/distillation.json` and prints Markdown.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from measuring import results
from quickstart import seconds

from chainforge.core.artifacts import read_json, write_json
from chainforge.training.stage import device, versions

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run, collect, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--runs", type=Path, default=Path("runs-distillation"))
    args = parser.parse_args()
    chain = ROOT / "recipes/quickstart/distillation.yaml"
    command = [sys.executable, "-m", "chainforge.pipeline.cli", "run", str(chain)]
    subprocess.run([*command, "--runs", str(args.runs), "--seed", str(args.seed)], check=True)
    directory = args.runs / "distillation"
    scores = read_json(directory / "scores/results.json")
    spent = seconds(directory)
    record = {"versions": versions(), "hardware": device(), "n": 1, "seed": args.seed}
    write_json(
        results() / "distillation.json",
        record | {"seconds": spent, "models": scores["models"], "pairs": scores["pairs"]},
    )
    print("| model | strict % (95 %) | lenient % | pass@4 % |\n|---|--:|--:|--:|")
    for model in scores["models"]:
        strict = model["strict"]
        low, high = 100 * strict["low"], 100 * strict["high"]
        print(
            f"| {model['name']} | {100 * strict['mean']:.1f} ({low:.1f} to {high:.1f}) "
            f"| {100 * model['lenient']['mean']:.1f} | {100 * model['pass_at_k']['4']:.1f} |"
        )


if __name__ == "__main__":
    main()
