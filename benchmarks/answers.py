"""Decide whether answers give their gold answers: our verifiers, math-verify, and TRL's reward.

    python benchmarks/answers.py                  # all pairs of answer_pairs.jsonl, 20 seconds
    python benchmarks/answers.py --mistakes       # lists each pair that our verifiers get wrong

A line of `answer_pairs.jsonl` is a gold answer with right and wrong answers to it, of one kind. The
verdicts were written by hand before any side saw the pairs. math-verify reads the answer as it is
written; TRL's reward reads boxes only, so that it gets each answer in a box. Both peers know
mathematics only, so that they are also compared on the pairs of the `math` verifier alone.
Writes `benchmarks/results/answers.json` and prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from measuring import results, save

PAIRS = Path(__file__).with_name("answer_pairs.jsonl")


class Pair(NamedTuple):
    """One answer with its gold answer, and whether it should be accepted."""

    kind: str
    verifier: str
    gold: str
    answer: str
    right: bool


def read_pairs() -> list[Pair]:
    """Return every pair of the file."""
    lines = map(json.loads, PAIRS.read_text(encoding="utf-8").splitlines())
    return [
        Pair(line["kind"], line["verifier"], line["gold"], answer, name == "right")
        for line in lines
        for name in ("right", "wrong")
        for answer in line[name]
    ]


def ours(pairs: list[Pair]) -> list[bool]:
    """Verify with `accuracy_reward`, the answer in a transcript."""
    from chainforge.rewards.functions import accuracy_rewards

    form = "<reasoning_process>So.</reasoning_process>\n<summary>{}</summary>"
    calls = [
        {"completion": form.format(pair.answer), "answer": pair.gold, "verifier": pair.verifier}
        for pair in pairs
    ]
    return [verdict == 1.0 for verdict in accuracy_rewards(calls)]


def math_verify(pairs: list[Pair]) -> list[bool]:
    """Verify with math-verify, the gold answer as mathematics and the answer as written."""
    from math_verify import parse, verify

    return [bool(verify(parse(f"${pair.gold}$"), parse(pair.answer))) for pair in pairs]


def trl(pairs: list[Pair]) -> list[bool]:
    """Verify with TRL's `accuracy_reward`, the answer in a box."""
    from trl.rewards import accuracy_reward

    texts = [p.answer if "\\boxed" in p.answer else f"\\boxed{{{p.answer}}}" for p in pairs]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    golds = [f"${pair.gold}$" for pair in pairs]
    return [verdict == 1.0 for verdict in accuracy_reward(completions, golds)]


SIDES: dict[str, Callable[[list[Pair]], list[bool]]] = {
    "ours": ours,
    "math-verify": math_verify,
    "TRL's accuracy_reward": trl,
}


def count(pairs: list[Pair], verdicts: list[bool], verifier: str = "") -> dict[str, int]:
    """Count right decisions, wrong answers paid and right ones refused, of one verifier or all."""
    both = [(pair.right, verdict) for pair, verdict in zip(pairs, verdicts, strict=True)
            if pair.verifier == verifier or not verifier]  # fmt: skip
    return {
        "pairs": len(both),
        "decided rightly": sum(right == verdict for right, verdict in both),
        "wrong answers paid": sum(verdict and not right for right, verdict in both),
        "right answers refused": sum(right and not verdict for right, verdict in both),
    }


def table(sides: dict[str, dict[str, dict[str, int]]]) -> str:
    """Return the counts as Markdown."""
    lines = ["| side | all pairs | `math` pairs | wrong answers paid | right answers refused |"]
    lines.append("|---|--:|--:|--:|--:|")
    for name, found in sides.items():
        shares = (f"{100 * one['decided rightly'] / one['pairs']:.1f} %" for one in found.values())
        paid, refused = found["all"]["wrong answers paid"], found["all"]["right answers refused"]
        lines.append(f"| {name} | {' | '.join(shares)} | {paid} | {refused} |")
    return "\n".join(lines)


def main() -> None:
    """Verify every pair on each side, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mistakes", action="store_true", help="list the pairs we get wrong")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    pairs = read_pairs()
    verdicts = {name: verify(pairs) for name, verify in SIDES.items()}
    sides = {name: {"all": count(pairs, of), "math": count(pairs, of, "math")}
             for name, of in verdicts.items()}  # fmt: skip
    save(results() / "answers.json", {"sides": sides}, "math-verify")
    print(table(sides))
    for pair, verdict in zip(pairs, verdicts["ours"], strict=True):
        if args.mistakes and verdict != pair.right:
            print("refused" if pair.right else "PAID", pair)


if __name__ == "__main__":
    main()
