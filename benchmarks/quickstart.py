"""Run the quickstart over several seeds, with its random-reward control, and print the table.

    python benchmarks/quickstart.py --seeds 1 2 3 --runs runs-seeds

Each seed runs the whole chain into `RUNS/SEED/quickstart` and the control into
`RUNS/SEED/quickstart-control`; what is done is skipped, so the command can be cut and repeated.
Writes `benchmarks/results/quickstart.json` and prints Markdown.
"""

import argparse
import subprocess
from pathlib import Path
from typing import Any

from measuring import CHAINFORGE, QUICKSTART, results, save

from chainforge.chain.ablate import share_stages
from chainforge.chain.plan import override
from chainforge.chain.spec import load_chain
from chainforge.core.artifacts import read_json, read_manifest

CHAINS = {"quickstart": "chain.yaml", "quickstart-control": "control.yaml"}


def main() -> None:
    """Run, collect, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs-seeds"))
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        run: dict[str, Any] = {"seed": seed}
        for name, file in CHAINS.items():
            directory = args.runs / str(seed)
            chain = override(load_chain(QUICKSTART / file), seed=seed)
            share_stages(chain, directory, directory / "quickstart")
            command = [*CHAINFORGE, "run", str(QUICKSTART / file)]
            subprocess.run([*command, "--runs", str(directory), "--seed", str(seed)], check=True)
            run[name] = read_json(directory / name / "eval/results.json")
            run[name]["seconds"] = seconds(directory / name)
        runs.append(run)
    save(results() / "quickstart.json", {"runs": runs})
    print(table(runs))


def seconds(directory: Path) -> dict[str, float]:
    """Return how long each stage took."""
    manifests = {path.name: read_manifest(path) for path in directory.iterdir() if path.is_dir()}
    return {name: manifest.seconds for name, manifest in manifests.items() if manifest}


def table(runs: list[dict[str, Any]]) -> str:
    """Return the models' accuracies and the differences between them, a column for each seed."""
    seeds = " | ".join(f"seed {run['seed']}" for run in runs)
    lines = [f"| model: strict (lenient) % | {seeds} |", "|---|" + "--:|" * len(runs)]
    for index, model in enumerate(runs[0]["quickstart"]["models"]):
        found = [run["quickstart"]["models"][index] for run in runs]
        cells = [
            f"{100 * m['strict']['mean']:.1f} ({100 * m['lenient']['mean']:.1f})" for m in found
        ]
        lines.append(f"| {model['name']} | {' | '.join(cells)} |")
    lines += ["", f"| difference in points, p | {seeds} |", "|---|" + "--:|" * len(runs)]
    for name in CHAINS:
        for index, pair in enumerate(runs[0][name]["pairs"]):
            found = [run[name]["pairs"][index] for run in runs]
            cells = [f"{100 * p['difference']:+.1f}, {p['p']:.1g}" for p in found]
            label = "control: " if name.endswith("control") else ""
            lines.append(f"| {label}{pair['from']} → {pair['to']} | {' | '.join(cells)} |")
    totals = [sum(run["quickstart"]["seconds"].values()) for run in runs]
    lines.append(f"| seconds of all stages | {' | '.join(f'{total:.0f}' for total in totals)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
