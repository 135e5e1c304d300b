"""Stage 0: collect worked answers from a teacher, one line a sample, as they arrive.

`samples.jsonl` holds what can be trained on; `failures.jsonl` says of every other request why
not. Both are appended to and never rewritten, so a run that was cut asks only for what is missing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from chainforge.core.errors import InputError
from chainforge.core.records import JsonLines, Row, read_rows, sample
from chainforge.core.transcript import DEFAULT
from chainforge.data.api import ApiTeacher
from chainforge.data.offline import OfflineTeacher
from chainforge.data.replies import Rejected, Transient

# So many requests in a row without one usable answer mean that something is wrong with all of them.
PATIENCE = 10


@dataclass
class TeacherArgs:
    """Whom to ask, and how. Keys come from the environment: DEEPSEEK_API_KEY, OPENAI_API_KEY."""

    teacher: Literal["offline", "deepseek", "openai"] = field(
        default="offline",
        metadata={
            "help": "offline: worked solutions from the data set's own metadata. deepseek: the "
            "DeepSeek API. openai: any OpenAI-compatible server, see base_url."
        },
    )
    model: str | None = field(
        default=None, metadata={"help": "Model to ask for; deepseek-flash when left out."}
    )
    base_url: str | None = field(
        default=None, metadata={"help": "Address of the server, such as http://localhost:8000/v1."}
    )
    samples_per_prompt: int = field(default=1, metadata={"help": "Answers to each prompt."})
    instruction: str = field(
        default="Think step by step. Then reply with the final answer only.",
        metadata={
            "help": "System turn that an API teacher gets in place of the prompt's own, which "
            "asks for tags that are ours to write. An empty string: none."
        },
    )
    max_tokens: int = field(
        default=32_768, metadata={"help": "Limit of one answer, its reasoning included."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Sent only when given; DeepSeek's thinking ignores it."}
    )
    extra_body: dict[str, Any] | None = field(
        default=None, metadata={"help": "Further fields of the request, as the server wants them."}
    )
    timeout: float = field(default=1800.0, metadata={"help": "Seconds for one request in all."})
    max_retries: int = field(default=5, metadata={"help": "Times that a passing error is retried."})
    retry_wait: float = field(
        default=1.0, metadata={"help": "Seconds before the first retry, doubled for each further."}
    )
    fallback: Literal["none", "offline"] = field(
        default="none",
        metadata={
            "help": "What stands in for a request that failed: nothing, or a worked solution "
            "labelled offline-fallback, which SFT refuses unless allow_offline_rows."
        },
    )
    styles: dict[str, float] = field(
        default_factory=lambda: {"careful": 0.5, "hasty": 0.5},
        metadata={"help": "Share of each style among the offline teacher's solutions."},
    )


class Teacher(Protocol):
    """One who answers: `ask` gives a completion and its provenance, or raises."""

    async def ask(self, row: Row, index: int) -> Row:
        """Answer a prompt for the `index`-th time.

        Returns `completion`, `source` and further columns of a Sample. Raises `Transient` when the
        request failed for good, `Rejected` for a useless answer, `InputError` to stop the run.
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


def collect(
    args: TeacherArgs,
    examples: list[Row],
    output_dir: str | Path,
    *,
    transcript: str = DEFAULT,
    seed: int = 0,
    stage: str = "collect",
    score: Callable[[Row], Row] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Collected:
    """Ask the teacher for `samples_per_prompt` answers to each Example.

    Samples that `output_dir/samples.jsonl` already holds, and answers that were rejected, are not
    asked for again; requests that failed are. `score` is given each Sample as it arrives and
    returns it with its rewards; `progress` is told (done, total).

    Returns the Samples in the order of `examples`, a funnel (`kept` are the Samples, right or
    wrong) and how many came from which source. Raises `InputError` before any work for a missing
    key or a task that the offline teacher cannot solve, and later when going on is useless: the
    rows so far stay.
    """
    for name, least in (("samples_per_prompt", 1), ("max_tokens", 1), ("max_retries", 0)):
        if getattr(args, name) < least:
            raise InputError(f"{name}: expected {least} or more, found {getattr(args, name)}")
    offline = None
    if "offline" in (args.teacher, args.fallback):
        offline = OfflineTeacher(args.styles, seed, transcript)
        offline.check(examples)
    if args.teacher == "offline":
        assert offline is not None
        teacher: Teacher = offline
        offline = None
    else:
        teacher = ApiTeacher(args, transcript)
    run = _Run(Path(output_dir), examples, args.samples_per_prompt)

    def finish(row: Row) -> Row:
        row = row | {"stage": stage}
        return score(row) if score else row

    async def work() -> None:
        try:
            await _work(run, teacher, offline, samples, failures, finish, progress)
        finally:
            await teacher.close()

    with JsonLines(run.samples) as samples, JsonLines(run.failures) as failures:
        run.recall()
        asyncio.run(work())
    collected = run.result()
    if not collected.rows:
        raise InputError(f"nothing was collected ({collected.funnel['dropped']}): {run.failures}")
    return collected


class _Run:
    """What was asked for, and what has come of each request so far."""

    def __init__(self, directory: Path, examples: list[Row], per_prompt: int) -> None:
        self.samples, self.failures = directory / "samples.jsonl", directory / "failures.jsonl"
        self.asked = [(row, index) for row in examples for index in range(per_prompt)]
        self.kept: dict[tuple[str, int], Row] = {}
        self.lost: dict[tuple[str, int], Row] = {}

    def recall(self) -> None:
        """Read what an earlier run left."""
        for row in read_rows(self.samples):
            self.kept.setdefault((row["id"], row["sample"]), row)
        for row in read_rows(self.failures):
            self.lost[(row["id"], row["sample"])] = row

    def missing(self) -> list[tuple[Row, int]]:
        """Return the requests without an answer, good or rejected."""
        rejected = {key for key, row in self.lost.items() if row["rejected"]}
        return [
            (row, index)
            for row, index in self.asked
            if (row["id"], index) not in self.kept and (row["id"], index) not in rejected
        ]

    def result(self) -> Collected:
        """Count what was asked for; a request that failed first and then succeeded is kept."""
        keys = [(row["id"], index) for row, index in self.asked]
        rows = [self.kept[key] for key in keys if key in self.kept]
        dropped = Counter(self.lost[key]["class"] for key in keys if key not in self.kept)
        funnel = {"in": len(keys), "kept": len(rows), "dropped": dict(sorted(dropped.items()))}
        return Collected(rows, funnel, dict(sorted(Counter(row["source"] for row in rows).items())))


async def _work(
    run: _Run,
    teacher: Teacher,
    offline: OfflineTeacher | None,
    samples: JsonLines,
    failures: JsonLines,
    finish: Callable[[Row], Row],
    progress: Callable[[int, int], None],
) -> None:
    """Ask for what is missing, one request after another, and write down what comes."""
    missing = run.missing()
    vain = 0  # requests in a row without a usable answer
    for done, (row, index) in enumerate(missing, start=len(run.asked) - len(missing)):
        progress(done, len(run.asked))
        key = (row["id"], index)
        try:
            if offline is not None and vain >= PATIENCE:
                raise Transient("not_asked", f"not asked: {PATIENCE} requests before it failed")
            answer = await teacher.ask(row, index)
            vain = 0
        except (Transient, Rejected) as error:
            rejected = isinstance(error, Rejected)
            lost = {"id": row["id"], "sample": index, "task": row["task"], "class": error.kind,
                    "message": str(error), "rejected": rejected}  # fmt: skip
            failures.append(lost)
            run.lost[key] = lost
            vain += 1
            if offline is None or rejected:
                if vain >= PATIENCE:
                    raise InputError(
                        f"{PATIENCE} requests in a row brought nothing usable, the last: {error} "
                        f"({error.kind}); see {run.failures}. Running again goes on from here"
                    ) from None
                continue
            answer = await offline.ask(row, index) | {"source": "offline-fallback"}
        made = finish(sample(row, answer.pop("completion"), index, **answer))
        samples.append(made)
        run.kept[key] = made
    progress(len(run.asked), len(run.asked))
