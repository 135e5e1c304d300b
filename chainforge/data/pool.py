"""Measure scored samples: rows in memory, or files of them, too large for memory.

Of a million rows only what selection must know is held in memory (`Features`); the rows themselves
are read once to measure them, on all cores, and once more to write them. A GRPO stage leaves its
samples in `rollouts.jsonl`, a collect or reject stage in `samples.jsonl`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, many_rows
from chainforge.data.dedup import Hashes, Sketches, shingles, sketches, text_key, token_hashes
from chainforge.data.filters import FilterArgs, Finding, SelectionArgs, fault, parts
from chainforge.data.rows import Fault, read_lines, settle

if TYPE_CHECKING:
    import pandas as pd

NAMES = ("rollouts.jsonl", "samples.jsonl")
MARKS = frozenset({"drop", "drop_detail", "pass_rate"})
PART = 8 * 2**20  # bytes that a worker reads at a time
ALONE = 64 * 2**20  # files smaller than this are not worth starting processes for
COLUMNS = ("id", "task", "question", "verdict", "reward", "length", "key", "drop", "detail")


@dataclass
class Features:
    """What selection must know of samples: a row of `COLUMNS` each, in their order.

    `verdict` is None for unverified samples and for those of later rounds. `sketch` has one row
    for each sample without a finding, or none at all.
    """

    table: pd.DataFrame
    sketch: Sketches


def measure(rows: Iterable[Row], args: SelectionArgs, texts: FilterArgs | None = None) -> Features:
    """Return the features of samples; a finding is the first reason to drop one.

    Texts are sketched only when near duplicates or diversity are asked for.
    """
    import pandas as pd

    args.check()
    if texts is not None:
        texts.check()
    sketched = bool(args.near_duplicates) or args.select == "diverse"
    made: list[tuple[Any, ...]] = []
    sets: list[Hashes] = []
    for row in rows:
        finding = fault(row, args, texts)
        if sketched and finding is None:
            said = parts(row["completion"])
            text = [token_hashes(said.reasoning), token_hashes(said.answer)]
            sets.append(shingles(np.concatenate(text)))
        made.append(_features(row, finding))
    return Features(pd.DataFrame(made, columns=COLUMNS), sketches(sets))


def _features(row: Row, finding: Finding | None) -> tuple[Any, ...]:
    reward, count, correct = row.get("reward"), row.get("tokens"), row.get("correct")
    turns = row.get("prompt") or ()
    asked = "\n".join(turn["content"] for turn in turns if turn.get("role") == "user")
    reason, detail = finding or (None, None)
    return (
        row["id"],
        _encodable(str(row.get("task", ""))),
        _encodable(asked),
        # Later rounds go to prompts that lacked successes: counted in, they would bias the rate.
        float("nan") if correct is None or row.get("round") else float(correct),
        float("-inf") if reward is None else float(reward),
        len(row["completion"]) if count is None else int(count),
        0 if finding else text_key(row["completion"]) >> 1,  # signed, as pandas wants it
        reason,
        detail and _encodable(detail),
    )


def _encodable(text: str) -> str:
    """Return a text without lone surrogates, which Arrow cannot hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


_Lines = tuple[Path, int, list[bytes]]  # of which file, and the number of the first
_Measured = tuple[Path, Features, list[Fault]]


@dataclass
class Pool:
    """Files of scored samples, one after the other."""

    files: list[Path]

    def measure(self, args: SelectionArgs, texts: FilterArgs | None) -> Features:
        """Measure every sample; raise `InputError` when too many rows are malformed."""
        import pandas as pd

        measured: list[Features] = []
        faults: dict[Path, list[Fault]] = defaultdict(list)
        totals: Counter[Path] = Counter()
        for path, found, wrong in self._measured(args, texts):
            measured.append(found)
            faults[path] += wrong
            totals[path] += len(found.table) + len(wrong)
        for path, wrong in faults.items():
            settle(path, wrong, totals[path])
        if not measured:
            raise InputError(f"pool: {', '.join(map(str, self.files))}: no samples in it")
        return Features(
            pd.concat([one.table for one in measured], ignore_index=True),
            np.concatenate([one.sketch for one in measured]),
        )

    def _measured(self, args: SelectionArgs, texts: FilterArgs | None) -> Iterator[_Measured]:
        """Yield the features of some lines after the other; of large files by all cores."""
        chunks = (chunk for path in self.files for chunk in _chunks(path))
        processes = os.cpu_count() or 1
        if processes == 1 or sum(path.stat().st_size for path in self.files) < ALONE:
            yield from (_measure(chunk, args, texts) for chunk in chunks)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as workers:
            waiting: deque[Future[_Measured]] = deque()
            for chunk in chunks:  # few at a time: all of them together do not fit in memory
                waiting.append(workers.submit(_measure, chunk, args, texts))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            for future in waiting:
                yield future.result()

    def rows(self) -> Iterator[Row]:
        """Yield every good row, in the order in which they were measured, without old marks.

        Samples are numbered again within each prompt; `pooled_from` names a row's stage.
        """
        numbers: Counter[str] = Counter()
        for path in self.files:
            with open(path, "rb") as file:
                for _, row, wrong in _samples(file):
                    if wrong is None:
                        left = {key: value for key, value in row.items() if key not in MARKS}
                        number = numbers[row["id"]]
                        numbers[row["id"]] += 1
                        yield left | {"sample": number, "pooled_from": path.parent.name}


def find_samples(paths: Sequence[str | Path]) -> list[Path]:
    """Return the files of samples in the stages' directories and paths that are given."""
    files: list[Path] = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else [path / name for name in NAMES]
        file = next((file for file in found if file.is_file()), None)
        if file is None:
            raise InputError(
                f"pool: {path}: no samples: expected a .jsonl file, or the directory of a stage "
                f"with {' or '.join(NAMES)}"
            )
        files.append(file)
    return files


def _chunks(path: Path) -> Iterator[_Lines]:
    number = 1
    with open(path, "rb") as file:
        while lines := file.readlines(PART):
            yield path, number, lines
            number += len(lines)


def _measure(chunk: _Lines, args: SelectionArgs, texts: FilterArgs | None) -> _Measured:
    """Measure the rows of some lines; return the faults of the others."""
    path, first, lines = chunk
    faults: list[Fault] = []

    def good() -> Iterator[Row]:
        for number, row, wrong in _samples(lines, first):
            if wrong is None:
                yield row
            else:
                faults.append((number, wrong))

    with many_rows():
        return path, measure(good(), args, texts), faults


class _Turn(msgspec.Struct):
    content: str


class _Sample(msgspec.Struct):
    """What a scored sample's columns must be."""

    id: str
    completion: str
    reward: float | None = None
    tokens: float | None = None
    correct: bool | None = None
    prompt: list[_Turn] | None = None


def _samples(lines: Iterable[bytes], first: int = 1) -> Iterator[tuple[int, Row, str | None]]:
    """Yield each line's number, its scored sample, and what is wrong with it."""
    for number, row, wrong in read_lines(lines, first):
        try:
            if wrong is None:
                msgspec.convert(row, _Sample)
        except msgspec.ValidationError as error:
            wrong = str(error)
        yield number, row, wrong
