"""Prompts and answers in tokens, against every limit that would cut them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from chainforge.chain.plan import Step
from chainforge.core.errors import InputError, first_line
from chainforge.core.jsonl import Row
from chainforge.doctor import material, supply
from chainforge.doctor.findings import Context, Finding, NotHere
from chainforge.train.templates import lengths_of

SAMPLING = {"grpo": "max_completion_length", "distill": "max_completion_length",
            "reject": "max_new_tokens", "evaluate": "max_new_tokens"}  # fmt: skip
DEFAULT_LIMIT = 512  # of TRL's configurations and of SamplingArgs
CHUNK = 256  # rows that are counted at once, the longest in characters first


@dataclass(frozen=True)
class Longest:
    """The tokens of the longest of some texts, and how many are over a limit."""

    tokens: int
    over: int
    of: int


def check_tokens(context: Context) -> Iterator[Finding]:
    """Count the rows of each stage that are longer than it has room for."""
    fine: dict[str, str] = {}
    for step in context.steps:
        try:
            if step.stage.recipe == "sft":
                yield from _of_sft(context, step, fine)
            elif step.stage.recipe in SAMPLING and step.given.get("engine") != "api":
                yield from _of_sampling(context, step, fine)
        except (NotHere, InputError):
            continue  # that there are no rows, or no tokenizer, is said by the checks of these
        except Exception as error:  # a template is a program, and may raise anything
            text = f"not counted: {first_line(error)}"
            yield Finding("warning", "lengths", text, step.stage.name)
    if fine:
        words = ", ".join(f"{name} {text}" for name, text in fine.items())
        unseen = "; +: what will be written is not known" if "+" in words else ""
        yield Finding("ok", "lengths", f"tokens at most: {words}{unseen}", None, {"stages": fine})


def _of_sft(context: Context, step: Step, fine: dict[str, str]) -> Iterator[Finding]:
    parts, name = supply.learnt_from(context, step), step.stage.name
    model = step.stage.model or ""
    if not parts:
        return
    tokenizer = material.tokenizer(context, model, step)
    limit = material.training_of(context, step).get("max_length")
    room = material.context_length(context, model)
    rows = [row for part in parts for row in part.rows]
    found = longest(rows, _said, lambda some: whole(tokenizer, some), limit or room)
    if limit is not None and found.over:
        text = (
            f"max_length: {found.over:,} of {found.of:,} rows have more than {limit} tokens, and "
            f"the longest {found.tokens}: the stage refuses them; raise max_length, or drop them "
            "when the rows are made"
        )
        yield Finding("error", "lengths", text, name, vars(found))
    elif room is not None and found.tokens > room:
        text = f"the longest row has {found.tokens} tokens, and the model knows {room} places"
        yield Finding("error", "lengths", text, name, vars(found))
    else:
        known = "" if all(part.real for part in parts) else "+"
        fine[name] = f"{found.tokens}{known} of {min(limit or room or 0, room or limit or 0)}"


def _of_sampling(context: Context, step: Step, fine: dict[str, str]) -> Iterator[Finding]:
    if not supply.examples(context, step):
        return
    name, key = material.sampled(step), SAMPLING[step.stage.recipe]
    limit, room = limit_of(step), material.context_length(context, name)
    found = longest_prompt(context, step)
    if room is not None and found.tokens >= room:
        text = (
            f"prompts have up to {found.tokens} tokens, and the model knows {room} places: nothing "
            f"can be written after them, and TRL cuts no prompt; {found.over:,} of {found.of:,} "
            f"leave less than {key}, {limit}: leave them out"
        )
        yield Finding("error", "lengths", text, step.stage.name, vars(found))
    elif room is not None and found.over:
        text = (
            f"{found.over:,} of {found.of:,} prompts leave less than {key}, {limit}, of the {room} "
            f"places that the model knows: write {key}: {room - found.tokens}, or leave them out"
        )
        yield Finding("warning", "lengths", text, step.stage.name, vars(found))
    else:
        fine[step.stage.name] = f"{found.tokens} and {limit}" + (f" of {room}" if room else "")
    yield from _answers(context, step, key, limit)


def limit_of(step: Step) -> int:
    """Return how many tokens a stage that samples may write."""
    return int(step.given.get(SAMPLING.get(step.stage.recipe, ""), DEFAULT_LIMIT))


def longest_prompt(context: Context, step: Step) -> Longest:
    """Return a stage's longest prompt, and how many leave the model less room than its limit."""

    def make() -> Longest:
        name = material.sampled(step)
        tokenizer, room = (
            material.tokenizer(context, name, step),
            material.context_length(context, name),
        )
        return longest(
            supply.examples(context, step),
            lambda row: row["prompt"],
            lambda some: material.prompt_tokens(tokenizer, some),
            None if room is None else room - limit_of(step),
        )

    found: Longest = material.once(context, ("longest prompt", step.stage.name), make)
    return found


def _answers(context: Context, step: Step, key: str, limit: int) -> Iterator[Finding]:
    """Hold the answers that a policy has learnt from to the length that it may write."""
    tokenizer = material.tokenizer(context, material.sampled(step), step)
    parts = [part for part in supply.taught(context, material.sampled(step)) if part.real]
    rows = [row for part in parts for row in part.rows]
    if not rows:
        return

    def count(some: Sequence[Row]) -> list[int]:
        texts = [row["completion"][0]["content"] for row in some]
        return [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    found = longest(rows, lambda row: row["completion"], count, limit)
    if found.over:
        text = (
            f"{found.over:,} of the {found.of:,} answers that the policy learns from have more "
            f"than {key}, {limit} tokens, and the longest {found.tokens}: such will be cut; write "
            f"{key}: {found.tokens}"
        )
        yield Finding("warning", "lengths", text, step.stage.name, vars(found))


def longest(
    rows: Sequence[Row],
    turns: Callable[[Row], list[Any]],
    count: Callable[[Sequence[Row]], list[int]],
    limit: int | None,
) -> Longest:
    """Count the tokens of the rows that are longest in characters, as long as some are over.

    What is short in characters is short in tokens, so that not all rows need be counted.
    """
    order = sorted(rows, key=lambda row: -sum(len(turn["content"]) for turn in turns(row)))
    most = over = 0
    for start in range(0, len(order), CHUNK):
        sizes = count(order[start : start + CHUNK])
        most = max(most, *sizes)
        more = sum(size > limit for size in sizes) if limit is not None else 0
        over += more
        if not more:
            break
    return Longest(most, over, len(rows))


def whole(tokenizer: Any, rows: Sequence[Row]) -> list[int]:
    """Return the tokens of rows of SFT, prompt and completion together."""
    columns = {name: [row[name] for row in rows] for name in ("prompt", "completion")}
    return lengths_of(columns, tokenizer)


def _said(row: Row) -> list[Any]:
    return [*row["prompt"], *row["completion"]]
