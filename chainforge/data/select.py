"""Select scored samples to train on: filters, then a prompt's samples, then quotas.

Every sample that goes in comes out once: kept, or dropped with its reason in the column `drop` and
what was measured in `drop_detail`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.data import filters
from chainforge.data.datasets import FILE, columns_of, write_parquet
from chainforge.data.decontaminate import Screen, evaluation_questions
from chainforge.data.dedup import Sketches, most_different, near_duplicates, text_key
from chainforge.data.filters import FilterArgs, SelectionArgs
from chainforge.data.pool import Features, measure

if TYPE_CHECKING:
    import pandas as pd

# In order: the reason of a sample is the first that applies.
REASONS = (
    "truncated",
    "chat_token",
    "empty",
    "format",
    "unverified",
    "wrong",
    "below_min_reward",
    *filters.REASONS,
    "contaminated",
    "pass_rate",
    "duplicate_prompt",
    "duplicate",
    "near_duplicate",
    "not_selected",
    "over_quota",
)


@dataclass
class Decisions:
    """The fate of each sample, in order: columns `id`, `verdict`, `length`, `pass_rate`, `drop`."""

    table: pd.DataFrame
    screened: dict[str, int]

    def __post_init__(self) -> None:
        names = ("pass_rate", "drop", "detail")
        columns = (self.table[name].astype(object) for name in names)
        self._marks = list(zip(*(column.where(column.notna(), None) for column in columns)))

    def mark(self, position: int, row: Row) -> Row:
        """Return a sample with its `pass_rate`, `drop` and, if dropped, `drop_detail`."""
        rate, reason, detail = self._marks[position]
        row = row | {"pass_rate": rate, "drop": reason}
        row.pop("drop_detail", None)
        return row | ({"drop_detail": detail} if reason else {})

    def funnel(self) -> dict[str, Any]:
        """Count samples and prompts: `in` is `kept` and all that was dropped, by reason."""
        counts = self.table["drop"].value_counts().to_dict()
        kept = self.table["drop"].isna()
        funnel: dict[str, Any] = {"in": len(self.table), "kept": int(kept.sum())}
        funnel["dropped"] = {reason: counts[reason] for reason in REASONS if reason in counts}
        ids = self.table["id"]
        funnel["prompts"] = {"in": ids.nunique(), "kept": ids[kept].nunique()}
        return funnel | ({"decontamination": self.screened} if self.screened else {})


def decide(features: Features, args: SelectionArgs, seed: int = 0) -> Decisions:
    """Decide which measured samples are kept, and note the reason to drop each other one."""
    args.check()
    _check_columns(features, args)
    questions = evaluation_questions(args.decontaminate, seed)
    choice = _Choice(features.table.copy(), features.sketch, features.accepted, args, seed)
    screened = choice.screen(questions) if questions else {}
    choice.limit_pass_rates()
    if args.drop_duplicates:
        choice.drop_duplicates()
    if args.near_duplicates:
        choice.drop_near_duplicates(args.near_duplicates)
    if args.select != "all":
        choice.rank()
    if args.max_rows is not None:
        choice.limit_rows(args.max_rows)
    return Decisions(choice.table, screened)


def _check_columns(features: Features, args: SelectionArgs) -> None:
    table = features.table
    if not len(table):
        raise InputError("no samples to select from")
    if args.min_reward is not None and not (table["reward"] > float("-inf")).any():
        raise InputError("min_reward: no sample has a reward; score them first, or leave it out")
    needs = {
        "correct": ("require_correct: false", args.require_correct),
        "formatted": ("require_format: false", args.require_format),
        "reward": ("select: random", args.select == "best"),
    }
    for column, (otherwise, needed) in needs.items():
        if needed and column not in features.columns:
            raise InputError(f"no sample has {column!r}: score them first, or set {otherwise}")
    banded = args.min_pass_rate is not None or args.max_pass_rate is not None
    if banded and table["verdict"].isna().all():
        raise InputError("min_pass_rate and max_pass_rate need samples with a verdict, `correct`")


@dataclass
class _Choice:
    """A table of samples, of which each step marks some as dropped."""

    table: pd.DataFrame
    sketch: Sketches  # a row for each sample that is `sketched`
    sketched: list[bool]
    args: SelectionArgs
    seed: int

    def __post_init__(self) -> None:
        self.sketch_at = np.cumsum(self.sketched) - 1
        self.table["drop"] = self.table["drop"].astype(object)
        self.table["detail"] = self.table["detail"].astype(object)
        self.table["pass_rate"] = self.table.groupby("id")["verdict"].transform("mean")

    def left(self) -> pd.DataFrame:
        """Return the samples that are not dropped so far."""
        return self.table[self.table["drop"].isna()]

    def drop(self, positions: Any, reason: str, detail: Any) -> None:
        self.table.loc[positions, ["drop"]] = reason
        self.table.loc[positions, "detail"] = detail

    def prompts(self) -> pd.DataFrame:
        """Return the first sample left of each prompt that has a text."""
        first = self.left().drop_duplicates("id")
        return first[first["question"] != ""]

    def drop_prompts(self, reason: str, details: dict[str, str]) -> None:
        left = self.left()
        left = left[left["id"].isin(details)]
        self.drop(left.index, reason, left["id"].map(details))

    def screen(self, questions: list[tuple[str, str]]) -> dict[str, int]:
        """Drop prompts that contain evaluation questions; return how many were checked."""
        first = self.prompts()
        prompts = self.left()["id"].nunique()
        hits = Screen(questions).screen(list(zip(first["task"], first["question"], strict=True)))
        found = {one: str(hit) for one, hit in zip(first["id"], hits, strict=True) if hit}
        self.drop_prompts("contaminated", found)
        return {"questions": len(questions), "prompts": prompts, "prompts_dropped": len(found)}

    def limit_pass_rates(self) -> None:
        """Drop prompts that are too hard or too easy."""
        low, high = self.args.min_pass_rate or 0, self.args.max_pass_rate
        rates = self.left()["pass_rate"].dropna()
        outside = rates[~rates.between(low, 1 if high is None else high)]
        details = outside.map("{:.0%} of the samples are right".format)
        self.drop(outside.index, "pass_rate", details)

    def drop_duplicates(self) -> None:
        """Drop prompts that were asked before, and completions that their prompt had before."""
        first = self.prompts()
        same = first.groupby(first["question"].map(text_key))["id"].transform("first")
        twins = zip(first["id"], same, strict=True)
        again = {one: f"asks the same as {other}" for one, other in twins if one != other}
        self.drop_prompts("duplicate_prompt", again)
        left = self.left()
        equal = left.index[left.duplicated(["id", "key"])]
        self.drop(equal, "duplicate", "the same text as another sample of the prompt")

    def drop_near_duplicates(self, threshold: float) -> None:
        """Drop completions that nearly say what another one of their prompt does."""
        details: dict[int, str] = {}
        for positions in self._groups(more_than=1):
            found = near_duplicates(self.sketch[self.sketch_at[positions]], threshold)
            for row, alike in found.items():
                details[int(positions[row])] = f"about {alike:.0%} as another sample"
        self.drop(list(details), "near_duplicate", list(details.values()))

    def rank(self) -> None:
        """Drop what is beyond the best `max_per_prompt` samples of each prompt."""
        most, how = self.args.max_per_prompt, self.args.select
        if how == "diverse":
            lost = [p for group in self._groups(more_than=most) for p in self._alike(group, most)]
        else:
            ranked = self._ranked(self.left(), how)
            lost = ranked[ranked.groupby("id").cumcount() >= most].index
        self.drop(lost, "not_selected", f"{how}, {most} kept")

    def _ranked(self, left: pd.DataFrame, how: str) -> pd.DataFrame:
        """Sort samples by what `how` prefers; equals are in random order.

        By length, the best would be those that reason least.
        """
        by = {"best": -left["reward"], "shortest": left["length"], "random": 0}
        return left.assign(by=by[how], lot=self._lots(left, "rank")).sort_values(["by", "lot"])

    def _alike(self, positions: np.ndarray, most: int) -> np.ndarray:
        """Return what is left of a prompt's samples besides the best and those unlike it."""
        best = self._ranked(self.table.loc[positions], "best").index[0]
        sketch = self.sketch[self.sketch_at[positions]]
        first = int(np.flatnonzero(positions == best)[0])
        return np.delete(positions, most_different(sketch, first, most))

    def _groups(self, more_than: int) -> list[np.ndarray]:
        """Return the positions of the samples left of each prompt that has more than so many."""
        left = self.left()
        groups = left.groupby("id").indices.values()
        positions = left.index.to_numpy()
        return [positions[rows] for rows in groups if len(rows) > more_than]

    def limit_rows(self, most: int) -> None:
        """Drop rows so that `most` stay, spread evenly over the tasks.

        Of a task those stay that come first in a random order, which does not depend on what
        else there is.
        """
        left = self.left()
        left = left.assign(lot=self._lots(left, "quota")).sort_values("lot")
        shares = _shares(left["task"].value_counts().to_dict(), most)
        over = left.groupby("task").cumcount() >= left["task"].map(shares)
        self.drop(left[over].index, "over_quota", f"max_rows: {most}")

    def _lots(self, left: pd.DataFrame, purpose: str) -> list[int]:
        """Draw a random number for each sample, which depends on its content alone."""
        contents = zip(left["id"], left["key"], strict=True)
        return [text_key(f"{self.seed}/{purpose}/{one}/{key}") >> 1 for one, key in contents]


def _shares(sizes: dict[Any, int], most: int) -> dict[Any, int]:
    """Divide `most` evenly; what a small group leaves of its share goes to the others."""
    shares = {}
    for left, name in zip(range(len(sizes), 0, -1), sorted(sizes, key=lambda name: sizes[name])):
        shares[name] = min(sizes[name], most // left)
        most -= shares[name]
    return shares


@dataclass
class Selected:
    """Where every sample went."""

    kept: list[Row]
    dropped: list[Row]
    funnel: dict[str, Any]


def select_rows(
    samples: Sequence[Row], args: SelectionArgs, seed: int = 0, texts: FilterArgs | None = None
) -> Selected:
    """Divide scored samples into kept and dropped; both in the order in which they came.

    Each row gains `pass_rate` (share of correct ones among the prompt's verified samples, None
    without any) and `drop` (None, or the reason). Raises `InputError` when a column that a filter
    needs is in no row.
    """
    decisions = decide(measure(samples, args, texts), args, seed)
    marked = [decisions.mark(position, row) for position, row in enumerate(samples)]
    kept = [row for row in marked if row["drop"] is None]
    dropped = [row for row in marked if row["drop"] is not None]
    return Selected(kept, dropped, decisions.funnel())


# What a rejected sample of a pair may have been dropped for: its answer, not its form.
ANSWERED = ("wrong", "below_min_reward", "not_selected")
Pair = tuple[int, int]  # positions of the chosen and of the rejected sample


def match_pairs(decisions: Decisions, most: int) -> list[Pair]:
    """Return up to `most` preference pairs of each prompt: kept and right against wrong.

    The wrong one is a whole transcript as well, and of the samples there are the nearest in length:
    what tells the two apart should be the answer, not the form and not the length. No sample is in
    two pairs.
    """
    if most < 0:
        raise InputError(f"preference_pairs: expected 0 or more, found {most}")
    table, pairs = decisions.table, []
    kept = table[table["drop"].isna() & (table["verdict"] == 1)]
    wrong = table[(table["drop"].isna() | table["drop"].isin(ANSWERED)) & (table["verdict"] == 0)]
    others = {one: list(rows.index) for one, rows in wrong.groupby("id")}
    length = table["length"]
    for one, rows in kept.groupby("id", sort=False) if most else ():
        left = others.get(one, [])
        for position in rows.index[:most]:
            if left:
                near = min(left, key=lambda other: (abs(length[other] - length[position]), other))
                left.remove(near)
                pairs.append((position, near))
    return pairs


def save_pairs(pairs: Sequence[Pair], rows: Mapping[int, Row], folder: Path) -> Path:
    """Write pairs to `folder`/pairs/train.parquet, as TRL's DPOTrainer takes them.

    `rows` has the samples by position.
    """
    made = []
    for good, bad in ((rows[chosen], rows[rejected]) for chosen, rejected in pairs):
        row: Row = {name: good.get(name) for name in ("id", "prompt", "task", "answer")}
        for kind, sample in (("chosen", good), ("rejected", bad)):
            row[kind] = [{"role": "assistant", "content": sample["completion"]}]
            row |= {f"{kind}_{name}": sample.get(name) for name in ("sample", "reward")}
        made.append(row)
    columns = columns_of(made, ("prompt", "chosen", "rejected"))
    return write_parquet(columns, folder / "pairs" / FILE)
