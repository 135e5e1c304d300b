"""Read scored samples that a stage left, and select those to train on.

First the filters apply, then a prompt's samples are compared, then quotas. Every sample that goes
in comes out once: kept, or dropped with its reason in the column `drop` and what was measured in
`drop_detail`.

Samples in files are read in parts, several times, and never held: what one sample says is judged
part by part, then each prompt's samples are brought together from where they are, and at last the
parts are read again and marked. Processes share the parts; the first one holds about 70 bytes a
sample, and decides what concerns all prompts.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import multiprocessing
import os
import pickle
import signal
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from chainforge.core.config import check_ranges
from chainforge.core.errors import Failed, InputError
from chainforge.core.jsonl import Row, line_of, row_of
from chainforge.core.process import end_with
from chainforge.data.decontaminate import Counts, Screen, add, evaluation_questions
from chainforge.data.filters import FilterArgs, Finding, Run, SelectionArgs, fault, shingles
from chainforge.data.rows import FoundRows, lines_of, parse, read_file
from chainforge.data.sources import same_question
from chainforge.rewards.verifier_pool import cores

POOL_FILES = ("rollouts.jsonl", "samples.jsonl")
SELECTION_COLUMNS = frozenset({"drop", "drop_detail", "pass_rate"})  # of an earlier selection
PART = 2**25  # bytes that a process reads at once; as rows they take some four times as much

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
    numbers: Counter[str] = Counter()
    pool: list[Row] = []
    for path in map(samples_file, paths):
        for row in read_file(path).each(_checked):
            pool.append(row | {"sample": numbers[row["id"]], "pooled_from": path.parent.name})
            numbers[row["id"]] += 1
    if not pool:
        raise InputError(f"pool: {', '.join(map(str, paths))}: no samples in it")
    return pool


def samples_file(path: str | Path) -> Path:
    """Return a file of samples, or that of a stage's directory; raise `InputError` for others."""
    for file in (Path(path), *(Path(path, name) for name in POOL_FILES)):
        if file.is_file():
            return file
    raise InputError(
        f"{path}: no samples: expected a .jsonl file, or the directory of a stage with "
        f"{' or '.join(POOL_FILES)}"
    )


def _checked(row: Row) -> Row:
    """Return a sample that others wrote, without marks; raise `InputError` for what is none."""
    try:
        msgspec.convert(row, _Sample)
    except msgspec.ValidationError as error:
        raise InputError(str(error)) from None
    return _unmarked(row)


def _unmarked(row: Row) -> Row:
    """Drop the marks of an earlier selection."""
    for column in SELECTION_COLUMNS:
        row.pop(column, None)
    return row


Faults = list[tuple[int, str]]  # of bad lines: where one begins in its file, and why it is bad


class Pool:
    """Samples in files, of which each process reads parts of whole lines.

    Those that other stages wrote are checked; a stage's `own` are not.
    """

    def __init__(self, paths: Sequence[str | Path], *, own: bool = False) -> None:
        self.files, self.own = list(map(samples_file, paths)), own
        sizes = enumerate(file.stat().st_size for file in self.files)
        starts = [(file, at) for file, size in sizes for at in range(0, size or 1, PART)]
        self.parts = [(file, at, at + PART) for file, at in starts]
        self.processes = min(cores(), len(self.parts) // 2)
        self.stages: dict[str, int] = {}  # rows by stage, once they are read

    @classmethod
    def of(cls, rows: Sequence[Row], folder: Path) -> Pool:
        """Write a stage's own samples to a folder, so that they are read in parts."""
        if not rows:
            raise InputError("no samples to select from")
        with open(folder / "own.jsonl", "wb") as file:
            file.writelines(map(line_of, rows))
        return cls([folder / "own.jsonl"], own=True)

    def read(self, part: int, faults: Faults) -> Iterator[tuple[int, int, Row]]:
        """Yield a part's rows, each with its first byte and its length; add the bad lines."""
        file, begin, end = self.parts[part]
        for start, line in lines_of(self.files[file], begin, end):
            if line.strip():
                try:
                    yield start, len(line), row_of(line) if self.own else _checked(parse(line))
                except InputError as error:
                    faults.append((start, str(error)))

    def fetch(self, samples: np.ndarray) -> Iterator[Row]:
        """Yield good rows again, without old marks."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(file, "rb")).fileno() for file in self.files]
            for part, start, length, *_ in samples.tolist():
                yield _unmarked(row_of(os.pread(files[self.parts[part][0]], length, start)))

    def settle(self, counts: Sequence[int], faults: Sequence[Faults]) -> None:
        """Write down the bad lines of all parts, given the number of good rows of each.

        Raises `InputError` when a file has too many bad ones.
        """
        for number, file in enumerate(self.files):
            parts = [part for part, (other, *_) in enumerate(self.parts) if other == number]
            good = sum(counts[part] for part in parts)
            if bad := dict(fault for part in parts for fault in faults[part]):
                lines = enumerate(lines_of(file), start=1)
                numbered = [(line, bad[start]) for line, (start, _) in lines if start in bad]
                FoundRows(file).settle(numbered, good + len(bad))
            if good:
                self.stages[file.parent.name] = good + self.stages.get(file.parent.name, 0)
        if not self.stages:
            raise InputError(f"pool: {', '.join(map(str, self.files))}: no samples in it")


def select(
    rows: Sequence[Row], args: SelectionArgs, filters: FilterArgs | None = None, seed: int = 0
) -> tuple[list[Row], dict[str, Any]]:
    """Return scored samples, each with `pass_rate`, `drop` and, if dropped, `drop_detail`.

    Also returns the funnel, which counts samples and prompts: `in` is `kept` and all that was
    dropped, by reason. `drop` is None for a sample that is kept.
    """
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool.of(rows, Path(folder))
        selection = Selection(pool, args, filters, seed, Path(folder))
        with shared(selection, 1) as each:
            funnel, marks = selection.decide(each)
            return [row for part in each("marked", marks) for row in part], funnel


Each = Callable[[str, Iterable[Any]], Iterator[Any]]


@contextlib.contextmanager
def shared(work: Any, processes: int) -> Iterator[Each]:
    """Yield `each(method, tasks)`: what a method of `work` returns for each task, in order.

    `work` is copied to each process, once; with one process all is done in this one. Tasks start a
    few ahead of what was taken, so that results do not pile up.
    """
    if processes < 2:
        yield lambda method, tasks: map(getattr(work, method), tasks)
        return

    def each(method: str, tasks: Iterable[Any]) -> Iterator[Any]:
        begun: deque[Future[Any]] = deque()
        for task in tasks:
            begun.append(pool.submit(_do, method, task))
            if len(begun) > 2 * processes:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()

    # Not fork: this process may have threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _adopt, (work, os.getpid())) as pool:
        try:
            yield each
        except BrokenProcessPool:
            raise Failed("a working process was killed, perhaps for lack of memory") from None
        finally:
            pool.shutdown(cancel_futures=True)


_work: Any = None  # in a working process: the copy of what is shared


def _adopt(work: Any, parent: int) -> None:
    global _work
    _work = work
    gc.disable()  # rows never form cycles
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's affair
    end_with(parent)


def _do(method: str, task: Any) -> Any:
    return getattr(_work, method)(task)


# What the first process holds of a sample.
_SAMPLE = np.dtype(
    [
        ("part", np.int32), ("start", np.int64), ("length", np.int32),  # where it is, in bytes
        ("prompt", np.uint64),  # the same number for all samples of a prompt
        ("verdict", np.int8),  # 1 or 0: right or wrong, as the pass rate counts it; else -1
        ("code", np.int32),  # 0 if it is kept, -1 if a filter dropped it, else a finding's
        ("number", np.int32), ("rate", np.float64),  # within its prompt, and its prompt's
        ("lot", np.uint64), ("task", np.int32),  # for the quota
    ]
)  # fmt: skip


class Compared(NamedTuple):
    """What was found out about some prompts.

    Of samples: `drops` and, if there is a quota, `lots` and `tasks`. Of prompts: `asked`, a number
    that equal ones share or 0, and whether they are `suspects` of an evaluation's question.
    """

    drops: list[Finding | None]
    lots: np.ndarray
    tasks: list[Any]
    asked: np.ndarray
    suspects: list[bool]
    counts: Counts


# A part, its samples of `_SAMPLE`, and what their codes mean.
Marks = tuple[int, np.ndarray, dict[int, Finding]]


class Selection:
    """Decides which samples of a pool are kept.

    Every process has a copy; what one finds and another needs is in `folder`.
    """

    def __init__(
        self,
        pool: Pool,
        args: SelectionArgs,
        filters: FilterArgs | None,
        seed: int,
        folder: Path,
    ) -> None:
        for given in filter(None, (args, filters)):
            check_ranges(given)
        self.pool, self.args, self.filters, self.seed = pool, args, filters, seed
        self.folder = folder
        self.exam = evaluation_questions(args.decontaminate, seed) if args.decontaminate else []
        self.screen = Screen(self.exam) if args.decontaminate else None
        self.codes: dict[Finding, int] = {}  # of the first process

    def store(self, name: str, value: Any) -> None:
        """Keep what another process may need."""
        (self.folder / name).write_bytes(pickle.dumps(value))

    def stored(self, name: str) -> Any:
        """Return what was kept."""
        return pickle.loads((self.folder / name).read_bytes())

    rules = cached_property(lambda self: self.stored("rules"))

    # What any process does with a part, or with some prompts.

    def judge(self, part: int) -> tuple[np.ndarray, Counter[str], Faults]:
        """Find what is wrong with single samples of a part; also return its bad lines."""
        found: dict[int, Finding] = {}
        samples: list[tuple[Any, ...]] = []
        faults: Faults = []
        for start, length, row in self.pool.read(part, faults):
            if why := fault(row, self.args, self.filters):
                found[len(samples)] = why
            told = (_number(str(row["id"])), _first_verdict(row), -1 if why else 0)
            samples.append((part, start, length, *told, 0, 0.0, 0, 0))
        self.store(f"found-{part}", found)
        reasons = Counter(reason for reason, _ in found.values())
        return np.array(samples, _SAMPLE), reasons, faults

    def compare(self, samples: np.ndarray) -> Compared:
        """Compare the samples of each of some prompts, which are side by side."""
        rows = list(self.pool.fetch(samples))
        drops: dict[int, Finding] = {}
        lots = np.zeros(len(rows), np.uint64)
        begins = _begins(samples["prompt"])
        for begin, end in pairwise([*begins.tolist(), len(rows)]):
            left = list(range(begin, end))
            for step in (_duplicates, _near_duplicates, _not_selected):
                drops.update(list(step(rows, left, self.args, self.seed)))
                left = [position for position in left if position not in drops]
            for position in left if self.args.max_rows is not None else ():
                lots[position] = _lot(rows[position], self.seed, "quota")
        tasks = [row.get("task", "") for row in rows if self.args.max_rows is not None]
        first = [(rows[at].get("task", ""), _asked(rows[at])) for at in begins]
        counts, suspects = self.screen.count(first) if self.screen else ({}, [])
        asked = np.array([(text_key(text) or 1) if text else 0 for _, text in first], np.uint64)
        return Compared([*map(drops.get, range(len(rows)))], lots, tasks, asked, suspects, counts)

    def search(self, samples: np.ndarray) -> list[str | None]:
        """Return the evaluation's question that each prompt contains, by its first sample."""
        assert self.screen is not None
        return [self.screen.hit(_asked(row), self.rules) for row in self.pool.fetch(samples)]

    def marked(self, marks: Marks) -> Iterator[Row]:
        """Yield the samples of a part, marked with findings and pass rates.

        Those that other stages wrote get new numbers, and the names of their stages.
        """
        part, samples, told = marks
        found = self.stored(f"found-{part}")
        stage = self.pool.files[self.pool.parts[part][0]].parent.name
        columns = (samples[name].tolist() for name in ("code", "number", "rate"))
        rows = zip(self.pool.fetch(samples), *columns, strict=True)
        for at, (row, code, number, rate) in enumerate(rows):
            reason, detail = found.get(at) or told.get(code, (None, None))
            row |= {} if self.pool.own else {"sample": number, "pooled_from": stage}
            row |= {"pass_rate": None if rate != rate else rate, "drop": reason}
            row |= {"drop_detail": detail} if reason else {}
            yield row

    # What the first process does.

    def decide(self, each: Each) -> tuple[dict[str, Any], Iterator[Marks]]:
        """Return the funnel, and how to mark each part."""
        judged = each("judge", range(len(self.pool.parts)))
        parts, every, faults = zip(*judged, strict=True)
        self.pool.settle([*map(len, parts)], faults)
        samples = np.concatenate(parts)
        del parts  # as large as all of them
        _number_and_rate(samples)
        report = self._settle(samples, each)
        reasons: Counter[str] = sum(every, Counter())
        times = np.bincount(samples["code"] + 1, minlength=len(self.codes) + 2)
        for (reason, _), code in self.codes.items():
            reasons[reason] += int(times[code + 1])
        kept = np.unique(samples["prompt"][samples["code"] == 0])
        funnel = {
            "in": len(samples),
            "kept": int(times[1]),
            "dropped": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
            "prompts": {"in": int((samples["number"] == 0).sum()), "kept": len(kept)},
        }
        return funnel | report, self._marks(samples)

    def _settle(self, samples: np.ndarray, each: Each) -> dict[str, Any]:
        """Have all prompts compared, and decide what concerns several; return counts of it."""
        left = np.flatnonzero(samples["code"] == 0)
        # Prompt by prompt, in the order of their first samples that are left.
        order = left[np.argsort(_ranks(samples["prompt"][left])[0], kind="stable")]
        begins = _begins(samples["prompt"][order])
        batches = list(_batches(samples["length"][order], begins))
        asked: list[np.ndarray] = [np.zeros(0, np.uint64)]
        suspects: list[bool] = []
        counts: Counts = {}
        tasks: dict[Any, int] = {}
        compared = each("compare", (samples[order[batch]] for batch in batches))
        for batch, one in zip(batches, compared, strict=True):
            some = order[batch]
            samples["code"][some] = [self.code_of(why) if why else 0 for why in one.drops]
            samples["lot"][some] = one.lots
            samples["task"][some] = [tasks.setdefault(name, len(tasks)) for name in one.tasks] or 0
            asked.append(one.asked)
            suspects += one.suspects
            add(counts, one.counts)
        first = samples[order[begins]]
        codes = np.zeros(len(first), np.int32)  # of prompts
        report: dict[str, Any] = {}
        if self.screen:
            self.store("rules", self.screen.rules(counts))
            places = np.flatnonzero(suspects)
            chunks = np.split(first[places], range(1000, len(places), 1000))
            hits = (hit for found in each("search", chunks) for hit in found)
            for place, hit in zip(places.tolist(), hits, strict=True):
                codes[place] = self.code_of(("contaminated", hit)) if hit else 0
            report = {"questions": len(self.exam), "prompts": len(codes)}
            report = {"decontamination": report | {"prompts_dropped": int((codes > 0).sum())}}
        self._duplicate_prompts(first, np.concatenate(asked), codes)
        several = np.repeat(codes, np.diff(begins, append=len(order)))
        samples["code"][order[several > 0]] = several[several > 0]
        if (most := self.args.max_rows) is not None:
            over = self.code_of(("over_quota", f"max_rows: {most}"))
            samples["code"][_over_quota(samples, most)] = over
        return report

    def _duplicate_prompts(self, first: np.ndarray, asked: np.ndarray, codes: np.ndarray) -> None:
        """Mark the prompts that were asked before; those that are marked already do not count."""
        places = np.flatnonzero((codes == 0) & (asked > 0))
        which, firsts = _ranks(asked[places])
        several = np.flatnonzero(np.bincount(which) > 1)
        named = np.zeros(len(firsts), np.int32)
        for owner, row in zip(several, self.pool.fetch(first[places[firsts[several]]])):
            named[owner] = self.code_of(("duplicate_prompt", f"asks the same as {row['id']}"))
        again = firsts[which] != np.arange(len(places))
        codes[places[again]] = named[which[again]]

    def code_of(self, finding: Finding) -> int:
        """Return the number that stands for a finding."""
        return self.codes.setdefault(finding, len(self.codes) + 1)

    def _marks(self, samples: np.ndarray) -> Iterator[Marks]:
        meaning = {code: finding for finding, code in self.codes.items()}
        edges = np.searchsorted(samples["part"], np.arange(len(self.pool.parts) + 1))
        for part, (begin, end) in enumerate(pairwise(edges)):
            some = samples[begin:end]
            codes = set(some["code"].tolist()) - {0, -1}
            yield part, some, {code: meaning[code] for code in codes}


def _begins(keys: np.ndarray) -> np.ndarray:
    """Return where each run of equal numbers begins."""
    return np.flatnonzero(np.diff(keys, prepend=~keys[:1]) != 0)


def _ranks(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each key among the distinct ones as they first occur, and where."""
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    firsts = np.sort(first)
    return np.searchsorted(firsts, first)[which], firsts


def _number_and_rate(samples: np.ndarray) -> None:
    """Number the samples of each prompt, and work out its pass rate; NaN where none counts."""
    _, prompts = np.unique(samples["prompt"], return_inverse=True)
    sizes = np.bincount(prompts)
    by_prompt = np.argsort(prompts, kind="stable")
    samples["number"][by_prompt] = np.arange(len(samples)) - np.repeat(
        np.cumsum(sizes) - sizes, sizes
    )
    right, counted = (
        np.bincount(prompts[some], minlength=len(sizes))
        for some in (samples["verdict"] > 0, samples["verdict"] >= 0)
    )
    with np.errstate(invalid="ignore"):
        samples["rate"] = (right / counted)[prompts]


def _batches(lengths: np.ndarray, begins: np.ndarray) -> Iterator[slice]:
    """Yield the samples of so many prompts as make a part."""
    sizes = np.cumsum(lengths, dtype=np.int64)[begins] // PART
    cuts = begins[np.flatnonzero(np.diff(sizes, prepend=-1))]
    for low, high in pairwise([*cuts.tolist(), len(lengths)]):
        yield slice(low, high)


def _over_quota(samples: np.ndarray, most: int) -> np.ndarray:
    """Return the samples beyond `most`, which are spread evenly over the tasks.

    Which of a task is drawn by lot. What a small task leaves of its share goes to the others.
    """
    left = np.flatnonzero(samples["code"] == 0)
    which, _ = _ranks(samples["task"][left])
    by_lot = left[np.lexsort((samples["lot"][left], which))]
    tasks = sorted(np.split(by_lot, np.cumsum(np.bincount(which))[:-1]), key=len)
    over = []
    for number, positions in enumerate(tasks):
        share = min(len(positions), most // (len(tasks) - number))
        most -= share
        over.append(positions[share:])
    return np.concatenate(over)


def _first_verdict(row: Row) -> int:
    """Return 1 or 0 for a right or wrong sample that its prompt's pass rate counts, else -1."""
    counts = row.get("correct") is not None and not row.get("round")
    return int(bool(row["correct"])) if counts else -1


def _asked(row: Row) -> str:
    """Return the text of a prompt's user turns; an empty text where there is no prompt."""
    turns = row.get("prompt") or ()
    return "\n".join(turn["content"] for turn in turns if turn.get("role") == "user")


Drops = Iterator[tuple[int, Finding]]


def _duplicates(rows: Sequence[Row], positions: Sequence[int], *_: Any) -> Drops:
    """Yield the repeated completions of a prompt."""
    seen: set[int] = set()
    for position in positions:
        key = text_key(rows[position]["completion"])
        if key in seen:
            yield position, ("duplicate", "the same text as another sample of the prompt")
        seen.add(key)


def _near_duplicates(
    rows: Sequence[Row], positions: Sequence[int], args: SelectionArgs, *_: Any
) -> Drops:
    """Yield completions that nearly repeat an earlier, kept completion of the prompt."""
    kept: list[frozenset[Run]] = []
    if not args.near_duplicates:
        return
    for position in positions:
        said = shingles(rows[position]["completion"])
        nearest = max((similarity(said, other) for other in kept), default=0.0)
        if kept and nearest >= args.near_duplicates:
            yield position, ("near_duplicate", f"about {nearest:.0%} as another sample")
        else:
            kept.append(said)


def _not_selected(
    rows: Sequence[Row], positions: Sequence[int], args: SelectionArgs, seed: int
) -> Drops:
    """Yield what is beyond the best `max_per_prompt` samples of a prompt.

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
    if args.select == "all" or len(positions) <= most:
        return
    ranked = sorted(positions, key=place)
    kept = ranked[:most]
    if args.select == "diverse":
        kept = most_different({one: shingles(rows[one]["completion"]) for one in ranked}, most)
    for position in set(positions) - set(kept):
        yield position, ("not_selected", f"{args.select}, {most} kept")


def _lot(row: Row, seed: int, purpose: str) -> int:
    """Draw a random number for a sample, which depends on its content alone."""
    key = text_key(row["completion"]) >> 1
    return text_key(f"{seed}/{purpose}/{row['id']}/{key}")


def pass_rates(rows: Iterable[Row]) -> dict[str, float]:
    """Return the share of right samples by prompt; rows without a verdict are left out.

    Sampling that stops at a success has too large a share of successes. Where samples came in
    rounds (column `round`) only the first round counts, which every prompt got completely.
    """
    right: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        if (verdict := _first_verdict(row)) >= 0:
            right[row["id"]].append(verdict)
    return {identity: sum(of) / len(of) for identity, of in right.items()}


@lru_cache(maxsize=64)  # a sample asks up to three times
def text_key(text: str) -> int:
    """Return a number that equal texts share; case and white space do not count."""
    return _number(same_question(text))


def _number(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def similarity(one: frozenset[Run], other: frozenset[Run]) -> float:
    """Return the share of runs that two texts have in common (Jaccard's)."""
    both = len(one & other)
    return both / (len(one) + len(other) - both) if one or other else 1.0


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


# Drop reasons of whole transcripts: what a pair rejects differs in the answer, not in the form.
_WHOLE = (None, "wrong", "below_min_reward", "not_selected", "over_quota")


def match_pairs(marked: Iterable[Row], most: int) -> list[tuple[Row, Row]]:
    """Return up to `most` pairs of each prompt: a kept sample, the best first, and a worse one.

    Worse is wrong against right, or of less reward where there are no verdicts. Of the worse ones
    the nearest in length is taken, so that length tells nothing. No sample is in two pairs.
    """
    pairs, prompts = [], defaultdict(list)
    for row in marked:
        if row["drop"] in _WHOLE:
            prompts[row["id"]].append(row)
    for rows in prompts.values():
        kept = [row for row in rows if row["drop"] is None and row.get("correct") is not False]
        left = {id(row): row for row in rows}
        for row in sorted(kept, key=lambda row: -(row.get("reward") or 0.0))[:most]:
            size, worse = len(row["completion"]), [one for one in left.values() if _worse(one, row)]
            if id(row) in left and worse:
                near = min(worse, key=lambda one: abs(len(one["completion"]) - size))
                del left[id(row)], left[id(near)]
                pairs.append((row, near))
    return pairs


def _worse(row: Row, than: Row) -> bool:
    if than.get("correct"):
        return row.get("correct") is False
    less, more = row.get("reward"), than.get("reward")
    return less is not None and more is not None and bool(less < more)
