"""Measure the memory in which an SFT stage starts on many rows, beside a raw TRL script.

    python benchmarks/many_rows.py                  # a million rows, three quarters of an hour
    python benchmarks/many_rows.py --rows 20000

Rows like the quickstart's traces, all different, in one parquet file. Both sides read and tokenise
all of them and take a few steps; each starts with an empty cache. The peak is the process's, mapped
files among it. Writes `many_rows.json` and prints Markdown.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import QUICKSTART, Run, ratios, results, run, save, summary, turns, weights
from sides import caches, raw, recipe

LIMIT = 1.2
GROUP = 10_000  # rows that a file of parquet has side by side


def main() -> None:
    """Make the rows, run both sides in turn, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1)
    args = parser.parse_args()
    runs: dict[str, list[Run]] = {"raw": [], "ours": []}
    left = set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_rows(folder / "rows.parquet", args.rows)
        base, output = QUICKSTART / "base", folder / "out"
        words = ["--max_steps", args.steps, "--save_steps", 200]
        commands = {
            "raw": raw("sft", "--model", base, "--data", file, *words, "--output_dir", output),
            "ours": recipe("sft", "cold_start.yaml", output, "--model_name_or_path", base,
                           "--data", file, *words),
        }  # fmt: skip
        for side, _ in turns(runs, args.runs):
            runs[side].append(run(commands[side], folder / "log", **caches(folder / "cache")))
            left.add(weights(output / "model"))
            print(side, runs[side][-1], flush=True)
            shutil.rmtree(output)
            shutil.rmtree(folder / "cache", ignore_errors=True)  # also of the one that just ended
    result: dict[str, Any] = {"runs": args.runs, "rows": args.rows, "steps": args.steps}
    result |= {"limit": LIMIT, "bit_equal": len(left) == 1}
    result |= {side: summary(of) for side, of in runs.items()}
    result["ratio"] = {
        key: ratios(runs["ours"], runs["raw"], key) for key in ("seconds", "peak_bytes")
    }
    save(results() / "many_rows.json", result)
    print(table(result))


def write_rows(file: Path, count: int) -> Path:
    """Write rows of parquet, a group at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    schema = pa.schema({"prompt": turns, "completion": turns})
    with pq.ParquetWriter(file, schema) as out:
        for start in range(0, count, GROUP):
            rows = list(sums(start, min(start + GROUP, count)))
            out.write_table(pa.Table.from_pylist(rows, schema=schema))
    return file


def sums(start: int, end: int) -> Iterator[dict[str, Any]]:
    """Yield rows of the quickstart's kind: a sum, worked in two steps."""
    for n in range(start, end):
        a, b, c = n % 1000, n // 1000, n % 7
        steps = f"First I add {a} and {b}: {a} + {b} = {a + b}. Then {a + b} + {c} = {a + b + c}."
        said = f"<reasoning_process>{steps}</reasoning_process>\n<summary>{a + b + c}</summary>"
        yield {
            "prompt": [{"role": "user", "content": f"{a} + {b} + {c} ="}],
            "completion": [{"role": "assistant", "content": said}],
        }


def table(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = [f"| {result['rows']:,} rows | seconds | peak MB |", "|---|--:|--:|"]
    for side in ("raw", "ours"):
        took = result[side]
        lines.append(f"| {side} | {took['seconds']['median']:.0f} "
                     f"| {took['peak_bytes']['median'] / 1e6:.0f} |")  # fmt: skip
    clock, peak = (result["ratio"][key]["median"] for key in ("seconds", "peak_bytes"))
    lines.append(f"| ratio | {clock:.3f} | {peak:.3f} |")
    lines.append(f"| weights | {'equal' if result['bit_equal'] else 'differ'} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
