"""Teachers: DeepSeek, any OpenAI-compatible server, and the offline solver.

A teacher's answer becomes a transcript only if it has a whole reasoning and an answer; anything
else is rejected with its reason. `samples.jsonl` has every answer, right or wrong, `failures.jsonl`
why there is none, and `requests.jsonl` what each request cost.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.core.secrets import read_secret
from chainforge.core.transcript import ALL_TAGS, DEFAULT, is_blank, read, write
from chainforge.data.filters import FilterArgs, text_fault
from chainforge.data.sft_dataset import FALLBACK
from chainforge.generate.api import FILTERED, LENGTH, ApiEngine, Endpoint, Reader, Reply
from chainforge.generate.budget import find_price, usd
from chainforge.generate.build import code, counted
from chainforge.generate.offline import OfflineTeacher
from chainforge.generate.sampling import Accept, Progress, last_words, roll_out
from chainforge.generate.settings import KEYS, Draw, TeacherArgs

logger = logging.getLogger(__name__)

ADDRESSES = {"deepseek": "https://api.deepseek.com", "openai": "https://api.openai.com/v1"}
CEILINGS = {"deepseek": 500, "openai": 64}  # most requests at a time, unless max_concurrency says
DEEPSEEK_MODEL, RETIRED = "deepseek-flash", "deepseek-reasoner"
OPEN, CLOSE = "<think>", "</think>"
REJECTED = {
    "truncated": "the reply reached the limit of tokens; raise `max_new_tokens`",
    "content_filter": "the reply was filtered",
    "unfinished_reasoning": "the reasoning was opened by <think> and never closed; raise "
    "`max_new_tokens`",
    "no_answer": "the reply contains no answer; ask in `instruction` for one after the reasoning",
    "no_reasoning": "the reply contains no reasoning; start the server with its reasoning parser, "
    "or set `instruction: Reason between <think> and </think>, then give the final answer.`",
    "tags": "the reply contains the tag {tag}; ask in `instruction` for none",
}
OFFLINE = (
    "Worked solutions by ChainForge's built-in solver, from the problems' own metadata; no "
    "language model wrote them."
)
TERMS = {
    "deepseek": "DeepSeek's Open Platform Terms of Service (effective 2026-04-29), section 4.2, "
    "assign the rights in outputs to the user and allow training other models with them, "
    "distillation by name. Imply no endorsement by DeepSeek, and disclose that AI made the "
    "content. Read the terms that are in force before publishing.",
    "openai": "The terms of the server and the license of the model at {hosts} decide who may "
    "publish these rows or train on them; many forbid training other models.",
    "offline": "The rows are ChainForge's own; the problems have the license of their source.",
}


@dataclass
class Collected:
    """The samples in the order of the prompts, what happened to the rest, and what it cost."""

    rows: list[Row]
    lost: Counter[str]
    spending: Row

    @property
    def sources(self) -> dict[str, int]:
        """Return how many rows came from which teacher."""
        return dict(sorted(Counter(row["source"] for row in self.rows).items()))


def collect(
    args: TeacherArgs,
    examples: list[Row],
    output_dir: str | Path,
    *,
    transcript: str = DEFAULT,
    seed: int = 0,
    stage: str = "collect",
    score: Callable[[list[Row]], list[Row]] = lambda rows: rows,
    accept: Accept | None = None,
    keep: int = 1,
    filters: FilterArgs | None = None,
    progress: Progress = lambda done, total, unit, note: None,
) -> Collected:
    """Ask the teacher for `num_samples` answers to each Example, or for as many as it needs.

    Answers in `output_dir`, rejected ones included, are not asked for again; failed requests are.
    The run ends, and spends no more, once `filters` would drop many answers in a row.
    Raises `InputError` before any work for wrong settings, a missing key or a task that the
    offline teacher cannot solve, and later when no request can succeed; `Stopped` for a limit or a
    signal. The rows so far stay.
    """
    directory = Path(output_dir)
    engine = open_teacher(args, examples, directory, transcript, seed)
    prompts = {row["id"]: row for row in examples}

    def mine(row: Row) -> bool:
        prompt = prompts.get(row["id"])
        return prompt is not None and row.get("request") == engine.key(
            Draw(prompt, row["sample"], seed)
        )

    def useless(row: Row) -> str | None:
        if filters is None or row["teacher"] == "offline":
            return None
        found = text_fault(row, filters)
        return found and f"{found[0]} ({found[1]})."

    rolled = roll_out(
        lambda: engine, examples, args, path=directory / "samples.jsonl", seed=seed,
        provenance={"stage": stage}, score=score, mine=mine, accept=accept,
        keep=keep, useless=useless, progress=progress,
    )  # fmt: skip
    lost = Counter(row["class"] for row in rolled.lost)
    if not rolled.samples:
        raise InputError(f"nothing was collected ({dict(lost)}). {last_words(rolled.lost)}")
    return Collected(rolled.samples, lost, engine.spending())


def open_teacher(
    args: TeacherArgs, examples: list[Row], directory: Path, transcript: str, seed: int
) -> OfflineTeacher | ApiEngine:
    """Return the teacher; raise `InputError` for what it cannot be asked with."""
    fallback = None
    if "offline" in (args.teacher, args.fallback):
        offline = OfflineTeacher(args.styles, seed, transcript)
        offline.check(examples)
        if args.teacher == "offline":
            return offline
        fallback = offline.replace
    endpoint = endpoint_of(args)
    key_of(args)
    read, ledger = reader(transcript, args.teacher), directory / "requests.jsonl"
    return ApiEngine(args, endpoint, read, ledger, CEILINGS[args.teacher], fallback)


def endpoint_of(args: TeacherArgs) -> Endpoint:
    """Return an API teacher and what it is sent; raise `InputError` for wrong settings."""
    args.check()
    deepseek = args.teacher == "deepseek"
    model = args.model or DEEPSEEK_MODEL
    if deepseek and model == RETIRED:
        logger.warning("model: %s is retired; asking %s, which replaced it", model, DEEPSEEK_MODEL)
        model = DEEPSEEK_MODEL
    further: Row = {} if args.temperature is None else {"temperature": args.temperature}
    further |= {"thinking": {"type": "enabled"}} if deepseek else {}
    endpoint = Endpoint(
        tuple(args.urls or [ADDRESSES[args.teacher]]),
        model,
        args.max_new_tokens,
        further | (args.extra_body or {}) | args.template_fields,
        args.instruction,
        # OpenAI's own models refuse max_tokens; other servers do not all know the new name.
        limit="max_tokens" if deepseek or args.urls else "max_completion_tokens",
        variable=KEYS[args.teacher],
    )
    # DeepSeek bills what is asked for through a proxy, too.
    host = "api.deepseek.com" if deepseek else endpoint.host
    price = find_price(host, model, args.prices)
    if price is None and args.max_usd is not None:
        raise InputError(
            f"max_usd: the price of {model!r} at {host} is not known; add it to a file "
            "that you name as `prices`, or use max_tokens_total or max_requests"
        )
    return replace(endpoint, price=price)


def key_of(args: TeacherArgs) -> str:
    """Return the teacher's key, from the environment; a server of your own needs none."""
    variable = KEYS[args.teacher]
    key = read_secret(variable)
    if not key and not (args.teacher == "openai" and args.urls):
        raise InputError(
            f"teacher {args.teacher}: the environment variable {variable} is not set; "
            f"export {variable}=... (a key never goes into a file)"
        )
    return key


def reader(transcript: str, teacher: str) -> Reader:
    """Return what turns a reply into a transcript, or raises a `Failure` with the reason."""

    def read_answer(reply: Reply) -> Row:
        reasoning, answer, found = _split(reply, transcript)
        reasoning, answer = reasoning.strip(), answer.strip()
        tag = next((tag for tag in ALL_TAGS if tag in reasoning or tag in answer), None)
        for kind, wrong in (
            ("truncated", reply.end == LENGTH),
            ("content_filter", reply.end == FILTERED),
            ("unfinished_reasoning", found == "unclosed"),
            ("no_answer", is_blank(answer)),
            ("no_reasoning", is_blank(reasoning)),
            ("tags", tag is not None),
        ):
            if wrong:
                raise reply.skip(kind, REJECTED[kind].format(tag=tag))
        completion = write(reasoning, answer, transcript)
        return {"completion": completion, "reasoning_source": found, "teacher": teacher}

    return read_answer


def _split(reply: Reply, transcript: str) -> tuple[str, str, str]:
    """Return reasoning, answer, and where the reasoning was found.

    That is a field of its own, or tags in the content: those of `<think>`, or of our own
    transcript when the teacher is a model that was trained on it.
    """
    content = reply.content
    if own_field := reply.reasoning:
        # llama.cpp's deepseek-legacy leaves the block in the content as well.
        twice = content.lstrip().startswith(OPEN) and CLOSE in content
        return own_field[0], content.partition(CLOSE)[2] if twice else content, own_field[1]
    if CLOSE in content:
        # A template that primes the opening tag leaves only the closing one.
        before, _, after = content.rpartition(CLOSE)
        return before.replace(OPEN, "", 1), after, "tags"
    if OPEN in content:
        return "", "", "unclosed"
    if own := read(content, transcript):
        return own.reasoning, own.answer, "transcript"
    return "", content, "nowhere"


def estimate(args: TeacherArgs, examples: list[Row]) -> str:
    """Return what a collection would ask for and cost, without asking.

    The length of an answer is unknown: `expected_tokens` is the guess, the limit the worst case.
    """
    count = len(examples) * args.most
    if args.teacher == "offline":
        return f"teacher offline: {count:,} answers, nothing to pay"
    endpoint = endpoint_of(args)
    turns = [turn["content"] for row in examples for turn in endpoint.messages(row)]
    tokens = round(sum(map(len, turns)) / 4 * args.most)  # English has about 4 letters a token
    output = count * args.expected_tokens
    text = (
        f"teacher  {args.teacher}: {endpoint.model} at {endpoint.host}\n"
        f"answers  {count:,} ({len(examples):,} prompts x {args.most})\n"
        f"tokens   {tokens:,} in, {output:,} out, at {args.expected_tokens:,} an answer\n"
    )
    if (price := endpoint.price) is None:
        return f"{text}cost     unknown: name a file with the price as `prices`"
    cheap, dear = (usd(of.cost(0, tokens, output)) for of in (price.off_peak, price.peak))
    worst = sum(endpoint.worst(row).usd or 0 for row in examples) * args.most
    most = "no limit: set max_usd" if args.max_usd is None else f"stops at {usd(args.max_usd)}"
    return (
        f"{text}cost     {cheap} off-peak, {dear} at peak, by the prices of {price.date}\n"
        f"at most  {usd(worst)}, if each answer has {args.max_new_tokens:,} tokens; {most}"
    )


def card_sections(args: TeacherArgs, rows: list[Row], spending: Row) -> dict[str, str]:
    """Return what a data card says of the teacher of the kept `rows`: who, terms, and cost."""
    asked = [row for row in rows if row["teacher"] != "offline"]
    lines = [
        f"- {count:,} rows: asked for `{source}` at `{host}`, answered by `{model}`"
        for (source, model, host), count in counted(asked, "source", "model", "host")
    ]
    own = Counter(row["source"] for row in rows if row["teacher"] == "offline")
    for source, count in own.items():
        why = " They replace answers of a teacher that failed." if source == FALLBACK else ""
        lines.append(f"- {count:,} rows: `{source}`. {OFFLINE}{why}")
    if asked:
        days = sorted(row["time"][:10] for row in asked)
        lines.append(f"- collected from {days[0]} to {days[-1]}")
        lines.append(f"- under the instruction: `{code(args.instruction)}`")
    hosts = ", ".join(sorted({f"`{code(row['host'])}`" for row in asked}))
    terms = TERMS[args.teacher].format(hosts=hosts or "the server")
    sections = {"Teacher": "\n".join(lines), "Terms": terms}
    if not spending:
        return sections
    money = "price unknown" if spending["usd"] is None else usd(spending["usd"])
    text = f"{money} for {spending['requests']:,} requests and {spending['tokens']:,} tokens."
    if most := spending["untold_usd_at_most"]:
        text += (
            f" {spending['untold_requests']:,} requests have no known cost: {usd(most)} at most."
        )
    return sections | {"Cost": text}
