"""Preference pairs: a right and a wrong answer to the same prompt, as TRL's DPOTrainer wants them.

The wrong one is a whole transcript as well, and of the samples there are the nearest in length:
what tells the two apart should be the answer, not the form and not the length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chainforge.core.disk import replacing
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.data.columns import columns_of
from chainforge.data.datasets import FILE
from chainforge.data.decisions import Decisions
from chainforge.data.facts import RIGHT, WRONG

FOLDER = "pairs"
# What a rejected sample may have been dropped for: its answer, not its form.
ANSWERED = (None, "wrong", "below_min_reward", "not_selected")

Pair = tuple[int, int]  # positions of the chosen and of the rejected sample


def match(decisions: Decisions, most: int) -> list[Pair]:
    """Return up to `most` pairs of each prompt: kept and right against wrong, each used once."""
    if most < 0:
        raise InputError(f"preference_pairs: expected 0 or more, found {most}")
    facts = decisions.facts
    right: dict[int, list[int]] = {}
    wrong: dict[int, list[int]] = {}
    for position, finding in enumerate(decisions.findings):
        number, verdict = facts.prompt[position], facts.verdict[position]
        if finding is None and verdict == RIGHT:
            right.setdefault(number, []).append(position)
        elif verdict == WRONG and (finding[0] if finding else None) in ANSWERED:
            wrong.setdefault(number, []).append(position)
    pairs: list[Pair] = []
    for number, chosen in right.items():
        left = list(wrong.get(number, ()))
        for position in chosen[:most]:
            if not left:
                break
            length = facts.length[position]
            rejected = min(left, key=lambda other: (abs(facts.length[other] - length), other))
            left.remove(rejected)
            pairs.append((position, rejected))
    return pairs


def pair_rows(pairs: Iterable[Pair], rows: Mapping[int, Row]) -> list[Row]:
    """Return the rows of pairs, conversational; `rows` holds the samples by position."""
    made = []
    for chosen, rejected in pairs:
        good, bad = rows[chosen], rows[rejected]
        made.append(
            {
                "id": good["id"],
                "prompt": good["prompt"],
                "chosen": [{"role": "assistant", "content": good["completion"]}],
                "rejected": [{"role": "assistant", "content": bad["completion"]}],
                "task": good.get("task"),
                "answer": good.get("answer"),
                "chosen_sample": good.get("sample"),
                "rejected_sample": bad.get("sample"),
                "chosen_reward": good.get("reward"),
                "rejected_reward": bad.get("reward"),
            }
        )
    return made


def save_pairs(rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Write pairs to `folder`/pairs/train.parquet; the file appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / FOLDER / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns_of(rows, ("prompt", "chosen", "rejected"))), temporary)
    return path
