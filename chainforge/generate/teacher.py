"""Teachers: DeepSeek, any OpenAI-compatible server, and the offline solver, as engines.

A teacher's answer becomes a transcript only if it has a whole reasoning and an answer; anything
else is rejected with its reason. `samples.jsonl` has every answer, right or wrong, `failures.jsonl`
why there is none, and `requests.jsonl` what each request cost.
"""

from __future__ import annotations

import ast
import json
import logging
import operator
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError, refuse_unknown
from chainforge.core.jsonl import Row
from chainforge.core.secrets import read_secret
from chainforge.core.transcript import DEFAULT, PRESETS, is_blank, read, write
from chainforge.data.datasets import FALLBACK
from chainforge.data.filters import FilterArgs, text_fault
from chainforge.generate.api import (
    FILTERED,
    LENGTH,
    MAX_USELESS,
    ApiEngine,
    Endpoint,
    Reader,
    Reply,
    digest,
    last_words,
    reasoning_of,
)
from chainforge.generate.budget import find_price, usd
from chainforge.generate.build import code, counted
from chainforge.generate.sampling import Accept, Progress, roll_out
from chainforge.generate.settings import KEYS, Draw, Take, TeacherArgs

logger = logging.getLogger(__name__)

ADDRESSES = {"deepseek": "https://api.deepseek.com", "openai": "https://api.openai.com/v1"}
DEEPSEEK_MODEL, RETIRED = "deepseek-flash", "deepseek-reasoner"
OPEN, CLOSE = "<think>", "</think>"
TAGS = tuple(dict.fromkeys(tag for preset in PRESETS.values() for tag in preset.all))
AT_ONCE = 64
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
    offline = isinstance(engine, OfflineTeacher)
    key_of = engine.key if isinstance(engine, OfflineTeacher) else engine.endpoint.key
    prompts = {row["id"]: row for row in examples}

    def mine(row: Row) -> bool:
        prompt = prompts.get(row["id"])
        return prompt is not None and row.get("request") == key_of(
            Draw(prompt, row["sample"], seed)
        )

    rolled = roll_out(
        lambda: engine, examples, args, path=directory / "samples.jsonl", seed=seed,
        provenance={"stage": stage}, score=score, mine=mine, accept=accept,
        keep=keep, progress=progress, written=unless_useless(None if offline else texts),
    )  # fmt: skip
    lost = Counter(row["class"] for row in rolled.lost)
    if not rolled.samples:
        raise InputError(f"nothing was collected ({dict(lost)}). {last_words(rolled.lost)}")
    return Collected(rolled.samples, lost, engine.spending())


def unless_useless(texts: FilterArgs | None) -> Callable[[list[Row]], None]:
    """Return a check of rows that raises `InputError` once the filters dropped many in a row."""
    in_a_row = 0

    def check(rows: list[Row]) -> None:
        nonlocal in_a_row
        for row in rows:
            found = text_fault(row, texts) if texts is not None else None
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
    offline = None
    if "offline" in (args.teacher, args.fallback):
        offline = OfflineTeacher(args.styles, seed, transcript)
        offline.check(examples)
        if args.teacher == "offline":
            return offline
    endpoint = endpoint_of(args)
    key_of(args)
    return ApiEngine(
        args,
        endpoint,
        reader(transcript, args.teacher),
        directory / "requests.jsonl",
        500 if args.teacher == "deepseek" else 64,
        strict=False,
        fallback=None if offline is None else offline.replace,
    )


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
        further | (args.extra_body or {}),
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
        tag = next((tag for tag in TAGS if tag in reasoning or tag in answer), None)
        faults = {
            "truncated": reply.end == LENGTH
            and "the reply reached the limit of tokens; raise `max_new_tokens`",
            "content_filter": reply.end == FILTERED and "the reply was filtered",
            "unfinished_reasoning": found == "unclosed"
            and f"the reasoning was opened by {OPEN} and never closed; raise `max_new_tokens`",
            "no_answer": is_blank(answer)
            and "the reply contains no answer; ask in `instruction` for one after the reasoning",
            "no_reasoning": is_blank(reasoning)
            and "the reply contains no reasoning; ask for it with `instruction: Reason between "
            "<think> and </think>, then give the final answer.`, or start the server with its "
            "reasoning parser",
            "tags": tag and f"the reply contains the tag {tag}; ask in `instruction` for none",
        }
        for kind, words in faults.items():
            if words:
                raise reply.skip(kind, words)
        completion = write(reasoning, answer, transcript)
        return {"completion": completion, "reasoning_source": found, "teacher": teacher}

    return read_answer


def _split(reply: Reply, transcript: str) -> tuple[str, str, str]:
    """Return reasoning, answer, and where the reasoning was found.

    That is a field of its own, or tags in the content: those of `<think>`, or of our own
    transcript when the teacher is a model that was trained on it.
    """
    content = reply.content
    if own_field := reasoning_of(reply.message):
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
    """Write solutions from the data set's own metadata, in several styles, as real teachers do.

    All are right; what differs is whether a small student can follow how the answer was reached.
    """

    def __init__(self, styles: dict[str, float], seed: int, transcript: str) -> None:
        refuse_unknown(styles, STYLES, "styles: ")
        if not sum(styles.values()) > 0 or min(styles.values()) < 0:
            raise InputError(f"styles: expected shares from 0 up, one of them above, not {styles}")
        self.styles, self.seed, self.transcript = styles, seed, transcript

    def check(self, examples: list[Row]) -> None:
        """Raise `InputError` for a task without a solver, before any work."""
        for task, row in {row["task"]: row for row in reversed(examples)}.items():
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
        return digest(["offline", *content])

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
        same = dict.fromkeys(("source", "teacher", "model"), "offline")
        return same | {
            "completion": write(*solved, self.transcript),
            "sampling": {"style": style},
            "finish_reason": "stop",
            "tokens": None,
        }

    def replace(self, draw: Draw) -> Row:
        """Write a solution in place of a failed request, labelled as such."""
        return self.answer(draw) | {"source": FALLBACK}

    def _solve(self, row: Row, style: str, rng: random.Random) -> tuple[str, str] | None:
        if "entry" not in row:
            return None
        entry = json.loads(row["entry"])
        return solve(entry["metadata"]["source_dataset"], entry, style, rng)


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
    asked = [row for row in rows if row.get("teacher") != "offline"]
    lines = [
        f"- {count:,} rows: asked for `{source}` at `{host}`, answered by `{model}`"
        for (source, model, host), count in counted(asked, "source", "model", "host")
    ]
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
    if not spending:
        return sections
    money = "price unknown" if spending["usd"] is None else usd(spending["usd"])
    text = f"{money} for {spending['requests']:,} requests and {spending['tokens']:,} tokens"
    if spending["untold_usd_at_most"]:
        most = usd(spending["untold_usd_at_most"])
        text += f", and at most {most} for {spending['untold_requests']:,} requests of unknown cost"
    return sections | {"Cost": f"{text}."}


# Of the offline teacher: some teachers write every step, some answer at once.
STYLES = ("careful", "hasty")

_HASTY = ("I see it at once: {answer}.", "That is {answer}.", "It must be {answer}.")
_OPERATORS: dict[type[ast.operator], tuple[str, Callable[[int, int], int]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
}


def solve(
    task_name: str, entry: dict[str, Any], style: str, rng: random.Random
) -> tuple[str, str] | None:
    """Return (reasoning, answer) for a reasoning-gym entry, or None where there is no solver.

    `task_name` is the data set's name, such as `chain_sum`; `entry` its item, with `question`,
    `answer` and `metadata`; `style` is `careful` (every step) or `hasty` (one short line); `rng`
    chooses between the phrasings of a style. Raises `ValueError` if the worked result is not
    the data set's answer.
    """
    solver, gold = _SOLVERS.get(task_name), str(entry["answer"])
    if solver is None:
        return None
    if style == "hasty":
        return rng.choice(_HASTY).format(answer=gold), gold
    worked = solver(entry["metadata"], rng)
    if worked is None:
        return None
    reasoning, result = worked
    # gsm_symbolic's own text may end in 87.0 where the answer is 87.
    if result.removesuffix(".0") != gold.removesuffix(".0"):
        raise ValueError(f"{task_name}: worked {result!r}, but the answer is {gold!r}: {entry}")
    return reasoning, gold


def reduce_expression(expression: str) -> tuple[list[str], int] | None:
    """Evaluate `+ - *` and brackets one operation at a time, from left to right.

    Returns the equations in the order they are worked and the value, or None for anything that is
    not such an expression.
    """
    steps: list[str] = []
    try:
        return steps, _reduce(ast.parse(expression.strip(), mode="eval").body, steps)
    except (SyntaxError, ValueError):
        return None


def _reduce(node: ast.expr, steps: list[str]) -> int:
    """Return the value of a tree, appending each equation to `steps`; raise `ValueError`."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _reduce(node.operand, steps)
        if not isinstance(node.operand, ast.Constant):
            steps.append(f"0-{value}={-value}")
        return -value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        sign, apply = _OPERATORS[type(node.op)]
        left, right = _reduce(node.left, steps), _reduce(node.right, steps)
        value = apply(left, right)
        steps.append(f"{left}{sign}{right}={value}")
        return value
    raise ValueError("not an expression of + - * and brackets")


def _phrase(steps: list[str], rng: random.Random) -> str:
    """Join equations in one of three wordings."""
    wordings = (
        "\n".join(steps),
        "Step by step: " + ", ".join(steps) + ".",
        "First " + ", then ".join(steps) + ".",
    )
    return wordings[rng.randrange(3)]


def _expression(metadata: dict[str, Any], rng: random.Random) -> tuple[str, str] | None:
    worked = reduce_expression(metadata["expression"])
    if worked is None:
        return None
    steps, value = worked
    return _phrase(steps or [f"{value}={value}"], rng), str(value)


def _legs(metadata: dict[str, Any], rng: random.Random) -> tuple[str, str] | None:
    """Count one animal after the other, keeping the running total."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    steps: list[str] = []
    total = 0
    for animal, count in metadata["animals"].items():
        legs = count * ANIMALS[animal]
        steps.append(f"{animal} {count}*{ANIMALS[animal]}={legs}")
        if len(steps) > 1:
            steps.append(f"{total}+{legs}={total + legs}")
        total += legs
    return (_phrase(steps, rng), str(total)) if steps else None


def _gsm_symbolic(metadata: dict[str, Any], rng: random.Random) -> tuple[str, str] | None:
    """Return the data set's own solution; its last line `#### 288` is the answer."""
    reasoning, mark, answer = str(metadata["answer_cot"]).rpartition("####")
    return (reasoning.strip(), answer.strip()) if mark and reasoning.strip() else None


_Solver = Callable[[dict[str, Any], random.Random], tuple[str, str] | None]
_SOLVERS: dict[str, _Solver] = {
    "basic_arithmetic": _expression,
    "chain_sum": _expression,
    "gsm_symbolic": _gsm_symbolic,
    "leg_counting": _legs,
}
