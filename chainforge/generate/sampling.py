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
from typing import Any, Literal, Protocol

from chainforge.core.jsonl import Row
from chainforge.data.filters import FilterArgs, SelectionArgs, fault
from chainforge.generate.settings import Draw, Drawn, RequestArgs, SamplingArgs, Take, seed_of
from chainforge.generate.shards import Shards, rank, world_size
from chainforge.rewards.verify import start_pool

Accept = Callable[[Row], bool]
Progress = Callable[[int, int, str, str], None]
State = Literal["open", "enough", "exhausted"]
POLL_SECONDS = 0.2
FAILURES = "failures.jsonl"


class Engine(Protocol):
    """What draws completions: transformers, vLLM, a server, or a teacher."""

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
    """The samples in the order of the Examples, the final failures, and what sampling took."""

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
    written: Callable[[list[Row]], None] = lambda rows: None,
    progress: Progress = lambda done, total, unit, note: None,
) -> Rolled:
    """Return scored samples of each Example: `num_samples`, or as many as it needs.

    They are appended to `path`, and answers that failed to `failures.jsonl`; rows there that `mine`
    accepts (by default those of the model in `provenance`) are not sampled again. `engine` opens
    the policy, only if there is something to sample. With `max_samples` a prompt is done once
    `keep` different completions are accepted, by default those that are correct. `written` gets
    the rows that are on disk, and may raise to end the run. Of several processes the first waits
    for the others and returns everything, the others return nothing.
    """
    args.check()
    start_pool(examples)
    mine = mine or (lambda row: row.get("model") == provenance.get("model"))
    rounds = Rounds(examples, args, accept, keep)
    files = Shards(path, mine)
    failures = Shards(path.with_name(FAILURES), lambda row: bool(row["rejected"]) and mine(row))
    rounds.note(list(files.rows.values()))
    rounds.lose(failures.rows.values())
    opened: Engine | None = None
    told = 0.0

    def tell(every: float = 0.0) -> None:
        nonlocal told
        if rank() == 0 and time.monotonic() - told >= every:
            rounds.note(files.refresh())
            done, total, unit = rounds.progress()
            describe = getattr(opened, "describe", lambda share: "")
            words = [describe(done / max(total, 1)), rounds.describe()]
            progress(done, total, unit, ", ".join(filter(None, words)))
            told = time.monotonic()

    def take(batch: list[Drawn]) -> None:
        good = [one for one in batch if one[1]["completion"] is not None]
        lost = [_failure(*one) for one in batch if one[1]["completion"] is None]
        rows = score([_sample(*one, args) | provenance for one in good]) if good else []
        files.extend(rows)
        rounds.note(rows)
        failures.extend(lost)
        rounds.lose(lost)
        written(rows)
        tell(POLL_SECONDS)

    try:
        tell()
        own = examples[rank() :: world_size()]
        while draws := rounds.draws(own, seed):
            opened = opened or engine()
            opened.sample(draws, take)
        tell()
        if rank() > 0:
            return Rolled([])
        while rounds.draws(examples, seed):  # what the other processes have not done yet
            time.sleep(POLL_SECONDS)
            tell()
    finally:
        files.close()
        failures.close()
    return Rolled(rounds.samples(), list(rounds.lost.values()), rounds.report())


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
        self.accept = accept or (lambda row: bool(row.get("correct")))
        self.rows: dict[str, dict[int, Row]] = {row["id"]: {} for row in examples}
        self.lost: dict[tuple[str, int], Row] = {}
        self.verdicts = Counter[bool | None]()
        self._accepted: set[tuple[str, int]] = set()
        self._settled: dict[str, State] = {}

    def note(self, rows: Sequence[Row]) -> None:
        """Add scored samples."""
        for row in rows:
            key = row["id"], row["sample"]
            if row["id"] not in self.rows or row["sample"] >= self.args.most:
                continue
            self.verdicts[row.get("correct")] += row["sample"] not in self.rows[row["id"]]
            self.rows[row["id"]][row["sample"]] = row
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
        wanted = []
        for row in examples:
            state, end = self.state(row["id"])
            if state == "open":
                missing = [one for one in range(end) if not self._there(row["id"], one)]
                wanted += [Draw(row, one, seed_of(seed, row["id"], one)) for one in missing]
        return wanted

    def _there(self, identity: str, number: int) -> bool:
        return number in self.rows[identity] or (identity, number) in self.lost

    def state(self, identity: str) -> tuple[State, int]:
        """Return whether a prompt has enough, and up to which sample it is wanted.

        A round counts once it is complete, so an interrupted run decides as an undisturbed one.
        """
        if identity in self._settled:
            return self._settled[identity], len(self.rows[identity])
        size, most = self.args.round_size if self.args.adaptive else self.args.most, self.args.most
        for end in [*range(size, most, size), most]:
            if not all(self._there(identity, number) for number in range(end)):
                return "open", end
            good = [n for n in range(end) if (identity, n) in self._accepted]
            # Of equal completions only one can be kept.
            found = {self.rows[identity][number]["completion"] for number in good}
            enough = self.args.adaptive and len(found) >= self.keep
            if enough or end == most:
                self._settled[identity] = "enough" if enough else "exhausted"
                return self._settled[identity], end
        raise AssertionError("the last round settles a prompt")

    def samples(self) -> list[Row]:
        """Return all samples, in the order of the Examples."""
        return [rows[one] for rows in self.rows.values() for one in sorted(rows)]

    def progress(self) -> tuple[int, int, str]:
        """Return what is done, of how many, in which unit."""
        if self.args.adaptive:
            done = sum(self.state(row["id"])[0] != "open" for row in self.examples)
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
            states = Counter(self.state(row["id"])[0] for row in self.examples)
            found |= {name: states[name] for name in ("enough", "exhausted")}
            found["samples_saved"] = len(self.examples) * self.args.most - len(rows)
        return found


def accepted_by(selection: SelectionArgs, texts: FilterArgs | None = None) -> Accept:
    """Accept the samples that no filter drops, whatever else is sampled."""
    return lambda row: fault(row, selection, texts) is None


def sample(row: Row, completion: str, index: int, *, source: str, **provenance: Any) -> Row:
    """Make a Sample: the Example, its `index`-th completion, and where that came from."""
    return row | {"completion": completion, "sample": index, "source": source} | provenance
