"""Sample from OpenAI-compatible servers, such as a cluster of vLLM or SGLang servers.

Requests go out by the collector's own loop: its limiter finds how many the servers bear, its
breaker notices when they are gone, and what fails in passing is asked again.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Message, Row
from chainforge.generate.api import ApiTeacher, reading
from chainforge.generate.collector import Collector
from chainforge.generate.endpoint import Endpoint
from chainforge.generate.engine import Draw, SamplingArgs, Take
from chainforge.generate.intake import Intake
from chainforge.generate.jobs import Job, Jobs
from chainforge.generate.ledger import Amount, Ledger, Limits
from chainforge.generate.outcomes import Outcomes
from chainforge.generate.replies import (
    LENGTH,
    STOP,
    Choice,
    Failure,
    Fatal,
    Rejected,
    Transient,
    reasoning_of,
    text_of,
    tokens_of,
    usage_of,
)
from chainforge.generate.results import Results
from chainforge.generate.settings import TeacherArgs
from chainforge.generate.shards import rank
from chainforge.generate.teacher import REQUESTS

# vLLM and SGLang else fill these from the model's generation config.
NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class PolicyEndpoint(Endpoint):
    """A server whose model gets the prompt as it is, with its own system turn."""

    def messages(self, row: Row) -> list[Message]:
        """Return the prompt's turns."""
        return [{"role": turn["role"], "content": turn["content"]} for turn in row["prompt"]]


class PolicyServer(ApiTeacher):
    """One server; answers as a model says them, cut off or not, are Samples."""

    def __init__(self, args: TeacherArgs) -> None:
        super().__init__(args, transcript="")
        self.endpoint = PolicyEndpoint(**vars(self.endpoint))
        self.under_way = 0
        self.faults = 0  # in a row

    async def draw(self, row: Row, seed: int) -> tuple[Row, Amount | None]:
        """Send one request with a seed; return the Sample's columns and what it cost."""
        sent = datetime.now(UTC)
        one = copy.copy(self)
        one.endpoint = replace(self.endpoint, further=self.endpoint.further | {"seed": seed})
        try:
            body = await one._post(row, longer=False)
            with reading():
                columns = _columns(body, self._choice(body))
        except Failure as error:
            raise self._settled(error, sent) from None
        return columns, self._paid(usage_of(body), sent)


def _columns(body: Any, choice: Choice) -> Row:
    """Take a completion out of a reply; raise a `Failure` for what is none."""
    if parsed := reasoning_of(choice.message):
        raise Fatal(
            "reasoning_parser",
            "the server took the reasoning out of the completion "
            f"({parsed[0]!r:.60}): start it without a reasoning parser",
        )
    usage = usage_of(body)
    # A model may end its turn at once: that is an empty text. No text at all is no completion.
    empty = choice.message.get("content") == "" and choice.end in (STOP, LENGTH)
    if not choice.content and not empty:
        words = f"the reply holds no answer (finish_reason {choice.raw!r})"
        said = {"reply": choice.message, "finish_reason": choice.raw}
        raise Rejected("no_answer", words, usage=usage, said=said)
    return {
        "completion": choice.content,
        "tokens": tokens_of(usage),
        **choice.columns(),
        "source": "policy",
        "served": text_of(body, "model"),
    }


class Cluster:
    """Servers that share the requests: each goes where the fewest are under way."""

    metered = True

    def __init__(self, servers: list[PolicyServer], seeds: dict[tuple[str, int], int]) -> None:
        self.servers, self.seeds = servers, seeds

    def request_key(self, row: Row, index: int) -> str:
        """Return what makes the `index`-th completion of a prompt the same one in another run.

        Of the servers, the model, the messages and the settings it is a hash: another model never
        gets the answers that this one was paid for.
        """
        seed = self.seeds[row["id"], index]
        asked = [server.endpoint.request_key(row, index) for server in self.servers]
        digest = hashlib.sha256("".join(sorted(asked)).encode()).hexdigest()[:16]
        return f"{row['id']}/{index}/{seed}/{digest}"

    def worst(self, row: Row, *, longer: bool) -> Amount:
        """Return the most that a request can cost."""
        return self.servers[0].worst(row, longer=longer)

    async def ask(self, row: Row, index: int, *, longer: bool = False) -> tuple[Row, Amount | None]:
        """Ask the server that is least busy; one that failed is passed over for a while."""
        server = min(self.servers, key=lambda one: one.under_way + (2**one.faults - 1))
        server.under_way += 1
        try:
            answer = await server.draw(row, self.seeds[row["id"], index])
        except Transient as error:
            server.faults = min(server.faults + (not error.refused), 16)
            raise
        else:
            server.faults = 0
            for other in self.servers:  # one that is passed over must be tried again some day
                other.faults = max(0, other.faults - 1) if other is not server else 0
            return answer
        finally:
            server.under_way -= 1

    async def close(self) -> None:
        """Close the connections."""
        for server in self.servers:
            await server.close()


class Answers(Results):
    """What came of every request; the Samples themselves are written down by `take`."""

    def keep(self, rows: list[Row]) -> None:
        """Count Samples."""
        for row in rows:
            self._keep(row)


class ApiEngine:
    """A policy behind one or several servers."""

    def __init__(self, args: SamplingArgs, policy: str, tokenizer: Any, directory: Path) -> None:
        self.args, self.tokenizer = args, tokenizer
        self.directory = directory / f"requests.rank-{rank()}"
        extra = (
            NEUTRAL | {"top_k": args.top_k or -1} if args.extra_body is None else args.extra_body
        )
        urls = [args.base_url] if isinstance(args.base_url, str) else args.base_url
        self.settings = [
            TeacherArgs(
                teacher="openai",
                model=args.served_model or policy,
                base_url=url,
                temperature=args.temperature,
                max_tokens=args.max_new_tokens,
                extra_body={"top_p": args.top_p, "n": 1} | extra,
                max_concurrency=args.max_concurrency,
                timeout=args.timeout,
                max_retries=args.max_retries,
                retry_wait=args.retry_wait,
                outage_timeout=args.outage_timeout,
            )
            for url in urls
        ]

    def sample(self, draws: Sequence[Draw], take: Take) -> None:
        """Sample every draw; answers that an interrupted run paid for are taken first."""
        by_key = {(draw.row["id"], draw.sample): draw for draw in draws}
        seeds = {key: draw.seed for key, draw in by_key.items()}

        def finish(rows: list[Row]) -> list[Row]:
            names = ("completion", "tokens", "finish_reason", "finish_reason_raw", "served")
            take(
                [
                    (
                        by_key[row["id"], row["sample"]],
                        {name: row[name] for name in names if name in row},
                    )
                    for row in rows
                ]
            )
            return rows

        cluster = Cluster([PolicyServer(settings) for settings in self.settings], seeds)
        jobs = [
            Job(draw.row, draw.sample, cluster.request_key(draw.row, draw.sample)) for draw in draws
        ]
        answers = Answers(self.directory, jobs)
        try:
            with Ledger(self.directory / REQUESTS, Limits()) as ledger:
                asyncio.run(self._work(cluster, jobs, answers, ledger, finish))
                ledger.forget_answers()
        finally:
            answers.close()
        self._settle(answers)

    async def _work(
        self, cluster: Cluster, jobs: list[Job], answers: Answers, ledger: Ledger, finish: Any
    ) -> None:
        fresh = [job for job in jobs if job.key not in ledger.answers]
        waiting = Jobs(fresh, None, Counter())
        intake = Intake(waiting, answers, finish)
        outcomes = Outcomes(waiting, answers, intake, None)
        collector = Collector(self.settings[0], cluster, outcomes, ledger)
        for job in jobs:
            if job.key in ledger.answers:  # it came before a kill
                waiting.started(job)
                intake.arrive(job, ledger.answers[job.key])
        await collector.run(lambda run: None)

    def _settle(self, answers: Answers) -> None:
        """Raise `InputError` when not every completion was drawn: none is made up for them."""
        if answers.lost:
            raise InputError(
                f"{len(answers.lost)} of {len(answers.jobs)} completions are missing. "
                f"{answers.last_words()} Run the same command again to ask for these alone"
            )
