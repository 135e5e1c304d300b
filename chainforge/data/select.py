"""Select scored samples to train on: filters, then a prompt's samples, then quotas.

Every sample that goes in comes out once: kept, or dropped with its reason in the column `drop` and
what was measured in `drop_detail`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.data import filters
from chainforge.data.decontaminate import Screen, evaluation_questions
from chainforge.data.dedup import most_different, near_duplicates, text_key
from chainforge.data.filters import SelectionArgs
from chainforge.data.pool import Features

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
    "duplicate_prompt",
    "duplicate",
    "near_duplicate",
    "not_selected",
    "over_quota",
)


@dataclass
class Decisions:
    """The fate of each sample, in order: columns `id`, `pass_rate`, `drop` and `detail`."""

    table: pd.DataFrame
    screened: dict[str, int]

    def __post_init__(self) -> None:
        marks = self.table[["pass_rate", "drop", "detail"]].astype(object)
        self._marks = marks.where(marks.notna(), None).to_numpy().tolist()

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
        ids = self.table["id"]
        funnel: dict[str, Any] = {
            "in": len(self.table),
            "kept": int(kept.sum()),
            "dropped": {reason: counts[reason] for reason in REASONS if reason in counts},
            "prompts": {"in": ids.nunique(), "kept": ids[kept].nunique()},
        }
        return funnel | ({"decontamination": self.screened} if self.screened else {})


def decide(features: Features, args: SelectionArgs, seed: int = 0) -> Decisions:
    """Decide which measured samples are kept, and note the reason to drop each other one."""
    if not len(features.table):
        raise InputError("no samples to select from")
    choice = _Choice(features, args, seed)
    questions = evaluation_questions(args.decontaminate, seed)
    screened = choice.screen(questions) if questions else {}
    choice.drop_duplicates()
    if args.near_duplicates:
        choice.drop_near_duplicates(args.near_duplicates)
    if args.select != "all":
        choice.rank()
    if args.max_rows is not None:
        choice.limit_rows(args.max_rows)
    return Decisions(choice.table, screened)


class _Choice:
    """A table of samples, of which each step marks some as dropped."""

    def __init__(self, features: Features, args: SelectionArgs, seed: int) -> None:
        self.args, self.seed, self.sketch = args, seed, features.sketch
        self.table = features.table.astype({"drop": object, "detail": object})
        self.table["pass_rate"] = self.table.groupby("id")["verdict"].transform("mean")
        # The sketches are of the samples that no filter dropped.
        self.sketch_at = np.cumsum(self.table["drop"].isna().to_numpy()) - 1

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
        first, prompts = self.prompts(), self.left()["id"].nunique()
        hits = Screen(questions).screen(list(zip(first["task"], first["question"], strict=True)))
        found = {one: hit for one, hit in zip(first["id"], hits, strict=True) if hit}
        self.drop_prompts("contaminated", found)
        return {"questions": len(questions), "prompts": prompts, "prompts_dropped": len(found)}

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
        """Return a prompt's samples other than the best and those most unlike it."""
        best = self._ranked(self.table.loc[positions], "best").index[0]
        sketch = self.sketch[self.sketch_at[positions]]
        first = int(np.flatnonzero(positions == best)[0])
        return np.delete(positions, most_different(sketch, first, most))

    def _groups(self, more_than: int) -> list[np.ndarray]:
        """Return the positions of the samples left of each prompt that has more than so many."""
        left = self.left()
        positions = left.index.to_numpy()
        groups = left.groupby("id").indices.values()
        return [positions[rows] for rows in groups if len(rows) > more_than]

    def limit_rows(self, most: int) -> None:
        """Drop rows so that `most` stay, spread evenly over the tasks, those of a task by lot."""
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
