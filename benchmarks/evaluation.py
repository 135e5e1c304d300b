"""Measure the quickstart's evaluation beside lm-evaluation-harness.

    make bench/lm_eval/ready
    python benchmarks/evaluation.py --python bench/lm_eval/bin/python

Both sides answer the same held-out rows with the likeliest tokens and judge the same part of each
answer, in fresh processes in turn; the accuracies must be equal. One process of ours evaluates all
of the models, lm_eval (`hf` backend) needs one for each. What ours does besides is in its time:
lenient accuracy, format, language, intervals and paired tests. Ours is started
as `chainforge run` starts it. lm_eval is in an environment of its own: transformers imports
scikit-learn wherever it is installed. Writes `evaluation.json`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from measuring import ROOT, Run, ratios, results, run, save, summary, turns
from sides import SEED, asked, prepared

from chainforge.chain.execute import BOUNDED_SPIN
from chainforge.core.artifacts import read_json
from chainforge.core.jsonl import write_rows
from chainforge.core.transcript import DEFAULT
from chainforge.data.tasks import TaskArgs, load_examples

LIMIT = 0.5
LM_EVAL = "0.4.13"  # as in the Makefile
LONGEST = 72
Found = tuple[Run, dict[str, float]]  # what it took, and the accuracy of each model
SUMMARY = r"(?s)<summary>\s*(.*?)\s*</summary>"


def lm_eval(python: str, folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Write rows and a task for lm_eval; return the command without a model and an output."""
    asks = [{"question": r["prompt"][-1]["content"], "answer": r["answer"]} for r in rows]
    write_rows(folder / "rows.jsonl", asks)
    find = {"function": "regex", "regex_pattern": SUMMARY}
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<|im_end|>"], "do_sample": False, "max_gen_toks": LONGEST},
        "filter_list": [{"name": "summary", "filter": [find, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "sums.yaml").write_text(yaml.safe_dump(task))
    words = ["--tasks", "sums", "--include_path", str(folder), "--apply_chat_template"]
    return [python, "-m", "lm_eval", "--model", "hf", "--device", "cpu", *words]


def harness(command: list[str], models: dict[str, str], output: Path, batch: int) -> Found:
    """Evaluate each model with lm_eval."""
    took, found = [], {}
    for name, path in models.items():
        words = ["--model_args", f"pretrained={path},dtype=float32", "--batch_size", str(batch)]
        folder = output / name
        took.append(run([*command, *words, "--output_path", str(folder)], folder / "log.txt"))
        (file,) = folder.rglob("results_*.json")
        found[name] = read_json(file)["results"]["sums"]["exact_match,summary"]
    totals = [sum(getattr(one, field) for one in took) for field in ("seconds", "cpu_seconds")]
    return Run(*totals, max(one.peak_bytes for one in took)), found


def ours(tasks: list[Any], models: dict[str, str], output: Path, batch: int) -> Found:
    """Evaluate all models with our recipe."""
    settings = {"tasks": json.dumps(tasks), "system_prompt": "", "temperature": 0, "num_samples": 1}
    settings |= {"max_new_tokens": LONGEST, "generation_batch_size": batch, "output_dir": output}
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    words += ["--models", *(f"{name}={path}" for name, path in models.items())]
    command = [sys.executable, str(ROOT / "recipes/evaluate.py"), *words]
    took = run(command, output / "log.txt", **BOUNDED_SPIN)
    rows = read_json(output / "results.json")["models"]
    return took, {row["name"]: row["strict"]["mean"] for row in rows}


def main() -> None:
    """Run both sides in turn, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["rl_final"], help="of the quickstart")
    parser.add_argument("--rows", type=int, default=200, help="of each of the three tasks")
    parser.add_argument("--batch_size", type=int, default=256, help="the quickstart's: 256")
    parser.add_argument("--python", default=sys.executable, help="that has lm_eval")
    parser.add_argument("--chain", type=Path, default=Path("runs"), help="as --runs of chainforge")
    args = parser.parse_args()
    models = {name: str(prepared(args.chain, name) / name / "model") for name in args.models}
    tasks = [task | {"size": args.rows, "split": "test"} for task in asked("eval.yaml")]
    rows = load_examples(TaskArgs(tasks=tasks, system_prompt=""), DEFAULT, SEED)
    runs: dict[str, list[Run]] = {"ours": [], "lm_eval": []}
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        theirs = lm_eval(args.python, Path(folder), rows)
        for side, number in turns(runs, args.runs):
            output = Path(folder, f"{side}-{number}")
            took, found[side] = (
                ours(tasks, models, output, args.batch_size)
                if side == "ours"
                else harness(theirs, models, output, args.batch_size)
            )
            runs[side].append(took)
            print(side, took, found[side], flush=True)
    accuracy = [[round(value, 4) for value in one.values()] for one in found.values()]
    result = {"runs": args.runs, "limit": LIMIT, "rows": len(rows), "batch_size": args.batch_size}
    result |= {"accuracy": found, "equal": accuracy[0] == accuracy[1]}
    result |= {"lm_eval_version": LM_EVAL}
    result |= {side: summary(of) for side, of in runs.items()}
    result |= {"ratio": ratios(runs["ours"], runs["lm_eval"], "seconds")}
    save(results() / "evaluation.json", result)
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = [
        "| side | seconds (range) | CPU seconds | peak MB | accuracy |",
        "|---|--:|--:|--:|--:|",
    ]
    for side in ("ours", "lm_eval"):
        took, found = result[side], result["accuracy"][side]
        lines.append(
            f"| {side} | {took['seconds']['median']:.1f} ({took['seconds']['low']:.1f} to "
            f"{took['seconds']['high']:.1f}) | {took['cpu_seconds']['median']:.1f} "
            f"| {took['peak_bytes']['median'] / 1e6:.0f} "
            f"| {', '.join(f'{name} {value:.4f}' for name, value in found.items())} |"
        )
    return "\n".join([*lines, f"| ratio | {result['ratio']['median']:.3f} | | | |"])


if __name__ == "__main__":
    main()
