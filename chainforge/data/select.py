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
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.data.decontaminate import Screen, evaluation_questions
from chainforge.data.filters import FilterArgs, Finding, Run, SelectionArgs, fault, shingles
from chainforge.data.rows import read_file
from chainforge.data.sources import same_question

POOL_FILES = ("rollouts.jsonl", "samples.jsonl")
SELECTION_COLUMNS = frozenset({"drop", "drop_detail", "pass_rate"})  # of an earlier selection

# The reason of a sample is the first that applies.
_REASONS = """
    truncated chat_token empty format unverified wrong below_min_reward
    too_short too_long repetition language long_paragraph code
    contaminated duplicate_prompt duplicate near_duplicate not_selected over_quota
"""
REASONS = _REASONS.split()


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
    """Pause Python's garbage collector, a tenth of the time: rows never form reference cycles."""
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
            pool.append(row | {"sample": numbers[row["id"]], "pooled_from": path.parent.name})
            numbers[row["id"]] += 1
    if not pool:
        raise InputError(f"pool: {', '.join(map(str, paths))}: no samples in it")
    return pool


def _file(path: str) -> Path:
    for file in (Path(path), *(Path(path, name) for name in POOL_FILES)):
        if file.is_file():
            return file
    raise InputError(
        f"pool: {path}: no samples: expected a .jsonl file, or the directory of a stage with "
        f"{' or '.join(POOL_FILES)}"
    )


def _checked(row: Row) -> Row:
    """Return a sample without the marks of an earlier selection."""
    try:
        msgspec.convert(row, _Sample)
    except msgspec.ValidationError as error:
        raise InputError(str(error)) from None
    return {key: value for key, value in row.items() if key not in SELECTION_COLUMNS}


def select(
    rows: Sequence[Row], args: SelectionArgs, filters: FilterArgs | None = None, seed: int = 0
) -> tuple[list[Row], dict[str, Any]]:
    """Return scored samples, each with `pass_rate`, `drop` and, if dropped, `drop_detail`.

    Also returns the funnel, which counts samples and prompts: `in` is `kept` and all that was
    dropped, by reason. `drop` is None for a sample that is kept.
    """
    args.check()
    if filters is not None:
        filters.check()
    if not rows:
        raise InputError("no samples to select from")
    drops = {place: why for place, row in enumerate(rows) if (why := fault(row, args, filters))}
    report: dict[str, Any] = {}
    if args.decontaminate:
        questions, prompts = evaluation_questions(args.decontaminate, seed), _left(rows, drops)
        drops.update(_contaminated(rows, prompts, questions))
        dropped = sum(positions[0] in drops for positions in prompts.values())
        counts = {"questions": len(questions), "prompts": len(prompts), "prompts_dropped": dropped}
        report = {"decontamination": counts}
    drops.update(_duplicates(rows, _left(rows, drops)))
    if args.near_duplicates:
        drops.update(_near_duplicates(rows, _left(rows, drops), args.near_duplicates))
    if args.select != "all":
        drops.update(_not_selected(rows, _left(rows, drops), args, seed))
    if args.max_rows is not None:
        drops.update(_over_quota(rows, _left(rows, drops, "task"), args.max_rows, seed))
    reasons = Counter(reason for reason, _ in drops.values())
    prompts_in = len({row["id"] for row in rows})
    funnel = {
        "in": len(rows),
        "kept": len(rows) - len(drops),
        "dropped": {reason: reasons[reason] for reason in REASONS if reason in reasons},
        "prompts": {"in": prompts_in, "kept": len(_left(rows, drops))},
    }
    return _marked(rows, drops), funnel | report


Groups = dict[str, list[int]]  # positions of samples, by prompt or by task
Drops = Iterator[tuple[int, Finding]]


def _left(rows: Sequence[Row], drops: Container[int], column: str = "id") -> Groups:
    """Return the positions of the samples that are not dropped so far, by a column."""
    groups = defaultdict(list)
    for position, row in enumerate(rows):
        if position not in drops:
            groups[row.get(column, "")].append(position)
    return groups


def _marked(rows: Sequence[Row], drops: Mapping[int, Finding]) -> list[Row]:
    """Return the samples with their marks."""
    rates, marked = pass_rates(rows), []
    for position, row in enumerate(rows):
        reason, detail = drops.get(position, (None, None))
        marks = {"pass_rate": rates.get(row["id"]), "drop": reason}
        marked.append(row | marks | ({"drop_detail": detail} if reason else {}))
    return marked


def _asked(row: Row) -> str:
    """Return the text of a prompt's user turns; an empty text where there is no prompt."""
    turns = row.get("prompt") or ()
    return "\n".join(turn["content"] for turn in turns if turn.get("role") == "user")


def _contaminated(
    rows: Sequence[Row], prompts: Groups, questions: Iterable[tuple[str, str]]
) -> Drops:
    """Yield the samples of prompts that contain evaluation questions."""
    first = [rows[positions[0]] for positions in prompts.values()]
    hits = Screen(questions).screen([(row.get("task", ""), _asked(row)) for row in first])
    for positions, hit in zip(prompts.values(), hits, strict=True):
        if hit:
            yield from ((position, ("contaminated", hit)) for position in positions)


def _duplicates(rows: Sequence[Row], prompts: Groups) -> Drops:
    """Yield samples of prompts that were asked before, and repeated completions of a prompt."""
    asked_by: dict[int, str] = {}
    for prompt, positions in prompts.items():
        asked = _asked(rows[positions[0]])
        first = asked_by.setdefault(text_key(asked), prompt) if asked else prompt
        seen: set[int] = set()
        for position in positions:
            key = text_key(rows[position]["completion"])
            if first != prompt:
                yield position, ("duplicate_prompt", f"asks the same as {first}")
            elif key in seen:
                yield position, ("duplicate", "the same text as another sample of the prompt")
            seen.add(key)


def _near_duplicates(rows: Sequence[Row], prompts: Groups, threshold: float) -> Drops:
    """Yield completions that nearly repeat an earlier, kept completion of the same prompt."""
    for positions in prompts.values():
        kept: list[frozenset[Run]] = []
        for position in positions:
            said = shingles(rows[position]["completion"])
            nearest = max((similarity(said, other) for other in kept), default=0.0)
            if kept and nearest >= threshold:
                yield position, ("near_duplicate", f"about {nearest:.0%} as another sample")
            else:
                kept.append(said)


def _not_selected(rows: Sequence[Row], prompts: Groups, args: SelectionArgs, seed: int) -> Drops:
    """Yield what is beyond the best `max_per_prompt` samples of each prompt.

    Ties are broken at random: breaking them by length would prefer the shortest reasoning.
    """

    def place(position: int) -> tuple[float, int]:
        row, by = rows[position], 0.0
        if args.select == "shortest":
            by = len(row["completion"]) if row.get("tokens") is None else row["tokens"]
        elif args.select != "random":
            by = float("inf") if row.get("reward") is None else -row["reward"]
        return by, _lot(row, seed, "rank")

    most = args.max_per_prompt
    for positions in prompts.values():
        if len(positions) <= most:
            continue
        ranked = sorted(positions, key=place)
        kept = ranked[:most]
        if args.select == "diverse":
            kept = most_different({one: shingles(rows[one]["completion"]) for one in ranked}, most)
        for position in set(positions) - set(kept):
            yield position, ("not_selected", f"{args.select}, {most} kept")


def _over_quota(rows: Sequence[Row], tasks: Groups, most: int, seed: int) -> Drops:
    """Yield rows until `most` are left, spread evenly over the tasks and random within a task.

    The part of its share that a small task does not fill goes to the others.
    """
    finding = ("over_quota", f"max_rows: {most}")
    for number, positions in enumerate(sorted(tasks.values(), key=len)):
        share = min(len(positions), most // (len(tasks) - number))
        most -= share
        by_lot = sorted(positions, key=lambda position: _lot(rows[position], seed, "quota"))
        yield from ((position, finding) for position in by_lot[share:])


def _lot(row: Row, seed: int, purpose: str) -> int:
    """Draw a random number for a sample, which depends on its content alone."""
    key = text_key(row["completion"]) >> 1
    return text_key(f"{seed}/{purpose}/{row['id']}/{key}")


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


def similarity(one: frozenset[Run], other: frozenset[Run]) -> float:
    """Return the share of runs that two texts have in common (Jaccard's)."""
    return len(one & other) / len(one | other) if one or other else 1.0


def most_different(sets: Mapping[int, frozenset[Run]], count: int) -> list[int]:
    """Return `count` texts by max-min: each next one differs most from its nearest chosen one.

    The first of `sets` is chosen first; of equals the earlier one is.
    """
    left = dict.fromkeys(sets, 0.0)
    chosen = [next(iter(sets))]
    while len(chosen) < count:
        last = chosen[-1]
        del left[last]
        left = {key: max(near, similarity(sets[key], sets[last])) for key, near in left.items()}
        chosen.append(min(left, key=left.__getitem__))
    return chosen
