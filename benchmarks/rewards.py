"""Score completions with our accuracy reward and with TRL's, clean and with hostile ones.

    python benchmarks/rewards.py                  # 4,096 completions, three runs of each side

Rows come from `mathrows.py`: transcripts that the quickstart's policy wrote, and made ones with
answers as in MATH and GSM8K. Each run is a process of its own, sides take turns; both score batches
of 512, as a GRPO step hands them over, warm but with nothing cached. In the hostile set one
completion in twenty is made to hang a verifier. TRL's reward is not run over it whole: each kind
of hostile answer is given to it once, and stopped after `--patience` seconds; what the set would
take at least is reckoned from that. Verdicts are compared with each other and with the truth, which
the rows know. Writes `benchmarks/results/rewards.json` and prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from mathrows import make
from measuring import results, save, spread
from reward_sides import BATCH, by_kind, score_once

from chainforge.core.jsonl import Row

SIDES = ("ours", "trl")
TARGETS = {"clean": 5.0, "hostile": 50.0}
SHARE = 0.05  # of hostile rows
# Where the two sides may differ: the kind of row, our verdict, TRL's, and why ours is right.
CORRECTIONS = {
    ("real", 0.0, 1.0): "no well-formed transcript (text outside of it, or tags missing or "
    "twice), so that no answer is read; TRL's pays for a box anywhere",
    ("base", 0.0, 1.0): "the digits are the same, the base is another; math-verify overlooks it",
}


def main() -> None:
    """Measure, compare, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=15.0, help="seconds for a hostile answer")
    parser.add_argument("--out", type=Path, default=results() / "rewards.json")
    parser.add_argument("--side", choices=[*SIDES, "hostile kinds"], help=argparse.SUPPRESS)
    parser.add_argument("--hostile", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "hostile kinds":
        print(json.dumps(by_kind(args.seed, args.patience)))
        return
    if args.side:
        print(json.dumps(score_once(args.side, make(args.rows, args.seed, args.hostile))))
        return
    result = measure(args)
    save(args.out, result, "math-verify", "sympy", "latex2sympy2_extended")
    print(table(result))
    unlisted = [one for one in result["verdicts"]["differences"] if one["reason"] is None]
    if unlisted:
        raise SystemExit(f"{len(unlisted)} differences are not listed corrections: {unlisted[:3]}")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    clean: dict[str, list[Row]] = {side: [] for side in SIDES}
    hostile = []
    for _ in range(args.runs):
        for side in SIDES:
            clean[side].append(run(side, args))
        hostile.append(run("ours", args, SHARE))
    kinds = run("hostile kinds", args)
    rows = make(args.rows, args.seed, SHARE)
    result: dict[str, Any] = {
        "rows": args.rows, "batch": BATCH, "seed": args.seed, "hostile_share": SHARE,
        "patience": args.patience, "kinds": Counter(row["kind"] for row in rows),
        "clean": {side: rates(clean[side], args.rows) for side in SIDES},
        "hostile": {"ours": rates(hostile, args.rows), "trl": {"by_kind": kinds}},
    }  # fmt: skip
    peer = result["hostile"]["trl"]
    peer["seconds_at_least"] = at_least(rows, kinds, result["clean"]["trl"]["seconds"]["median"])
    peer["per_second_at_most"] = args.rows / peer["seconds_at_least"]
    result["ratio"] = {
        "clean": result["clean"]["ours"]["per_second"]["median"]
        / result["clean"]["trl"]["per_second"]["median"],
        "hostile": result["hostile"]["ours"]["per_second"]["median"] / peer["per_second_at_most"],
    }
    result["targets"] = TARGETS
    result["verdicts"] = compared(
        make(args.rows, args.seed), clean["ours"][0]["verdicts"], clean["trl"][0]["verdicts"]
    )
    paid = sum(
        verdict == 1.0
        for row, verdict in zip(rows, hostile[0]["verdicts"], strict=True)
        if row["kind"].startswith("hostile")
    )
    result["verdicts"]["hostile_paid"] = {
        "ours": paid, "trl": [kind for kind, of in kinds.items() if of["verdict"] == 1.0]
    }  # fmt: skip
    return result


def run(side: str, args: argparse.Namespace, hostile: float = 0.0) -> Row:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--hostile", str(hostile)]
    for name in ("rows", "seed", "patience"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return dict(json.loads(done.stdout))


def rates(runs: list[Row], rows: int) -> Row:
    return {
        "seconds": spread([one["seconds"] for one in runs]),
        "cpu_seconds": spread([one["cpu_seconds"] for one in runs]),
        "per_second": spread([rows / one["seconds"] for one in runs]),
    }


def at_least(rows: list[Row], kinds: dict[str, Row], clean: float) -> float:
    """Return the least that TRL's reward takes for a set, by its time for clean rows and kinds."""
    hostile = [row["kind"] for row in rows if row["kind"] in kinds]
    return clean * (1 - len(hostile) / len(rows)) + sum(kinds[kind]["seconds"] for kind in hostile)


def compared(rows: list[Row], ours: list[Any], trl: list[Any]) -> Row:
    """Return how often the verdicts agree, and each kind of difference with its reason."""
    found: dict[tuple[Any, ...], Row] = {}
    for row, mine, theirs in zip(rows, ours, trl, strict=True):
        if mine == theirs:
            continue
        key = (row["kind"], row["right"], mine, theirs)
        answer = row["completion"].partition("<summary>")[2].partition("</summary>")[0]
        known = found.setdefault(key, {
            "kind": row["kind"], "right": row["right"], "ours": mine, "trl": theirs, "count": 0,
            "gold": row["gold"], "answer": answer,
            "reason": CORRECTIONS.get((row["kind"], mine, theirs)),
        })  # fmt: skip
        known["count"] += 1
    wrong = {
        side: sum(said != float(row["right"]) for row, said in zip(rows, verdicts, strict=True))
        for side, verdicts in (("ours", ours), ("trl", trl))
    }
    different = sum(one["count"] for one in found.values())
    return {"same": len(rows) - different, "differences": list(found.values()), "wrong": wrong}


def table(result: Row) -> str:
    """Return the figures as Markdown."""
    lines = ["| rows | ours, per second (range) | TRL's | ratio | to reach |",
             "|---|--:|--:|--:|--:|"]  # fmt: skip
    for name in TARGETS:
        mine, peer = result[name]["ours"]["per_second"], result[name]["trl"]
        theirs = peer["per_second"]["median"] if "per_second" in peer else None
        said = f"{theirs:.0f}" if theirs else f"at most {peer['per_second_at_most']:.1f}"
        lines.append(
            f"| {name} | {mine['median']:.0f} ({mine['low']:.0f} to {mine['high']:.0f}) | {said} "
            f"| {result['ratio'][name]:.1f}x | {TARGETS[name]:.0f}x |"
        )
    verdicts = result["verdicts"]
    wrong = verdicts["wrong"]
    lines.append("")
    lines.append(f"{verdicts['same']} of {result['rows']} verdicts are the same; "
                 f"wrong ones: {wrong['ours']} of ours, {wrong['trl']} of TRL's.")  # fmt: skip
    for one in verdicts["differences"]:
        lines.append(f"- {one['count']}x {one['gold']} answered {one['answer']}: "
                     f"ours {one['ours']}, TRL's {one['trl']}. {one['reason']}")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
