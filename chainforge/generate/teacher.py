"""Stage 0: collect worked answers from a teacher, one line a sample, as they arrive.

Three teachers stand behind one interface: DeepSeek, any OpenAI-compatible server, and `offline`.
`samples.jsonl` holds what can be trained on, `failures.jsonl` says of every other answer why not,
`requests.jsonl` what each request cost. A run that was cut asks only for what is missing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.core.transcript import DEFAULT
from chainforge.generate.api import ApiTeacher
from chainforge.generate.collector import Collector
from chainforge.generate.intake import Intake
from chainforge.generate.jobs import Job, Jobs
from chainforge.generate.ledger import Amount, Ledger, Limits
from chainforge.generate.offline import OfflineTeacher
from chainforge.generate.outcomes import Outcomes
from chainforge.generate.progress import describe
from chainforge.generate.results import Results
from chainforge.generate.settings import TeacherArgs, check

REQUESTS = "requests.jsonl"


class Teacher(Protocol):
    """One who answers."""

    metered: bool  # whether answers cost money, time and patience

    def request_key(self, row: Row, index: int) -> str:
        """Return what makes the `index`-th answer to a prompt the same one in another run."""
        ...

    def worst(self, row: Row, *, longer: bool) -> Amount:
        """Return the most that one request can cost."""
        ...

    async def ask(self, row: Row, index: int, *, longer: bool = False) -> tuple[Row, Amount | None]:
        """Answer a prompt for the `index`-th time, with a larger limit of tokens if `longer`.

        Returns the columns of a Sample with its `completion`, and what it cost, None when that
        is not known. Raises `Transient`, `Rejected` or `Fatal`.
        """
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


@dataclass
class Collected:
    """What a collection came to."""

    rows: list[Row]
    funnel: dict[str, Any]
    sources: dict[str, int]
    spending: dict[str, Any] = field(default_factory=dict)


def collect(
    args: TeacherArgs,
    examples: list[Row],
    output_dir: str | Path,
    *,
    transcript: str = DEFAULT,
    seed: int = 0,
    stage: str = "collect",
    score: Callable[[list[Row]], list[Row]] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Collected:
    """Ask the teacher for up to `samples_per_prompt` answers to each Example.

    Samples that `output_dir` already holds, and answers that were rejected, are not asked for
    again; requests that failed are. `score` is given Samples as they arrive and returns them with
    their rewards and `correct`; `progress` is told done, total and a line to show.

    Returns the Samples in the order of `examples`, a funnel (`kept` are the Samples, right or
    wrong), how many came from which source, and what was spent. Raises `InputError` before any
    work for wrong settings, a missing key or a task that the offline teacher cannot solve, and
    later when going on is useless; `Stopped` for a limit or a signal. The rows so far stay.
    """
    check(args)
    offline = None
    if "offline" in (args.teacher, args.fallback):
        offline = OfflineTeacher(args.styles, seed, transcript)
        offline.check(examples)
    teacher: Teacher
    if args.teacher == "offline":
        assert offline is not None
        teacher, offline = offline, None
    else:
        teacher = ApiTeacher(args, transcript)
    jobs = list_jobs(teacher, examples, args.samples_per_prompt)

    def finish(rows: list[Row]) -> list[Row]:
        rows = [row | {"stage": stage} for row in rows]
        return score(rows) if score else rows

    directory = Path(output_dir)
    results = Results(directory, jobs)
    limits = Limits(args.max_usd, args.max_tokens_total, args.max_requests)
    try:
        with Ledger(directory / REQUESTS, limits, unused=not teacher.metered) as ledger:
            missing = results.missing()
            waiting = Jobs(
                [job for job in missing if job.key not in ledger.answers],
                args.until_correct,
                results.right(),
            )
            intake = Intake(waiting, results, finish)
            outcomes = Outcomes(waiting, results, intake, offline)
            run = Collector(args, teacher, outcomes, ledger)

            def tell(run: Collector) -> None:
                total = len(jobs) - run.jobs.unneeded
                progress(results.done(), total, describe(run, results.done(), total))

            async def work() -> None:
                for job in missing:
                    if job.key in ledger.answers:  # it came, and was paid for, before a kill
                        waiting.started(job)
                        intake.arrive(job, ledger.answers[job.key])
                await run.run(tell)

            asyncio.run(work())
            results.sync()  # before the account, which has the answers too, forgets them
            ledger.forget_answers()
    finally:
        results.close()
    collected = _collected(results, ledger)
    if not collected.rows:
        lost = collected.funnel["dropped"]
        raise InputError(f"nothing was collected ({lost}). {results.last_words()}")
    return collected


def list_jobs(teacher: Teacher, examples: list[Row], per_prompt: int) -> list[Job]:
    """List all that may be asked for."""
    return [
        Job(row, index, teacher.request_key(row, index))
        for row in examples
        for index in range(per_prompt)
    ]


def _collected(results: Results, ledger: Ledger) -> Collected:
    rows, lost = results.rows(), results.lost_classes()
    funnel = {
        "in": len(rows) + lost.total(),
        "kept": len(rows),
        "dropped": dict(sorted(lost.items())),
    }
    sources = dict(sorted(Counter(row["source"] for row in rows).items()))
    return Collected(rows, funnel, sources, ledger.summary())
