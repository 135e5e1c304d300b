"""The one loop of collect, reject and evaluate: sample, score, write, and repeat where needed.

Every sample is scored and on disk as soon as the engine has it, so a run that was interrupted
continues where it stopped and samples nothing twice. Several processes share the prompts. Sampling
in rounds (`max_samples`) spends tokens where they bring rows: an easy prompt needs few samples, a
hard one gets up to `max_samples`; each prompt decides alone, so processes need not synchronise.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.data.filters import FilterArgs, SelectionArgs, fault
from chainforge.generate.settings import Draw, Drawn, RequestArgs, SamplingArgs, Take, seed_of
from chainforge.generate.shards import Shards, rank, world_size
from chainforge.rewards.verify import start_pool

Accept = Callable[[Row], bool]
Progress = Callable[[int, int, str, str], None]
POLL_SECONDS = 0.2
MAX_USELESS = 20  # samples in a row that end a run
FAILURES = "failures.jsonl"


class Engine(Protocol):
    """A sampler of completions: transformers, vLLM, a server, or a teacher."""

    def sample(self, draws: Sequence[Draw], take: Take) -> None:
        """Sample every draw once, and call `take` with them as they are done, in any order.

        Raises `InputError` for a prompt that cannot be sampled from, and when draws that must not
        fail did.
        """
        ...


def open_engine(
    args: SamplingArgs, policy: str, tokenizer: Any, *, dtype: str = "auto", directory: Path
) -> Engine:
    """Open the policy with the engine that `engine` names; `directory` is for request logs."""
    args.check()
    if args.engine == "vllm":
        from chainforge.generate.local import VllmEngine

        return VllmEngine(args, policy, tokenizer, dtype)
    if args.engine == "api":
        from chainforge.generate.api import policy_engine

        return policy_engine(args, policy, directory)
    from chainforge.generate.local import LocalEngine, open_policy

    return LocalEngine(open_policy(policy, dtype=dtype), tokenizer, args)


@dataclass
class Rolled:
    """The samples in the order of the Examples, the final failures, and counts for the funnel."""

    samples: list[Row]
    lost: list[Row] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


def roll_out(
    engine: Callable[[], Engine],
    examples: list[Row],
    args: RequestArgs,
    *,
    path: Path,
    seed: int,
    provenance: Row,
    score: Callable[[list[Row]], list[Row]] = lambda rows: rows,
    mine: Callable[[Row], bool] | None = None,
    accept: Accept | None = None,
    keep: int = 1,
    useless: Callable[[Row], str | None] = lambda row: None,
    progress: Progress = lambda done, total, unit, note: None,
) -> Rolled:
    """Return scored samples of each Example: `num_samples`, or as many as it needs.

    They are appended to `path`, and answers that failed to `failures.jsonl`; rows there that `mine`
    accepts (by default those of the model in `provenance`) are not sampled again. `engine` opens
    the policy, only if there is something to sample. With `max_samples` a prompt is done once
    `keep` different completions are accepted, by default those that are correct. Many samples in a
    row that failed, or that `useless` names a fault of, end the run. Of several processes the first
    waits for the others and returns everything, the others return nothing.
    """
    args.check()
    start_pool(examples)
    mine = mine or (lambda row: row.get("model") == provenance.get("model"))
    rounds = Rounds(examples, args, accept, keep)
    with _Intake(rounds, path, mine, provenance, score, useless, progress) as intake:
        own = examples[rank() :: world_size()]
        while draws := rounds.draws(own, seed):
            intake.engine = intake.engine or engine()
            intake.engine.sample(draws, intake.take)
        intake.tell()
        if rounds.lost and rounds.strict:
            raise InputError(
                f"{len(rounds.lost)} of {len(own) * args.most} completions are missing. "
                f"{last_words([*rounds.lost.values()])} Run the same command again to ask for "
                "these alone"
            )
        if rank() > 0:
            return Rolled([])
        while rounds.draws(examples, seed):  # what the other processes have not done yet
            time.sleep(POLL_SECONDS)
            intake.tell()
    return Rolled(rounds.samples(), list(rounds.lost.values()), rounds.report())


@dataclass
class _Intake:
    """Score and write what an engine hands over."""

    rounds: Rounds
    path: Path
    mine: Callable[[Row], bool]
    provenance: Row
    score: Callable[[list[Row]], list[Row]]
    useless: Callable[[Row], str | None]
    progress: Progress
    engine: Engine | None = None

    def __post_init__(self) -> None:
        # A policy's samples are all needed: what failed is asked for again in the next run.
        final = lambda row: not self.rounds.strict and row["rejected"] and self.mine(row)  # noqa: E731
        self._files = Shards(self.path, self.mine)
        self._failures = Shards(self.path.with_name(FAILURES), final)
        self.rounds.note(self._files.rows.values())
        self.rounds.lose(self._failures.rows.values())
        self._told, self._in_a_row = 0.0, 0

    def take(self, batch: list[Drawn]) -> None:
        """Score, write and count samples and failures; raise `InputError` if all are useless."""
        good = [one for one in batch if one[1]["completion"] is not None]
        lost = [_failure(*one) for one in batch if one[1]["completion"] is None]
        rows = [_sample(*one, self.rounds.args) | self.provenance for one in good]
        rows = self.score(rows) if rows else []
        self._files.extend(rows)
        self.rounds.note(rows)
        self._failures.extend(lost)
        self.rounds.lose(lost)
        failed, scored = iter(lost), iter(rows)
        for _, answer in batch:  # in the order in which they came
            missing = answer["completion"] is None
            why = last_words([next(failed)]) if missing else self.useless(next(scored))
            self._in_a_row = self._in_a_row + 1 if why else 0
            if self._in_a_row >= MAX_USELESS:
                words = f"{MAX_USELESS} answers in a row were unusable, the last: {why}"
                raise InputError(f"{words} Run the same command again to continue")
        self.tell(POLL_SECONDS)

    def tell(self, every: float = 0.0) -> None:
        """Report the progress of all processes, at most once in `every` seconds."""
        if rank() > 0 or time.monotonic() - self._told < every:
            return
        self.rounds.note(self._files.refresh())
        done, total, unit = self.rounds.progress()
        describe = getattr(self.engine, "describe", lambda share: "")
        words = [describe(done / max(total, 1)), self.rounds.describe()]
        self.progress(done, total, unit, ", ".join(filter(None, words)))
        self._told = time.monotonic()

    def __enter__(self) -> _Intake:
        self.tell()
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()
        self._failures.close()


def _sample(draw: Draw, answer: Row, args: RequestArgs) -> Row:
    """Return the Sample of one completion, with its sampling parameters and its seed."""
    columns = {key: value for key, value in answer.items() if key != "completion"}
    if args.adaptive:
        columns["round"] = draw.sample // args.round_size
    if isinstance(args, SamplingArgs):
        columns["sampling"] = args.parameters() | {"seed": draw.seed}
    source = columns.pop("source", "policy")
    return sample(draw.row, answer["completion"], draw.sample, source=source, **columns)


def _failure(draw: Draw, why: Row) -> Row:
    """Return the row of an answer that failed."""
    known = {"id": draw.row["id"], "sample": draw.sample, "task": draw.row.get("task")}
    return known | {key: value for key, value in why.items() if key != "completion"}


def last_words(lost: Sequence[Row]) -> str:
    """Return the commonest reason of some failures, with a reply that shows it."""
    ((kind, _),) = Counter(row["class"] for row in lost).most_common(1)
    row = [row for row in lost if row["class"] == kind][-1]
    said = (row.get("reply") or {}).get("content")
    shown = f" One answer: {said[:200]!r}." if said and isinstance(said, str) else ""
    return f"{kind}: {row['message']}.{shown} See {FAILURES}."


class Rounds:
    """The samples of every prompt so far, and which are wanted next."""

    def __init__(
        self,
        examples: Sequence[Row],
        args: RequestArgs,
        accept: Accept | None = None,
        keep: int = 1,
    ) -> None:
        self.examples, self.args, self.keep = examples, args, keep
        self.strict = isinstance(args, SamplingArgs)  # whether no sample may be missing
        self.accept = accept or (lambda row: bool(row.get("correct")))
        self.rows: dict[str, dict[int, Row]] = {row["id"]: {} for row in examples}
        self.lost: dict[tuple[str, int], Row] = {}
        self.enough: dict[str, bool] = {}  # of the prompts that are done
        self.verdicts = Counter[bool | None]()
        self._accepted: set[tuple[str, int]] = set()
        size = args.round_size if args.adaptive else args.most
        self._ends = [*range(size, args.most, size), args.most]

    def note(self, rows: Iterable[Row]) -> None:
        """Add scored samples."""
        for row in rows:
            key = identity, number = row["id"], row["sample"]
            if identity not in self.rows or number >= self.args.most:
                continue
            self.verdicts[row.get("correct")] += number not in self.rows[identity]
            self.rows[identity][number] = row
            self.lost.pop(key, None)  # a fallback replaced it
            if self.args.adaptive and self.accept(row):
                self._accepted.add(key)

    def lose(self, failures: Iterable[Row]) -> None:
        """Add answers that failed: they are not asked for again in this run."""
        for row in failures:
            there = self.rows.get(row["id"])
            if there is not None and row["sample"] < self.args.most and row["sample"] not in there:
                self.lost[row["id"], row["sample"]] = row

    def draws(self, examples: Iterable[Row], seed: int) -> list[Draw]:
        """Return what to sample next for these Examples; nothing when all have enough."""
        return [
            Draw(row, number, seed_of(seed, row["id"], number))
            for row in examples
            for number in self.missing(row["id"])
        ]

    def missing(self, identity: str) -> list[int]:
        """Return the samples that a prompt needs next; none once it has enough, or all.

        A round counts once it is complete, so an interrupted run decides as an undisturbed one.
        """
        if identity in self.enough:
            return []
        rows = self.rows[identity]
        for end in self._ends:
            if need := [n for n in range(end) if n not in rows and (identity, n) not in self.lost]:
                return need
            good = [number for number in range(end) if (identity, number) in self._accepted]
            # Of equal completions only one can be kept.
            if self.args.adaptive and len({rows[one]["completion"] for one in good}) >= self.keep:
                self.enough[identity] = True
                return []
        self.enough[identity] = False
        return []

    def samples(self) -> list[Row]:
        """Return all samples, in the order of the Examples."""
        return [rows[one] for rows in self.rows.values() for one in sorted(rows)]

    def progress(self) -> tuple[int, int, str]:
        """Return what is done, of how many, in which unit."""
        if self.args.adaptive:
            done = sum(not self.missing(row["id"]) for row in self.examples)
            return done, len(self.examples), "prompts"
        count = sum(map(len, self.rows.values()))
        return count + len(self.lost), len(self.examples) * self.args.most, "samples"

    def describe(self) -> str:
        """Return how many samples are right, and how many failed."""
        judged = self.verdicts[True] + self.verdicts[False]
        words = [f"{self.verdicts[True] / judged:.0%} right of {judged:,}"] if judged else []
        if self.lost:
            words.append(f"{len(self.lost):,} failed")
        return ", ".join(words)

    def report(self) -> dict[str, Any]:
        """Return what was sampled, and what stopping early saved."""
        rows = self.samples()
        found: dict[str, Any] = {
            "prompts": len(self.examples),
            "samples": len(rows),
            "tokens": sum(row.get("tokens") or 0 for row in rows),
        }
        if self.args.adaptive:
            enough = sum(self.enough.values())
            found |= {"enough": enough, "exhausted": len(self.enough) - enough}
            found["samples_saved"] = len(self.examples) * self.args.most - len(rows)
        return found


def accepted_by(selection: SelectionArgs, filters: FilterArgs | None = None) -> Accept:
    """Accept the samples that no filter drops, whatever else is sampled."""
    return lambda row: fault(row, selection, filters) is None


def sample(row: Row, completion: str, index: int, *, source: str, **provenance: Any) -> Row:
    """Make a Sample: the Example, its `index`-th completion, and where that came from."""
    return row | {"completion": completion, "sample": index, "source": source} | provenance
