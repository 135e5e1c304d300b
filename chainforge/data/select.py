"""Read scored samples that a stage left, and select those to train on.

First the filters apply, then a prompt's samples are compared, then quotas. Every sample that goes
in comes out once: kept, or dropped with its reason in the column `drop` and what was measured in
`drop_detail`.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.data import filters
from chainforge.data.decontaminate import Screen, evaluation_questions
from chainforge.data.filters import (
    FilterArgs,
    Finding,
    Run,
    SelectionArgs,
    fault,
    parts,
    runs,
    tokens,
)
from chainforge.data.rows import read_file
from chainforge.data.sources import same_question

NAMES = ("rollouts.jsonl", "samples.jsonl")
MARKS = frozenset({"drop", "drop_detail", "pass_rate"})  # of an earlier selection
WORDS = 5  # in a run, as for the near duplicates of most corpora

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


class _Turn(msgspec.Struct):
    role: str
    content: str


class _Sample(msgspec.Struct):
    """What a scored sample's columns must be."""

    id: str
    prompt: list[_Turn]
    completion: str
    reward: float | None = None
    tokens: float | None = None
    correct: bool | None = None


@contextlib.contextmanager
def many_rows() -> Iterator[None]:
    """Pause Python's search for cycles, which rows never form: it takes a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@many_rows()
def read_pool(paths: Sequence[str]) -> list[Row]:
    """Return the samples of stages and files, numbered again within each prompt, without old marks.

    `pooled_from` names a row's stage. Malformed rows are left out and written to the stage's
    rejects; raises `InputError` for too many of them, and for a path without samples.
    """
    if not paths:
        raise InputError("pool: name the samples, as --pool runs/quickstart/rejection")
    numbers: Counter[str] = Counter()
    pool: list[Row] = []
    for path in map(_file, paths):
        for row in read_file(path).each(_checked):
            left = {key: value for key, value in row.items() if key not in MARKS}
            pool.append(left | {"sample": numbers[row["id"]], "pooled_from": path.parent.name})
            numbers[row["id"]] += 1
    if not pool:
        raise InputError(f"pool: {', '.join(map(str, paths))}: no samples in it")
    return pool


def _file(path: str) -> Path:
    names = [Path(path), *(Path(path, name) for name in NAMES)]
    file = next((file for file in names if file.is_file()), None)
    if file is None:
        raise InputError(
            f"pool: {path}: no samples: expected a .jsonl file, or the directory of a stage with "
            f"{' or '.join(NAMES)}"
        )
    return file


def _checked(row: Row) -> Row:
    try:
        msgspec.convert(row, _Sample)
    except msgspec.ValidationError as error:
        raise InputError(str(error)) from None
    return row


def select(
    rows: Sequence[Row], args: SelectionArgs, texts: FilterArgs | None = None, seed: int = 0
) -> tuple[list[Row], dict[str, Any]]:
    """Return scored samples, each with `pass_rate`, `drop` and, if dropped, `drop_detail`.

    Also returns the funnel, which counts samples and prompts: `in` is `kept` and all that was
    dropped, by reason. `drop` is None for a sample that is kept.
    """
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
    marked = choice.marked()
    counts = Counter(row["drop"] for row in marked)
    funnel: dict[str, Any] = {
        "in": len(rows),
        "kept": counts[None],
        "dropped": {reason: counts[reason] for reason in REASONS if reason in counts},
        "prompts": {"in": len({row["id"] for row in rows}), "kept": len(choice.left())},
    }
    return marked, funnel | ({"decontamination": screened} if screened else {})


class _Choice:
    """Samples by their position, of which each step drops some."""

    def __init__(
        self, rows: Sequence[Row], args: SelectionArgs, texts: FilterArgs | None, seed: int
    ) -> None:
        self.rows, self.args, self.seed = rows, args, seed
        self.findings = [fault(row, args, texts) for row in rows]

    def marked(self) -> list[Row]:
        """Return the samples with their marks."""
        rates, made = pass_rates(self.rows), []
        for row, finding in zip(self.rows, self.findings, strict=True):
            reason, detail = finding or (None, None)
            left = {key: value for key, value in row.items() if key != "drop_detail"}
            left |= {"pass_rate": rates.get(row["id"]), "drop": reason}
            made.append(left | ({"drop_detail": detail} if reason else {}))
        return made

    def left(self, column: str = "id") -> dict[str, list[int]]:
        """Return the positions of the samples that are not dropped so far, by prompt."""
        groups = defaultdict(list)
        for position, (row, finding) in enumerate(zip(self.rows, self.findings, strict=True)):
            if finding is None:
                groups[row.get(column, "")].append(position)
        return groups

    def drop(self, positions: Iterable[int], finding: Finding) -> None:
        for position in positions:
            self.findings[position] = finding

    def asked(self, positions: list[int]) -> str:
        """Return what the user said in a prompt; an empty text where there is no prompt."""
        turns = self.rows[positions[0]].get("prompt") or ()
        return "\n".join(turn["content"] for turn in turns if turn.get("role") == "user")

    def screen(self, questions: list[tuple[str, str]]) -> dict[str, int]:
        """Drop prompts that contain evaluation questions; return how many were checked."""
        prompts = list(self.left().values())
        asked = [(self.rows[of[0]].get("task", ""), self.asked(of)) for of in prompts]
        hits = Screen(questions).screen(asked)
        found = {place: hit for place, hit in enumerate(hits) if hit}
        for place, hit in found.items():
            self.drop(prompts[place], ("contaminated", hit))
        return {
            "questions": len(questions),
            "prompts": len(prompts),
            "prompts_dropped": len(found),
        }

    def drop_duplicates(self) -> None:
        """Drop prompts that were asked before, and completions that their prompt had before."""
        asked_by: dict[int, str] = {}
        for prompt, positions in self.left().items():
            asked = self.asked(positions)
            first = asked_by.setdefault(text_key(asked), prompt) if asked else prompt
            if first != prompt:
                self.drop(positions, ("duplicate_prompt", f"asks the same as {first}"))
                continue
            seen: set[int] = set()
            for position in positions:
                key = text_key(self.rows[position]["completion"])
                if key in seen:
                    finding = ("duplicate", "the same text as another sample of the prompt")
                    self.drop([position], finding)
                seen.add(key)

    def drop_near_duplicates(self, threshold: float) -> None:
        """Drop completions that nearly say what another one of their prompt does."""
        for positions in self.left().values():
            found = near_duplicates(self._shingles(positions), threshold)
            for place, alike in found.items():
                finding = ("near_duplicate", f"about {alike:.0%} as another sample")
                self.drop([positions[place]], finding)

    def rank(self) -> None:
        """Drop what is beyond the best `max_per_prompt` samples of each prompt."""
        most, how = self.args.max_per_prompt, self.args.select
        for positions in self.left().values():
            if len(positions) <= most:
                continue
            ranked = self._ranked(positions, "best" if how == "diverse" else how)
            kept = ranked[:most]
            if how == "diverse":
                places = most_different(self._shingles(ranked), 0, most)
                kept = [ranked[place] for place in places]
            self.drop(set(ranked) - set(kept), ("not_selected", f"{how}, {most} kept"))

    def _ranked(self, positions: list[int], how: str) -> list[int]:
        """Sort samples by what `how` prefers; equals are in random order.

        By length, the best would be those that reason least.
        """

        def place(position: int) -> tuple[float, int]:
            row, by = self.rows[position], 0.0
            if how == "best":
                by = float("inf") if row.get("reward") is None else -row["reward"]
            elif how == "shortest":
                by = len(row["completion"]) if row.get("tokens") is None else row["tokens"]
            return by, self._lot(row, "rank")

        return sorted(positions, key=place)

    def _shingles(self, positions: list[int]) -> list[frozenset[Run]]:
        said = (parts(self.rows[position]["completion"]) for position in positions)
        return [shingles(f"{one.reasoning}\n{one.answer}") for one in said]

    def limit_rows(self, most: int) -> None:
        """Drop rows so that `most` stay, spread evenly over the tasks, those of a task by lot.

        What a small task leaves of its share goes to the others.
        """
        tasks = sorted(self.left("task").values(), key=len)
        for others, positions in zip(range(len(tasks), 0, -1), tasks, strict=True):
            share = min(len(positions), most // others)
            most -= share
            by_lot = sorted(positions, key=lambda one: self._lot(self.rows[one], "quota"))
            self.drop(by_lot[share:], ("over_quota", f"max_rows: {self.args.max_rows}"))

    def _lot(self, row: Row, purpose: str) -> int:
        """Draw a random number for a sample, which depends on its content alone."""
        key = text_key(row["completion"]) >> 1
        return text_key(f"{self.seed}/{purpose}/{row['id']}/{key}") >> 1


def pass_rates(rows: Iterable[Row]) -> dict[str, float]:
    """Return the share of right samples by prompt; rows without a verdict are left out.

    Sampling that stops at a success has too large a share of successes. Where samples came in
    rounds (column `round`) only the first round counts, which every prompt got completely.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row.get("correct") is not None and not row.get("round"):
            right[row["id"]].append(bool(row["correct"]))
    return {identity: sum(of) / len(of) for identity, of in right.items()}


def text_key(text: str) -> int:
    """Return a number that equal texts share; case and white space do not count."""
    digest = hashlib.blake2b(same_question(text).encode("utf-8", "replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def shingles(text: str) -> frozenset[Run]:
    """Return the runs of five words of a text; a shorter one is one run."""
    words = tokens(text)
    return frozenset(runs(words, min(WORDS, len(words))))


def similarity(one: frozenset[Run], other: frozenset[Run]) -> float:
    """Return the share of runs that two texts have in common (Jaccard's)."""
    return len(one & other) / len(one | other) if one or other else 1.0


def near_duplicates(sets: Sequence[frozenset[Run]], threshold: float) -> dict[int, float]:
    """Map each text that is near an earlier one that stays to their similarity."""
    kept: list[frozenset[Run]] = []
    found: dict[int, float] = {}
    for number, one in enumerate(sets):
        nearest = max((similarity(one, other) for other in kept), default=0.0)
        if kept and nearest >= threshold:
            found[number] = nearest
        else:
            kept.append(one)
    return found


def most_different(sets: Sequence[frozenset[Run]], first: int, count: int) -> list[int]:
    """Return `count` texts by max-min: each next one differs most from its nearest chosen one."""
    chosen = [first]
    left = {number: 0.0 for number in range(len(sets)) if number != first}
    while left and len(chosen) < count:
        last = sets[chosen[-1]]
        left = {number: max(near, similarity(sets[number], last)) for number, near in left.items()}
        chosen.append(min(left, key=lambda number: (left[number], number)))
        del left[chosen[-1]]
    return chosen
