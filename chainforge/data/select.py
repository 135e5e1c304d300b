"""Select scored samples to train on: filters, then a prompt's samples, then quotas.

Every sample that goes in comes out once: kept, or dropped with its reason in the column `drop` and
what was measured in `drop_detail`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.data import filters
from chainforge.data.decontaminate import Screen, evaluation_questions
from chainforge.data.dedup import Run, most_different, near_duplicates, shingles, text_key
from chainforge.data.filters import FilterArgs, Finding, SelectionArgs, fault, parts

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


def decide(
    rows: Sequence[Row], args: SelectionArgs, texts: FilterArgs | None = None, seed: int = 0
) -> Decisions:
    """Decide which scored samples are kept, and note the reason to drop each other one."""
    args.check()
    if texts is not None:
        texts.check()
    if not rows:
        raise InputError("no samples to select from")
    choice = _Choice(rows, args, texts, seed)
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


def _features(row: Row, finding: Finding | None) -> Row:
    """Return what selection must know of a sample; a finding is the first reason to drop it."""
    reward, count, correct = row.get("reward"), row.get("tokens"), row.get("correct")
    turns = row.get("prompt") or ()
    asked = "\n".join(turn["content"] for turn in turns if turn.get("role") == "user")
    reason, detail = finding or (None, None)
    return {
        "id": row["id"],
        "task": _encodable(str(row.get("task", ""))),
        "question": _encodable(asked),
        # Later rounds go to prompts that lacked successes: counted in, they would bias the rate.
        "verdict": float("nan") if correct is None or row.get("round") else float(correct),
        "reward": float("-inf") if reward is None else float(reward),
        "length": len(row["completion"]) if count is None else int(count),
        "key": 0 if finding else text_key(row["completion"]) >> 1,  # signed, as pandas wants it
        "drop": reason,
        "detail": detail and _encodable(detail),
    }


def _encodable(text: str) -> str:
    """Return a text without lone surrogates, which Arrow cannot hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class _Choice:
    """A table of samples, of which each step marks some as dropped."""

    def __init__(
        self, rows: Sequence[Row], args: SelectionArgs, texts: FilterArgs | None, seed: int
    ) -> None:
        import pandas as pd

        self.rows, self.args, self.seed = rows, args, seed
        self.table = pd.DataFrame([_features(row, fault(row, args, texts)) for row in rows])
        self.table = self.table.astype({"drop": object, "detail": object})
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
            found = near_duplicates(self._shingles(positions), threshold)
            for place, alike in found.items():
                details[positions[place]] = f"about {alike:.0%} as another sample"
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

    def _alike(self, positions: list[int], most: int) -> list[int]:
        """Return a prompt's samples other than the best and those most unlike it."""
        best = self._ranked(self.table.loc[positions], "best").index[0]
        chosen = most_different(self._shingles(positions), positions.index(best), most)
        return [position for place, position in enumerate(positions) if place not in chosen]

    def _groups(self, more_than: int) -> list[list[int]]:
        """Return the positions of the samples left of each prompt that has more than so many."""
        groups = self.left().groupby("id").groups.values()
        return [list(positions) for positions in groups if len(positions) > more_than]

    def _shingles(self, positions: list[int]) -> list[frozenset[Run]]:
        said = (parts(self.rows[position]["completion"]) for position in positions)
        return [shingles(f"{one.reasoning}\n{one.answer}") for one in said]

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
