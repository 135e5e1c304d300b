"""Time the dataset builder on a million scored rows, beside a pass with datasketch.

    python benchmarks/builder.py --rows 1000000 --runs 3

Writes the rows to `--work` (about 1.7 kB each, 8 samples a prompt), then runs `recipes/reject.py
--pool FILE --rescore false` in a process of its own, every filter on: repetition, languages by
script, paragraphs, code, near duplicates within a prompt, decontamination against 500
questions, selection and a quota. Memory is the sum of the resident sets of that process and its
workers, looked at ten times a second. The peer does the same work as it is usually written by
hand, row by row in one process: drop what is wrong, the same filters of text (ours), five-word
runs against the questions, equal texts by their hash, near ones by datasketch (128 permutations and
its LSH), the best two of a prompt, and a parquet file of them; on `--peer_rows` rows, extrapolated
linearly. The two alternate. Needs `pip install datasketch psutil`. Writes
`benchmarks/results/builder.json`, and for more than a million rows a file with their number in
its name.
"""

import argparse
import hashlib
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from measuring import ROOT, results, save, spread

from chainforge.core.artifacts import read_json
from chainforge.core.transcript import write
from chainforge.data.filters import FilterArgs, text_fault

SAMPLES = 8
LIMIT_SECONDS, LIMIT_BYTES = 300, 4 * 2**30
SETTINGS = [
    "--rescore", "false", "--max_per_prompt", "2", "--select", "best", "--max_paragraph_chars",
    "1500", "--drop_code", "true", "--near_duplicates", "0.8",
]  # fmt: skip
TEXT = (
    "first the number of boxes on shelf stands for what is known and then we add half it because "
    "each visitor brings more than they take away so that total grows until evening when count "
    "starts again from zero which must be checked once before going to next step of this problem"
)
FOREIGN = "首先我们把已知的数字写下来然后再进行计算接下来把两个数加起来得到总数"
VOCABULARY = TEXT.split()


def main() -> None:
    """Make the rows, run, measure the peer, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--peer_rows", type=int, default=40_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("builder-benchmark"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    samples = args.work / f"samples-{args.rows}.jsonl"
    held_out = args.work / f"held_out-{args.rows}.jsonl"
    if not samples.exists():
        make(samples, held_out, args.rows)
    runs, peers = [], []
    for _ in range(args.runs):
        peers.append(peer(samples, held_out, args.work / "peer.parquet", args.peer_rows))
        runs.append(build(samples, held_out, args.work / "out", args.rows * 15 // 100))
    extrapolated = statistics.median(peers) * args.rows / args.peer_rows
    ratio = extrapolated / statistics.median(run["seconds"] for run in runs)
    result = {
        "rows": args.rows,
        "bytes": samples.stat().st_size,
        "seconds": spread([run["seconds"] for run in runs]),
        "cpu_seconds": spread([run["cpu_seconds"] for run in runs]),
        "peak_bytes": spread([run["peak_bytes"] for run in runs], 0),
        "limits": {"seconds": LIMIT_SECONDS, "bytes": LIMIT_BYTES},
        "funnel": runs[0]["funnel"],
        "peer": {
            "what": "the same filters row by row, datasketch MinHash + LSH, one process",
            "rows": args.peer_rows,
            "seconds": spread(peers),
            "seconds_extrapolated": extrapolated,
        },
        "times_as_fast_as_peer": ratio,
    }
    name = "builder" if args.rows <= 1_000_000 else f"builder-{args.rows}"
    save(results() / f"{name}.json", result, "datasketch")
    print(json.dumps(result, indent=2))


def make(path: Path, held_out: Path, rows: int) -> None:
    """Write scored rows with what the filters look for, and the questions of an evaluation."""
    rng = random.Random(0)
    asked = [question(rng, f"exam {number}") for number in range(500)]
    held_out.write_text("".join(json.dumps({"question": text}) + "\n" for text in asked))
    with open(path, "w", encoding="utf-8") as file:
        for prompt in range(rows // SAMPLES):
            leak = rng.random() < 0.003
            text = rng.choice(asked) if leak else question(rng, f"day {prompt}")
            turns = [{"role": "user", "content": f"Solve this. {text}" if leak else text}]
            before = ""
            for sample in range(SAMPLES):
                before = reasoning(rng, before)
                row = scored(rng, prompt, sample, turns, before)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def question(rng: random.Random, when: str) -> str:
    words = " ".join(rng.choices(VOCABULARY, k=25))
    return f"On {when}, {words} {rng.randint(2, 9999)} and {rng.randint(2, 9999)}: how many?"


def reasoning(rng: random.Random, before: str) -> str:
    """Return a text of about 1,000 characters, now and then with a fault or nearly the last one."""
    kind = rng.random()
    if before and kind < 0.05:
        return before
    if before and kind < 0.15:
        words = before.split(" ")
        words[rng.randrange(len(words))] = "indeed"
        return " ".join(words)
    lines = [
        " ".join([*rng.choices(VOCABULARY, k=30), f"{rng.randint(2, 9999)}."]) for _ in range(6)
    ]
    if kind < 0.18:
        lines += [lines[0]] * 12
    elif kind < 0.20:
        lines.append("".join(rng.choices(FOREIGN, k=200)))
    elif kind < 0.22:
        lines.insert(3, "```python\nprint(1)\n```")
    return "\n\n".join(lines)


def scored(
    rng: random.Random, prompt: int, sample: int, turns: list[dict[str, str]], text: str
) -> dict[str, Any]:
    right, answer = rng.random() < 0.6, str(prompt)
    said = answer if right else str(prompt + 1)
    return {
        "id": f"{prompt:016x}",
        "prompt": turns,
        "answer": answer,
        "task": f"task {prompt % 5}",
        "verifier": "math",
        "completion": write(text, said),
        "sample": sample,
        "source": "policy",
        "model": "policy",
        "stage": "rejection",
        "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": rng.randrange(2**31)},
        "rewards": {"accuracy_reward": float(right), "format_reward": 1.0},
        "reward": right + 0.2,
        "correct": right,
        "formatted": True,
        "extracted": said,
        "tokens": len(text) // 4,
        "finish_reason": "length" if rng.random() < 0.05 else "stop",
    }


def build(samples: Path, held_out: Path, out: Path, most: int) -> dict[str, Any]:
    """Run the recipe once; return its time, its peak memory and its funnel."""
    import psutil

    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(ROOT / "recipes/reject.py"), "--pool", str(samples)]
    command += ["--decontaminate", str(held_out), "--output_dir", str(out), *SETTINGS]
    command += ["--max_rows", str(most)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    child = subprocess.Popen(command)
    tree = psutil.Process(child.pid)
    peak = 0
    while child.poll() is None:
        resident = 0
        try:
            for process in [tree, *tree.children(recursive=True)]:
                resident += process.memory_info().rss
        except psutil.NoSuchProcess:
            pass
        peak = max(peak, resident)
        time.sleep(0.1)
    seconds = time.monotonic() - started
    assert child.returncode == 0, child.returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    funnel = read_json(out / "funnel.json")
    assert funnel["in"] == funnel["kept"] + sum(funnel["dropped"].values())
    del funnel["sampling"]  # where the rows are on this machine
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak, "funnel": funnel}


def peer(samples: Path, held_out: Path, out: Path, rows: int) -> float:
    """Return the seconds of the same work, done row by row as it is usually written by hand."""
    from datasketch import MinHash, MinHashLSH

    started = time.monotonic()
    checks = FilterArgs(max_paragraph_chars=1500, drop_code=True)
    asked = [json.loads(line)["question"] for line in held_out.read_text().splitlines()]
    exam = {run for text in asked for run in runs_of(text)}
    index = MinHashLSH(threshold=0.8, num_perm=128)
    seen: set[str] = set()
    groups: dict[str, list[dict[str, Any]]] = {}
    with open(samples, encoding="utf-8") as file:
        for line, _ in zip(file, range(rows), strict=False):
            row = json.loads(line)
            if not row["correct"] or row["finish_reason"] != "stop":
                continue
            if text_fault(row, checks):
                continue
            if len(exam & set(runs_of(row["prompt"][0]["content"]))) > 10:
                continue
            key = f"{row['id']} {hashlib.sha256(row['completion'].encode()).hexdigest()}"
            if key in seen:
                continue
            seen.add(key)
            sketch = MinHash(num_perm=128)
            sketch.update_batch([run.encode() for run in runs_of(row["completion"])])
            if not any(twin[0] == row["id"] for twin in index.query(sketch)):
                index.insert((row["id"], row["sample"]), sketch)
                groups.setdefault(row["id"], []).append(row)
    best = [
        row
        for group in groups.values()
        for row in sorted(group, key=lambda row: (-row["reward"], row["tokens"]))[:2]
    ]
    Dataset.from_list(best).to_parquet(out)
    return time.monotonic() - started


def runs_of(text: str) -> list[str]:
    """Return each five words of a text that follow one another."""
    words = text.lower().split()
    return [" ".join(run) for run in zip(*(words[start:] for start in range(5)), strict=False)]


if __name__ == "__main__":
    main()
