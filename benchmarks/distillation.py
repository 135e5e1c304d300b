"""Run the quickstart's three ways of distilling, and keep what each student came to.

    python benchmarks/distillation.py --runs runs-distillation

What is done is skipped, so the command can be cut and repeated. Writes
`benchmarks/results/distillation.json` and prints Markdown.
"""

import argparse
import subprocess
from pathlib import Path

from measuring import CHAINFORGE, QUICKSTART, results, save
from quickstart import seconds

from chainforge.core.artifacts import read_json


def main() -> None:
    """Run, collect, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--runs", type=Path, default=Path("runs-distillation"))
    args = parser.parse_args()
    command = [*CHAINFORGE, "run", str(QUICKSTART / "distillation.yaml")]
    subprocess.run([*command, "--runs", str(args.runs), "--seed", str(args.seed)], check=True)
    directory = args.runs / "distillation"
    scores = read_json(directory / "eval/results.json")
    result = {"n": 1, "seed": args.seed, "seconds": seconds(directory)}
    result |= {name: scores[name] for name in ("models", "pairs")}
    save(results() / "distillation.json", result)
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
