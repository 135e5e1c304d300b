"""Compare the collector with a client that was told the server's limit.

    python benchmarks/collector.py --requests 240 --limit 20 --repeats 3

A server on the loopback, in a process of its own, answers 20 requests at a time and refuses more
with 429. The peer is a plain AsyncOpenAI client with a semaphore of 20: as fast as the server
allows, and told so beforehand. The collector is not told: it starts at 10 and finds out, and does
its whole work meanwhile: ledger, validation, samples with their provenance. The sides take turns.
Writes `benchmarks/results/collector.json` and prints a table.
"""

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import openai
from measuring import ROOT, results, save, turns

from chainforge.core.jsonl import Row
from chainforge.data.sources import example
from chainforge.generate.settings import TeacherArgs
from chainforge.generate.teacher import collect

KEY = "sk-benchmark-0000"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, nargs=2, default=(0.5, 1.5), help="of an answer")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.limit, *args.seconds)
        return
    os.environ["OPENAI_API_KEY"] = KEY
    command = [sys.executable, __file__, "--serve", "--limit", str(args.limit)]
    command += ["--seconds", *map(str, args.seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        url = server.stdout.readline().decode().strip()
        rows = [
            example([{"role": "user", "content": f"What is {n} and two?"}], "4", task="sums")
            for n in range(args.requests)
        ]
        fixed(url, rows[:20], args.limit)  # connections, caches and imports, on neither's account
        sides: dict[str, list[dict[str, Any]]] = {"fixed": [], "collector": []}
        for side, _ in turns(sides, args.repeats):
            run = fixed(url, rows, args.limit) if side == "fixed" else collector(url, rows)
            sides[side].append(run)
            print(side, run, flush=True)
        server.stdin.close()  # type: ignore[union-attr]
    report(args, sides)


def serve(limit: int, least: float, most: float) -> None:
    """Answer until standard input ends."""
    sys.path.insert(0, str(ROOT / "tests"))
    from server import GOOD, Answer, Server  # type: ignore[import-not-found]

    draw = random.Random(0)
    with Server(lambda _: Answer(GOOD, seconds=draw.uniform(least, most)), limit=limit) as server:
        print(server.url, flush=True)
        sys.stdin.read()


def fixed(url: str, rows: list[Row], limit: int) -> dict[str, Any]:
    """Ask with a semaphore; write nothing down."""

    async def ask(client: openai.AsyncOpenAI, gate: asyncio.Semaphore, row: Row) -> None:
        async with gate:
            await client.chat.completions.create(model="teacher", messages=row["prompt"])

    async def run() -> None:
        gate = asyncio.Semaphore(limit)
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            await asyncio.gather(*(ask(client, gate, row) for row in rows))

    started = time.perf_counter()
    asyncio.run(run())
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "per_second": round(len(rows) / seconds, 2)}


def collector(url: str, rows: list[Row]) -> dict[str, Any]:
    """Collect into a fresh directory."""
    with tempfile.TemporaryDirectory() as directory:
        args = TeacherArgs(teacher="openai", model="teacher", base_url=url)
        started = time.perf_counter()
        collected = collect(args, rows, directory)
        seconds = time.perf_counter() - started
    requests = collected.spending["requests"]
    assert len(collected.rows) == len(rows)
    return {
        "seconds": round(seconds, 2),
        "per_second": round(len(rows) / seconds, 2),
        "refused": requests - len(rows),
    }


def report(args: argparse.Namespace, sides: dict[str, list[dict[str, Any]]]) -> None:
    """Write the result and print it."""
    rates = {side: [run["per_second"] for run in runs] for side, runs in sides.items()}
    middle = {side: statistics.median(values) for side, values in rates.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates["collector"], rates["fixed"])]
    result = {
        "what": f"answers a second from a server that grants {args.limit} requests at a time",
        "requests": args.requests,
        "limit": args.limit,
        "answer_seconds": list(args.seconds),
        "repeats": args.repeats,
        "runs": sides,
        "median_per_second": middle,
        "spread_per_second": {side: [min(v), max(v)] for side, v in rates.items()},
        "ratio_of_medians": round(middle["collector"] / middle["fixed"], 3),
        "ratios_by_repeat": [round(ratio, 3) for ratio in ratios],
        "share_of_ideal": round(middle["collector"] / (args.limit / (sum(args.seconds) / 2)), 3),
    }
    path = results() / "collector.json"
    save(path, result, "openai", "httpx2")
    print("| side | answers/s (median) | spread |\n|---|---:|---|")
    for side, values in rates.items():
        print(f"| {side} | {middle[side]:.1f} | {min(values):.1f} to {max(values):.1f} |")
    print(f"ratio {result['ratio_of_medians']}: written to {path}")


if __name__ == "__main__":
    main()
