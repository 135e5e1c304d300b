"""Money in words: what a collection would cost, and why one stopped."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from chainforge.core.jsonl import Row, read_rows
from chainforge.generate.endpoint import Endpoint, price_of
from chainforge.generate.ledger import Amount, Ledger
from chainforge.generate.prices import MILLION, Price
from chainforge.generate.progress import usd
from chainforge.generate.results import FAILURES, SAMPLES, Results
from chainforge.generate.settings import TeacherArgs, check

BYTES_PER_TOKEN = 4  # of English, about
UNKNOWN = "unknown: name a file with the model's price as `prices`"


def budget_message(
    args: TeacherArgs, limit: str, worst: Amount, ledger: Ledger, results: Results
) -> str:
    """Return which limit ended the run, what was spent, and how to go on."""
    spending = ledger.spending
    told, unsure = spending.told, spending.unsure
    parts = {
        "max_usd": (told.usd, unsure.usd, worst.usd),
        "max_tokens_total": (told.tokens, unsure.tokens, worst.tokens),
        "max_requests": (spending.requests, 0, 1),
    }[limit]
    words = [usd(part or 0) if limit == "max_usd" else f"{part:,}" for part in parts]
    rest = f", and up to {words[1]} for {spending.unsure_requests} requests whose cost nobody told"
    return (
        f"by {limit} ({getattr(args, limit):,}): {words[0]} spent{rest if parts[1] else ''}; "
        f"one more request could take {words[2]}. {len(results.kept):,} of "
        f"{len(results.jobs):,} answers are in {results.samples_path}; raise {limit} and run the "
        "same command to go on from here"
    )


def estimate(args: TeacherArgs, examples: list[Row], output_dir: str | None = None) -> str:
    """Return what a collection would ask for and cost, without asking.

    Answers that `output_dir` holds already are left out. An answer's length cannot be known:
    `expected_tokens` is the guess, the limit of tokens the worst case.
    """
    check(args)
    asked = len(examples) * args.samples_per_prompt
    if args.teacher == "offline":
        return f"teacher offline: {asked:,} answers, nothing to pay"
    endpoint = Endpoint.of(args)
    price = price_of(args, endpoint)
    sizes = [sum(len(turn["content"].encode("utf-8", "replace")) for turn in endpoint.messages(row))
             for row in examples]  # fmt: skip
    prompt = sum(sizes) / BYTES_PER_TOKEN / len(sizes)
    there = _there(endpoint, args, examples, output_dir)
    left = asked - there
    most = max(sum(endpoint.most_tokens(row)) for row in examples)
    lines = {
        "teacher": f"{args.teacher}: {endpoint.model} at {endpoint.host}",
        "answers": f"{asked:,} ({len(examples):,} prompts x {args.samples_per_prompt})"
        + (f", {there:,} of them there already" if there else "")
        + (f"; fewer where {args.until_correct} are right" if args.until_correct else ""),
        "tokens": f"{left * prompt:,.0f} in, {left * args.expected_tokens:,.0f} out, at "
        f"{args.expected_tokens:,} an answer (expected_tokens)",
        **_costs(args, price, left, prompt, endpoint, examples),
        "limits": ", ".join(
            f"{name} {value:,}"
            for name in ("max_usd", "max_tokens_total", "max_requests")
            if (value := getattr(args, name)) is not None
        )
        or f"none: set max_usd (one answer can have {most:,} tokens)",
    }
    return "\n".join(f"{name:<9}{text}" for name, text in lines.items())


def _there(
    endpoint: Endpoint, args: TeacherArgs, examples: list[Row], output_dir: str | None
) -> int:
    """Count the answers that an earlier run left, good and rejected."""
    found: set[str] = set()
    for name in (SAMPLES, FAILURES):
        path = Path(output_dir or "") / name
        if output_dir and path.is_file():
            rows = read_rows(path, torn_tail=True)
            found |= {row["request"] for row in rows if row.get("rejected", True)}
    keys = (
        endpoint.request_key(row, index)
        for row in examples
        for index in range(args.samples_per_prompt)
    )
    return sum(key in found for key in keys)


def _costs(
    args: TeacherArgs,
    price: Price | None,
    left: int,
    prompt: float,
    endpoint: Endpoint,
    examples: list[Row],
) -> dict[str, str]:
    if price is None:
        return {"cost": UNKNOWN}
    hours = {"off-peak": price.off_peak, "peak": price.peak}
    if price.peak == price.off_peak:
        hours = {"any hour": price.peak}
    now = "peak" if price.is_peak(datetime.now(UTC)) else "off-peak"
    costs = [
        f"{usd(left * rates.cost(0, round(prompt), args.expected_tokens))} {name}"
        for name, rates in hours.items()
    ]
    worst = sum(price.worst(*endpoint.most_tokens(row)) for row in examples)
    worst *= left / len(examples)
    rates = price.peak if now == "peak" else price.off_peak
    return {
        "cost": ", ".join(costs) + (f"; it is {now} now" if len(hours) > 1 else ""),
        "at most": f"{usd(worst)}, were each as long as max_tokens ({args.max_tokens:,}) at peak",
        "prices": f"of {price.date}, {price.source or 'your own'}: ${rates.cache_miss:g} in, "
        f"${rates.output:g} out per {MILLION:,} tokens now",
    }
