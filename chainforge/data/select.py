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
import threading
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

from chainforge.core.errors import Failed, InputError
from chainforge.core.jsonl import Row
from chainforge.data.decontaminate import Counts, Screen, add, evaluation_questions
from chainforge.data.filters import FilterArgs, Finding, Run, SelectionArgs, fault, shingles
from chainforge.data.rows import FoundRows, lines_of, parse, read_file
from chainforge.data.sources import same_question
from chainforge.rewards.verifier_pool import cores

POOL_FILES = ("rollouts.jsonl", "samples.jsonl")
SELECTION_COLUMNS = frozenset({"drop", "drop_detail", "pass_rate"})  # of an earlier selection
PART = 2**25  # bytes that a process reads at once; as rows they take some four times as much
PART_ROWS = 20_000  # the same of rows in memory

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
    for column in SELECTION_COLUMNS:
        row.pop(column, None)
    return row


Where = tuple[Sequence[int], Sequence[int], Sequence[int]]  # parts, starts and lengths of rows
Drops = Iterator[tuple[int, Finding]]


class Part(NamedTuple):
    """The good rows of a part, where each begins and its length; its bad lines, and all lines."""

    rows: list[Row]
    starts: Sequence[int]
    lengths: Sequence[int]
    faults: Sequence[tuple[int, str]] = ()
    lines: int = 0


class Rows:
    """Samples in memory, as a `Pool` has them."""

    processes = 1

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.parts = range(0, len(rows), PART_ROWS)
        if not rows:
            raise InputError("no samples to select from")

    def read(self, part: int) -> Part:
        """Return the rows of a part."""
        start = self.parts[part]
        rows = list(self.rows[start : start + PART_ROWS])
        return Part(rows, range(start, start + len(rows)), [PART // PART_ROWS] * len(rows))

    def fetch(self, where: Where) -> list[Row]:
        """Return single rows."""
        return [self.rows[start] for start in where[1]]

    def settle(self, parts: Sequence[Judged]) -> None:
        """Do nothing: there are no bad lines."""

    def marked(self, row: Row, part: int, number: int, marks: Row) -> Row:
        """Return a row with its marks."""
        return row | marks


class Pool:
    """Samples in the files of stages, of which each process reads parts of whole lines."""

    def __init__(self, paths: Sequence[str]) -> None:
        if not paths:
            raise InputError("pool: name the samples, as --pool runs/quickstart/rejection")
        self.files = list(map(_file, paths))
        self.names = [file.parent.name for file in self.files]
        sizes = enumerate(file.stat().st_size for file in self.files)
        starts = [(file, at) for file, size in sizes for at in range(0, size or 1, PART)]
        self.parts = [(file, at, at + PART) for file, at in starts]
        self.processes = min(cores(), len(self.parts) // 2)
        self.stages: dict[str, int] = {}  # rows by stage, once they are read

    def read(self, part: int) -> Part:
        """Read the rows of a part; bad lines are counted from its beginning."""
        rows, starts, lengths, faults, number = [], [], [], [], 0
        file, begin, end = self.parts[part]
        lines = lines_of(self.files[file], begin, end)
        for number, (start, line) in enumerate(lines, start=1):
            if line.strip():
                try:
                    rows.append(_checked(parse(line)))
                except InputError as error:
                    faults.append((number, str(error)))
                    continue
                starts.append(start)
                lengths.append(len(line))
        return Part(rows, starts, lengths, faults, number)

    def fetch(self, where: Where) -> list[Row]:
        """Read single rows again."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(file, "rb")).fileno() for file in self.files]
            at = ((files[self.parts[part][0]], n, start) for part, start, n in zip(*where))
            return [parse(os.pread(*one)) for one in at]

    def settle(self, parts: Sequence[Judged]) -> None:
        """Write down the bad lines of all parts; raise `InputError` when a file has too many."""
        for number, file in enumerate(self.files):
            faults, good, lines = [], 0, 0
            for (other, *_), part in zip(self.parts, parts, strict=True):
                if other == number:
                    faults += [(lines + line, why) for line, why in part.faults]
                    good += len(part.columns["id"])
                    lines += part.lines
            if faults:
                FoundRows(file).settle(faults, good + len(faults))
            if good:
                self.stages[file.parent.name] = good + self.stages.get(file.parent.name, 0)
        if not self.stages:
            raise InputError(f"pool: {', '.join(map(str, self.files))}: no samples in it")

    def marked(self, row: Row, part: int, number: int, marks: Row) -> Row:
        """Give a row its marks, its number in its prompt, and the name of its stage."""
        row |= {"sample": number, "pooled_from": self.names[self.parts[part][0]]}
        row |= marks
        return row


def select(
    rows: Sequence[Row], args: SelectionArgs, filters: FilterArgs | None = None, seed: int = 0
) -> tuple[list[Row], dict[str, Any]]:
    """Return scored samples, each with `pass_rate`, `drop` and, if dropped, `drop_detail`.

    Also returns the funnel, which counts samples and prompts: `in` is `kept` and all that was
    dropped, by reason. `drop` is None for a sample that is kept.
    """
    with tempfile.TemporaryDirectory() as folder:
        selection = Selection(Rows(rows), args, filters, seed, Path(folder))
        with shared(selection, 1) as each:
            funnel, marks = selection.decide(each)
            return [row for part in each("marked", marks) for row in part], funnel


Each = Callable[[str, Iterable[Sequence[Any]]], Iterator[Any]]


@contextlib.contextmanager
def shared(work: Any, processes: int) -> Iterator[Each]:
    """Yield `each(method, tasks)`: what a method of `work` returns for each task, in order.

    A task is the method's arguments. `work` is copied to each process, once; with one process all
    is done in this one. Tasks start a few ahead of what was taken, so that results do not pile up.
    """
    if processes < 2:
        yield lambda method, tasks: (getattr(work, method)(*task) for task in tasks)
        return

    def each(method: str, tasks: Iterable[Sequence[Any]]) -> Iterator[Any]:
        begun: deque[Future[Any]] = deque()
        for task in tasks:
            begun.append(pool.submit(_do, method, task))
            if len(begun) > 2 * processes:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()

    # Not fork: this process may have threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _adopt, (work,)) as pool:
        try:
            yield each
        except BrokenProcessPool:
            raise Failed("a working process was killed, perhaps for lack of memory") from None
        finally:
            pool.shutdown(cancel_futures=True)


_work: Any = None  # in a working process: the copy of what is shared


def _adopt(work: Any) -> None:
    global _work
    _work = work
    gc.disable()  # rows never form cycles
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's affair
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    """End with the first process, even if it was killed."""
    if first := multiprocessing.parent_process():
        first.join()
    os._exit(1)


def _do(method: str, task: Sequence[Any]) -> Any:
    return getattr(_work, method)(*task)


class Judged(NamedTuple):
    """What was found out about a part's samples one by one, as columns, and its bad lines."""

    columns: dict[str, np.ndarray]
    reasons: Counter[str]
    faults: Sequence[tuple[int, str]]
    lines: int


class Compared(NamedTuple):
    """What was found out about some prompts.

    Of samples: `codes` (0, or 1 + the place in `findings`) and if there is a quota `lots` and
    `tasks` (the place in `names`). Of prompts: `asked`, a number that equal ones share or 0, and
    whether they are `suspects` of an evaluation's question.
    """

    codes: np.ndarray
    findings: list[Finding]
    lots: np.ndarray
    tasks: np.ndarray
    names: list[Any]
    asked: np.ndarray
    suspects: list[bool]
    counts: Counts


class Selection:
    """Decides which samples of a pool are kept.

    Every process has a copy; what one finds and another needs is in `folder`.
    """

    def __init__(
        self,
        pool: Rows | Pool,
        args: SelectionArgs,
        filters: FilterArgs | None,
        seed: int,
        folder: Path,
    ) -> None:
        args.check()
        if filters is not None:
            filters.check()
        self.pool, self.args, self.filters, self.seed = pool, args, filters, seed
        self.folder = folder
        self.exam = evaluation_questions(args.decontaminate, seed) if args.decontaminate else []
        self.screen = Screen(self.exam) if args.decontaminate else None

    def store(self, name: str, value: Any) -> None:
        """Keep what another process may need."""
        (self.folder / name).write_bytes(pickle.dumps(value))

    def stored(self, name: str) -> Any:
        """Return what was kept."""
        return pickle.loads((self.folder / name).read_bytes())

    rules = cached_property(lambda self: self.stored("rules"))

    # What any process does with a part, or with some prompts.

    def judge(self, part: int) -> Judged:
        """Find what is wrong with single samples of a part."""
        read = self.pool.read(part)
        whys = ((at, fault(row, self.args, self.filters)) for at, row in enumerate(read.rows))
        found = {at: why for at, why in whys if why}
        self.store(f"found-{part}", found)
        left = np.ones(len(read.rows), bool)
        left[list(found)] = False
        columns: dict[str, np.ndarray] = {
            "id": np.array([_number(str(row["id"])) for row in read.rows], np.uint64),
            "verdict": np.array([_first_verdict(row) for row in read.rows], np.int8),
            "left": left,
            "start": np.array(read.starts, np.int64),
            "length": np.array(read.lengths, np.int32),
        }
        reasons = Counter(reason for reason, _ in found.values())
        return Judged(columns, reasons, read.faults, read.lines)

    def compare(self, where: Where, begins: Sequence[int]) -> Compared:
        """Compare the samples of each of some prompts; `begins` is where a prompt's begin."""
        rows = self.pool.fetch(where)
        drops: dict[int, Finding] = {}
        names: dict[Any, int] = {}
        lots, tasks = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.int32)
        for begin, end in pairwise([*begins, len(rows)]):
            left = list(range(begin, end))
            for step in (_duplicates, _near_duplicates, _not_selected):
                drops.update(list(step(rows, left, self.args, self.seed)))
                left = [position for position in left if position not in drops]
            for position in left if self.args.max_rows is not None else ():
                lots[position] = _lot(rows[position], self.seed, "quota")
                name = rows[position].get("task", "")
                tasks[position] = names.setdefault(name, len(names))
        findings = {why: code for code, why in enumerate(dict.fromkeys(drops.values()), start=1)}
        codes = [findings[drops[at]] if at in drops else 0 for at in range(len(rows))]
        first = [(rows[at].get("task", ""), _asked(rows[at])) for at in begins]
        counts, suspects = self.screen.count(first) if self.screen else ({}, [])
        asked = np.array([(text_key(text) or 1) if text else 0 for _, text in first], np.uint64)
        whose = np.array(codes, np.int32)
        return Compared(whose, [*findings], lots, tasks, [*names], asked, suspects, counts)

    def search(self, where: Where) -> list[str | None]:
        """Return the evaluation's question that each prompt contains, by its first sample."""
        assert self.screen is not None
        return [self.screen.hit(_asked(row), self.rules) for row in self.pool.fetch(where)]

    def marked(
        self, part: int, codes: np.ndarray, told: Mapping[int, Finding], *columns: np.ndarray
    ) -> list[Row]:
        """Return the samples of a part, marked with findings, numbers and pass rates."""
        found, marked = self.stored(f"found-{part}"), []
        values = zip(codes.tolist(), *(column.tolist() for column in columns), strict=True)
        for at, (row, (code, number, rate)) in enumerate(zip(self.pool.read(part).rows, values)):
            reason, detail = found.get(at) or told.get(code, (None, None))
            marks = {"pass_rate": None if rate != rate else rate, "drop": reason}
            marks |= {"drop_detail": detail} if reason else {}
            marked.append(self.pool.marked(row, part, number, marks))
        return marked

    # What the first process does.

    def decide(self, each: Each) -> tuple[dict[str, Any], list[Marks]]:
        """Return the funnel, and how to mark each part."""
        judged = list(each("judge", ((part,) for part in range(len(self.pool.parts)))))
        self.pool.settle(judged)
        table = _Table(judged)
        report = self._settle(table, each)
        reasons: Counter[str] = sum((part.reasons for part in judged), Counter())
        times = np.bincount(table.code + 1, minlength=len(table.codes) + 2)
        for (reason, _), code in table.codes.items():
            reasons[reason] += int(times[code + 1])
        kept = np.unique(table.group[table.code == 0])
        funnel = {
            "in": len(table.code),
            "kept": int(times[1]),
            "dropped": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
            "prompts": {"in": len(table.rate), "kept": len(kept)},
        }
        return funnel | report, table.marks()

    def _settle(self, table: _Table, each: Each) -> dict[str, Any]:
        """Have all prompts compared, and decide what concerns several; return counts of it."""
        batches = list(table.batches())
        tasks = ((table.where(rows), begins.tolist()) for rows, begins in batches)
        asked: list[np.ndarray] = [np.zeros(0, np.uint64)]
        suspects: list[bool] = []
        counts: Counts = {}
        for (rows, _), one in zip(batches, each("compare", tasks), strict=True):
            table.note(rows, one)
            asked.append(one.asked)
            suspects += one.suspects
            add(counts, one.counts)
        codes = np.zeros(len(table.begins) - 1, np.int32)  # of prompts
        report: dict[str, Any] = {}
        if self.screen:
            self.store("rules", self.screen.rules(counts))
            places = np.flatnonzero(suspects)
            firsts = ((where,) for where in table.firsts(places))
            hits = (hit for found in each("search", firsts) for hit in found)
            for place, hit in zip(places.tolist(), hits, strict=True):
                codes[place] = table.code_of(("contaminated", hit)) if hit else 0
            report = {"questions": len(self.exam), "prompts": len(codes)}
            report = {"decontamination": report | {"prompts_dropped": int((codes > 0).sum())}}
        self._duplicate_prompts(table, np.concatenate(asked), codes)
        several = np.repeat(codes, np.diff(table.begins))
        table.code[table.order[several > 0]] = several[several > 0]
        if (most := self.args.max_rows) is not None:
            table.code[table.over_quota(most)] = table.code_of(("over_quota", f"max_rows: {most}"))
        return report

    def _duplicate_prompts(self, table: _Table, asked: np.ndarray, codes: np.ndarray) -> None:
        """Mark the prompts that were asked before; those that are marked already do not count."""
        places = np.flatnonzero((codes == 0) & (asked > 0))
        _, first, which = np.unique(asked[places], return_index=True, return_inverse=True)
        again = first[which] != np.arange(len(places))
        named = np.zeros(len(places), np.int32)
        owners = np.unique(first[which[again]])
        some = (self.pool.fetch(where) for where in table.firsts(places[owners]))
        rows = (row for fetched in some for row in fetched)
        for owner, row in zip(owners.tolist(), rows, strict=True):
            named[owner] = table.code_of(("duplicate_prompt", f"asks the same as {row['id']}"))
        codes[places[again]] = named[first[which[again]]]


# A part, codes of its samples and what they mean, numbers within their prompts, pass rates.
Marks = tuple[int, np.ndarray, dict[int, Finding], np.ndarray, np.ndarray]


class _Table:
    """What the first process holds of every sample, as columns in the order of the pool.

    `code` is 0 for a sample that is kept, -1 if a filter dropped it, else that of a finding.
    `order` are the samples that no filter dropped, prompt by prompt in the order of their first
    ones; `begins` is where each prompt begins in it, and its end.
    """

    def __init__(self, judged: Sequence[Judged]) -> None:
        self.ends = np.cumsum([len(part.columns["id"]) for part in judged])
        names = "id", "verdict", "left", "start", "length"
        ids, verdict, left, self.start, self.length = (
            np.concatenate([part.columns.pop(name) for part in judged]) for name in names
        )
        by_id = np.argsort(ids, kind="stable")
        new = np.diff(ids[by_id], prepend=~ids[by_id[:1]]) != 0
        self.group, self.number = np.empty(len(ids), np.int32), np.empty(len(ids), np.int32)
        self.group[by_id] = np.cumsum(new) - 1
        firsts = np.flatnonzero(new)
        sizes = np.diff(firsts, append=len(ids))
        self.number[by_id] = np.arange(len(ids)) - np.repeat(firsts, sizes)
        right = np.bincount(self.group[verdict > 0], minlength=len(firsts))
        with np.errstate(invalid="ignore"):
            self.rate = right / np.bincount(self.group[verdict >= 0], minlength=len(firsts))
        self.code = np.where(left, 0, -1).astype(np.int32)
        places = np.flatnonzero(left)
        _, first, which = np.unique(self.group[places], return_index=True, return_inverse=True)
        self.order = places[np.argsort(first[which], kind="stable")]
        new = np.diff(self.group[self.order], prepend=-1) != 0
        self.begins = np.append(np.flatnonzero(new), len(places))
        self.codes: dict[Finding, int] = {}
        self.lots, self.tasks = np.zeros(len(ids), np.uint64), np.zeros(len(ids), np.int32)
        self.names: dict[Any, int] = {}

    def code_of(self, finding: Finding) -> int:
        """Return the number that stands for a finding."""
        return self.codes.setdefault(finding, len(self.codes) + 1)

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the samples of so many prompts as make a part, and where each prompt begins."""
        sizes = np.cumsum(self.length[self.order], dtype=np.int64)[self.begins[:-1]] // PART
        cuts = np.flatnonzero(np.diff(sizes, prepend=-1))
        for low, high in pairwise([*cuts, len(self.begins) - 1]):
            start = self.begins[low]
            yield self.order[start : self.begins[high]], self.begins[low:high] - start

    def where(self, rows: np.ndarray) -> Where:
        """Return where samples are."""
        parts = np.searchsorted(self.ends, rows, side="right")
        return parts.tolist(), self.start[rows].tolist(), self.length[rows].tolist()

    def firsts(self, prompts: np.ndarray) -> Iterator[Where]:
        """Yield where the first samples of prompts are, some at a time."""
        for at in range(0, len(prompts), 1000):
            yield self.where(self.order[self.begins[prompts[at : at + 1000]]])

    def note(self, rows: np.ndarray, found: Compared) -> None:
        """Note what was found out about samples."""
        self.code[rows] = np.array([0, *map(self.code_of, found.findings)])[found.codes]
        self.lots[rows] = found.lots
        names = [self.names.setdefault(name, len(self.names)) for name in found.names]
        self.tasks[rows] = np.array(names or [0])[found.tasks]

    def over_quota(self, most: int) -> np.ndarray:
        """Return the samples beyond `most`, which are spread evenly over the tasks.

        Which of a task is drawn by lot. What a small task leaves of its share goes to the others.
        """
        left = np.flatnonzero(self.code == 0)
        _, first, which = np.unique(self.tasks[left], return_index=True, return_inverse=True)
        by_lot = left[np.lexsort((left, self.lots[left], first[which]))]
        sizes = np.bincount(first[which], minlength=1)[np.sort(first)]
        over = [left[:0]]
        tasks = sorted(np.split(by_lot, np.cumsum(sizes)[:-1]), key=len)
        for number, positions in enumerate(tasks):
            share = min(len(positions), most // (len(tasks) - number))
            most -= share
            over.append(positions[share:])
        return np.concatenate(over)

    def marks(self) -> list[Marks]:
        """Return how to mark each part."""
        meaning, made = {code: finding for finding, code in self.codes.items()}, []
        for part, (begin, end) in enumerate(pairwise([0, *self.ends.tolist()])):
            codes, rates = self.code[begin:end], self.rate[self.group[begin:end]]
            told = {code: meaning[code] for code in set(codes.tolist()) - {0, -1}}
            made.append((part, codes, told, self.number[begin:end], rates))
        return made


def _first_verdict(row: Row) -> int:
    """Return 1 or 0 for a right or wrong sample that its prompt's pass rate counts, else -1."""
    counts = row.get("correct") is not None and not row.get("round")
    return int(bool(row["correct"])) if counts else -1


def _asked(row: Row) -> str:
    """Return the text of a prompt's user turns; an empty text where there is no prompt."""
    turns = row.get("prompt") or ()
    return "\n".join(turn["content"] for turn in turns if turn.get("role") == "user")


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
    right: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row.get("correct") is not None and not row.get("round"):
            right[row["id"]].append(bool(row["correct"]))
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
