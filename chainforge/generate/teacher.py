"""Teachers: DeepSeek, any OpenAI-compatible server, and the offline solver, as engines.

A teacher's answer becomes a transcript only if it has a whole reasoning and an answer; anything
else is rejected with its reason. `samples.jsonl` has every answer, right or wrong, `failures.jsonl`
why there is none, and `requests.jsonl` what each request cost.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError, hint
from chainforge.core.jsonl import Row, read_rows
from chainforge.core.secrets import read_secret
from chainforge.core.transcript import DEFAULT, PRESETS, is_blank, read, write
from chainforge.data.card import code
from chainforge.data.datasets import FALLBACK
from chainforge.data.filters import FilterArgs, text_fault
from chainforge.generate.api import (
    FILTERED,
    LENGTH,
    ApiEngine,
    Choice,
    Endpoint,
    Reader,
    Server,
    digest,
    reasoning_of,
    request_key,
)
from chainforge.generate.budget import MILLION, Limits, Price, find_price, usd
from chainforge.generate.dispatch import MAX_USELESS, Rejected, last_words
from chainforge.generate.sampling import FAILURES, Accept, Progress, roll_out
from chainforge.generate.settings import KEYS, Draw, Take, TeacherArgs, read_address

logger = logging.getLogger(__name__)

ADDRESSES = {"deepseek": "https://api.deepseek.com", "openai": "https://api.openai.com/v1"}
DEEPSEEK_MODEL, RETIRED = "deepseek-flash", "deepseek-reasoner"
SAMPLES, REQUESTS = "samples.jsonl", "requests.jsonl"
OPEN, CLOSE = "<think>", "</think>"
TAGS = tuple(dict.fromkeys(tag for preset in PRESETS.values() for tag in preset.all))
BYTES_PER_TOKEN = 4  # of English, about
AT_ONCE = 64
# What helps where a teacher does not separate its reasoning from its answer, as a small one.
ASK = (
    "ask for it with `instruction: Reason between <think> and </think>, then give the final "
    "answer.`, or start the server with its reasoning parser"
)
OFFLINE = (
    "Worked solutions by ChainForge's built-in solver, from the problems' own metadata; no "
    "language model wrote them."
)
TERMS = {
    "deepseek": "DeepSeek's Open Platform Terms of Service (effective 2026-04-29), section 4.2, "
    "assign the rights in outputs to the user and allow training other models with them, "
    "distillation by name. They ask to imply no endorsement by DeepSeek and to say that content "
    "was made by AI. Read the terms that are in force before publishing.",
    "openai": "The rights in these rows are what the terms of the server and the license of the "
    "model at {hosts} give; many forbid training other models. Read them before training or "
    "publishing.",
    "offline": "The rows are ChainForge's own; the problems have the license of their source.",
}


@dataclass
class TeacherFilterArgs(FilterArgs):
    """The filters of reject, with a teacher's defaults."""

    min_reasoning_chars: int | None = field(
        default=None,
        metadata={
            "help": "A reasoning of fewer characters: too_short. 20 for a teacher on a server, "
            "none for the offline one."
        },
    )

    def fitting(self, teacher: str) -> TeacherFilterArgs:
        """Return these filters with the default that depends on the teacher filled in."""
        if self.min_reasoning_chars is not None or teacher == "offline":
            return self
        return replace(self, min_reasoning_chars=20)


@dataclass
class Collected:
    """The samples in the order of the prompts, what happened to the rest, and what it cost."""

    rows: list[Row]
    lost: Counter[str]
    spending: Row = field(default_factory=dict)
    report: Row = field(default_factory=dict)

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
    texts: FilterArgs | None = None,
    progress: Progress = lambda done, total, unit, note: None,
) -> Collected:
    """Ask the teacher for `num_samples` answers to each Example, or for as many as it needs.

    A server whose answers are dropped by `texts` one after the other is not paid any longer.

    Answers in `output_dir`, rejected ones included, are not asked for again; failed requests are.
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

    rolled = roll_out(
        lambda: engine, examples, args, path=directory / SAMPLES, seed=seed,
        provenance={"stage": stage}, score=score, mine=mine, accept=accept,
        keep=keep, progress=progress,
        written=unless_useless(texts if args.teacher != "offline" else None),
    )  # fmt: skip
    lost = Counter(row["class"] for row in rolled.lost)
    if not rolled.samples:
        raise InputError(f"nothing was collected ({dict(lost)}). {last_words(rolled.lost)}")
    return Collected(rolled.samples, lost, engine.spending(), rolled.report)


def unless_useless(texts: FilterArgs | None) -> Callable[[list[Row]], None]:
    """Return a check of rows that raises `InputError` once the filters dropped many in a row."""
    in_a_row = 0

    def check(rows: list[Row]) -> None:
        nonlocal in_a_row
        for row in rows:
            if row["source"] == FALLBACK or texts is None:
                continue
            found = text_fault(row, texts)
            in_a_row = in_a_row + 1 if found else 0
            if found and in_a_row >= MAX_USELESS:
                raise InputError(
                    f"{MAX_USELESS} answers in a row were of no use. The last is dropped as "
                    f"{found[0]} ({found[1]}). Run the same command again to continue"
                )

    return check


def open_teacher(
    args: TeacherArgs, examples: list[Row], directory: Path, transcript: str, seed: int
) -> OfflineTeacher | ApiEngine:
    """Return the teacher; raise `InputError` for what it cannot be asked with."""
    args.check()
    offline = None
    if "offline" in (args.teacher, args.fallback):
        offline = OfflineTeacher(args.styles, seed, transcript)
        offline.check(examples)
        if args.teacher == "offline":
            return offline
    endpoints = endpoints_of(args)
    key_of(args)
    servers = [
        Server(one, reader(transcript, args.teacher), args.timeout, price_of(args, one))
        for one in endpoints
    ]
    return ApiEngine(
        args,
        servers,
        directory / REQUESTS,
        500 if args.teacher == "deepseek" else 64,
        limits=Limits(args.max_usd, args.max_tokens_total, args.max_requests),
        strict=False,
        fallback=None if offline is None else offline.replace,
    )


def endpoints_of(args: TeacherArgs) -> list[Endpoint]:
    """Return the servers of an API teacher, and what they are sent."""
    variable, deepseek = KEYS[args.teacher], args.teacher == "deepseek"
    urls = [read_address(url, variable) for url in args.urls] or [ADDRESSES[args.teacher]]
    model = args.model or DEEPSEEK_MODEL
    if deepseek and args.temperature is not None:
        logger.warning("temperature: DeepSeek ignores it while thinking")
    if deepseek and model == RETIRED:
        logger.warning("model: %s is retired; asking %s, which replaced it", model, DEEPSEEK_MODEL)
        model = DEEPSEEK_MODEL
    further: Row = {} if args.temperature is None else {"temperature": args.temperature}
    further |= {"thinking": {"type": "enabled"}} if deepseek else {}
    # OpenAI's own models refuse max_tokens; other servers do not all know the new name.
    limit = "max_tokens" if deepseek or args.urls else "max_completion_tokens"
    return [
        Endpoint(url, model, args.max_new_tokens, further | (args.extra_body or {}),
                 args.instruction, limit, variable=variable)
        for url in urls
    ]  # fmt: skip


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


def price_of(args: TeacherArgs, endpoint: Endpoint) -> Price | None:
    """Return the model's price; raise `InputError` if it is unknown and max_usd needs it."""
    # DeepSeek bills what is asked for through a proxy, too.
    host = "api.deepseek.com" if args.teacher == "deepseek" else endpoint.host
    price = find_price(host, endpoint.model, args.prices)
    if price is None and args.max_usd is not None:
        raise InputError(
            f"max_usd: the price of {endpoint.model!r} at {host} is not known; add it to a file "
            "that you name as `prices`, or use max_tokens_total or max_requests"
        )
    return price


def reader(transcript: str, teacher: str) -> Reader:
    """Return what turns a reply into a transcript, or raises `Rejected` with the reason."""

    def read_reply(choice: Choice, usage: Row | None) -> Row:
        reasoning, answer, found = _split(choice, transcript)
        parts = {"reasoning": reasoning.strip(), "answer": answer.strip()}
        odd = "" if choice.end else f" (finish_reason {choice.raw!r})"
        faults = {
            "truncated": choice.end == LENGTH
            and "the reply reached the limit of tokens; raise `max_new_tokens`",
            "content_filter": choice.end == FILTERED and "the reply was filtered",
            "unfinished_reasoning": found == "unclosed"
            and f"the reasoning was opened by {OPEN} and never closed{odd}; raise `max_new_tokens`",
            "no_answer": is_blank(answer)
            and f"the reply contains no answer{odd}; ask in `instruction` for one after the "
            "reasoning",
            "no_reasoning": is_blank(reasoning) and f"the reply contains no reasoning{odd}; {ASK}",
        }
        for kind, words in faults.items():
            if words:
                failure = Rejected(kind, words, usage=usage, said=choice.said)
                failure.too_short = kind == "truncated"
                raise failure
        for part, text in parts.items():
            if tag := next((tag for tag in TAGS if tag in text), None):
                words = f"the {part} contains the tag {tag}; ask in `instruction` for none"
                raise Rejected("tags", words, usage=usage, said=parts)
        completion = write(parts["reasoning"], parts["answer"], transcript)
        return {"completion": completion, "reasoning_source": found, "teacher": teacher}

    return read_reply


def _split(choice: Choice, transcript: str) -> tuple[str, str, str]:
    """Return reasoning, answer, and where the reasoning was found.

    That is a field of its own, or tags in the content: those of `<think>`, or of our own
    transcript when the teacher is a model that was trained on it.
    """
    content = choice.content
    if own_field := reasoning_of(choice.message):
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


class OfflineTeacher:
    """Write solutions from the data set's own metadata, in several styles, as real teachers do."""

    def __init__(self, styles: dict[str, float], seed: int, transcript: str) -> None:
        from chainforge.data.solver import STYLES

        for name, share in styles.items():
            if name not in STYLES:
                raise InputError(f"styles: no style {name!r}; {hint(str(name), STYLES)}")
            if type(share) not in (int, float) or not 0 <= share < float("inf"):
                raise InputError(f"styles: {name}: expected a share from 0 up, found {share!r}")
        if not sum(styles.values()):
            raise InputError("styles: at least one needs a share above 0")
        self.styles, self.seed, self.transcript = styles, seed, transcript

    def check(self, examples: list[Row]) -> None:
        """Raise `InputError` for a task without a solver, before any work."""
        first = {row["task"]: row for row in reversed(examples)}
        for task, row in first.items():
            for style, share in self.styles.items():
                if share and self._solve(row, style, random.Random(0)) is None:
                    raise InputError(
                        f"the offline teacher has no solver for the task {task!r}; take a task "
                        "that it knows (chain_sum, gsm_symbolic, ...) or another teacher"
                    )

    def spending(self) -> Row:
        """Return nothing: it costs nothing."""
        return {}

    def key(self, draw: Draw) -> str:
        """Return a hash of what decides the solution."""
        content = [draw.row["id"], self.styles, self.seed, self.transcript, draw.sample]
        return digest(["offline", *content])[:24]

    def sample(self, draws: Sequence[Draw], take: Take) -> None:
        """Write every solution."""
        for start in range(0, len(draws), AT_ONCE):
            part = draws[start : start + AT_ONCE]
            take([(draw, self.answer(draw) | {"request": self.key(draw)}) for draw in part])

    def answer(self, draw: Draw) -> Row:
        """Write a worked solution; the style is drawn by seed, row and sample."""
        rng = random.Random(f"{self.seed}/{draw.row['id']}/{draw.sample}")
        style = rng.choices(list(self.styles), list(self.styles.values()))[0]
        solved = self._solve(draw.row, style, rng)
        if solved is None:
            raise InputError(f"the offline teacher cannot solve row {draw.row['id']}")
        return {
            "completion": write(*solved, self.transcript),
            "source": "offline",
            "teacher": "offline",
            "model": "offline",
            "sampling": {"style": style},
            "finish_reason": "stop",
            "tokens": None,
        }

    def replace(self, draw: Draw) -> Row:
        """Write a solution in place of a failed request, labelled as such."""
        return self.answer(draw) | {"source": FALLBACK}

    def _solve(self, row: Row, style: str, rng: random.Random) -> tuple[str, str] | None:
        from chainforge.data.solver import solve

        if "entry" not in row:
            return None
        entry = json.loads(row["entry"])
        return solve(entry["metadata"]["source_dataset"], entry, style, rng)


def estimate(args: TeacherArgs, examples: list[Row], output_dir: str | None = None) -> str:
    """Return what a collection would ask for and cost, without asking.

    Answers in `output_dir` are left out. The length of an answer is unknown: `expected_tokens` is
    the guess, the limit of tokens the worst case.
    """
    args.check()
    asked = len(examples) * args.most
    if args.teacher == "offline":
        return f"teacher offline: {asked:,} answers, nothing to pay"
    endpoints = endpoints_of(args)
    endpoint, price = endpoints[0], price_of(args, endpoints[0])
    sizes = [len(turn["content"].encode("utf-8", "replace"))
             for row in examples for turn in endpoint.messages(row)]  # fmt: skip
    prompt = sum(sizes) / BYTES_PER_TOKEN / len(examples)
    there = _there(endpoints, args, examples, output_dir)
    left = asked - there
    limits = {name: value for name in ("max_usd", "max_tokens_total", "max_requests")
              if (value := getattr(args, name)) is not None}  # fmt: skip
    longest = max(sum(endpoint.most_tokens(row)) for row in examples)
    lines = {
        "teacher": f"{args.teacher}: {endpoint.model} at {endpoint.host}",
        "answers": f"{asked:,} ({len(examples):,} prompts x {args.most})"
        + (f", {there:,} of them there already" if there else "")
        + ("; fewer where enough are accepted earlier" if args.adaptive else ""),
        "tokens": f"{left * prompt:,.0f} in, {left * args.expected_tokens:,.0f} out, at "
        f"{args.expected_tokens:,} an answer (expected_tokens)",
        "cost": "unknown: name a file with the model's price as `prices`",
    }
    if price is not None:
        worst = sum(price.worst(*endpoint.most_tokens(row)) for row in examples)
        hours = {"off-peak": price.off_peak, "peak": price.peak}
        costs = (f"{usd(left * rates.cost(0, round(prompt), args.expected_tokens))} {name}"
                 for name, rates in hours.items())  # fmt: skip
        now = price.at(datetime.now(UTC))
        lines |= {
            "cost": ", ".join(costs) + f"; it is {'peak' if now is price.peak else 'off-peak'} now",
            "at most": f"{usd(worst * left / len(examples))}, if each has max_new_tokens "
            f"({args.max_new_tokens:,}) at peak",
            "prices": f"of {price.date}, {price.source or 'your own'}: ${now.cache_miss:g} in, "
            f"${now.output:g} out per {MILLION:,} tokens now",
        }
    said = ", ".join(f"{name} {value:,}" for name, value in limits.items())
    lines["limits"] = said or f"none: set max_usd (one answer can have {longest:,} tokens)"
    return "\n".join(f"{name:<9}{text}" for name, text in lines.items())


def _there(
    endpoints: list[Endpoint], args: TeacherArgs, examples: list[Row], output_dir: str | None
) -> int:
    """Count the answers that an earlier run left, good and rejected."""
    found: set[str] = set()
    for name in (SAMPLES, FAILURES) if output_dir else ():
        path = Path(output_dir or "") / name
        if path.is_file():
            rows = read_rows(path, torn_tail=True)
            found |= {row["request"] for row in rows if row.get("rejected", True)}
    draws = (Draw(row, number, 0) for row in examples for number in range(args.most))
    return sum(request_key(endpoints, draw) in found for draw in draws)


def card_sections(args: TeacherArgs, rows: list[Row], spending: Row) -> dict[str, str]:
    """Return what a data card says of the teacher of the kept `rows`: who, terms, and cost."""
    asked = [row for row in rows if row.get("teacher") != "offline"]
    groups = Counter(tuple(code(row.get(n)) for n in ("source", "model", "host")) for row in asked)
    lines = [f"- {count:,} rows: asked for `{source}` at `{host}`, answered by `{model}`"
             for (source, model, host), count in groups.most_common()]  # fmt: skip
    own = Counter(row["source"] for row in rows if row.get("teacher") == "offline")
    for source, count in own.items():
        why = " They replace answers of a teacher that failed." if source == FALLBACK else ""
        lines.append(f"- {count:,} rows: `{source}`. {OFFLINE}{why}")
    if asked:
        days = sorted(row["time"][:10] for row in asked)
        lines.append(f"- collected from {days[0]} to {days[-1]}")
        lines.append(f"- sent with each prompt: `{code(asked[0]['sampling'])}`")
        if args.instruction:
            lines.append(f"- under the instruction: `{code(args.instruction)}`")
    hosts = ", ".join(sorted({f"`{code(row['host'])}`" for row in rows if row.get("host")}))
    terms = TERMS[args.teacher].format(hosts=hosts or "the server")
    sections = {"Teacher": "\n".join(lines), "Terms": terms}
    return sections | ({"Cost": _cost(spending)} if spending else {})


def _cost(spending: dict[str, Any]) -> str:
    counts = f"{spending['requests']:,} requests and {spending['tokens']:,} tokens"
    if spending["usd"] is None:
        return f"{counts}; price unknown."
    text = f"{usd(spending['usd'])} for {counts}"
    if spending["untold_requests"]:
        most = usd(spending["untold_usd_at_most"] or 0)
        text += f", and at most {most} for {spending['untold_requests']:,} requests of unknown cost"
    return f"{text}."
