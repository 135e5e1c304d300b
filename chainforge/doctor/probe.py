"""Sample a few completions from the models that stages start from, and count those cut off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from chainforge.chain.plan import Step
from chainforge.core.errors import InputError, first_line
from chainforge.doctor import material, supply
from chainforge.doctor.findings import Context, Finding, NotHere
from chainforge.doctor.lengths import SAMPLING, limit_of
from chainforge.generate.settings import Draw, Drawn, SamplingArgs, seed_of
from chainforge.train.templates import load_tokenizer

PROMPTS = 8
MANY = 0.25  # share cut off from which a stage learns from what has no end


def probe(context: Context) -> Iterator[Finding]:
    """Write `PROMPTS` completions for each stage that samples, where its model is there."""
    for step in context.steps:
        if step.stage.recipe in ("grpo", "distill", "reject") and step.stage.model:
            if step.given.get("engine") == "api":
                continue
            try:
                yield _of(context, step)
            except (InputError, NotHere) as error:
                yield Finding("warning", "probe", f"not sampled: {error}", step.stage.name)
            except Exception as error:  # weights that are none, too little memory: what may be
                words = f"{step.stage.model} cannot be sampled from: {first_line(error)}"
                yield Finding("error", "probe", words, step.stage.name)


def _of(context: Context, step: Step) -> Finding:
    path = step.inputs["model"].path
    made = context.chain is not None and step.stage.model not in context.chain.models
    if made and not (Path(path) / "config.json").is_file():
        text = f"{step.stage.model} is not made yet: look again when it is"
        return Finding("ok", "probe", text, step.stage.name)
    rows = supply.examples(context, step)[:PROMPTS]
    key, limit = SAMPLING[step.stage.recipe], limit_of(step)
    done = _sample(context, step, path, rows, limit)
    cut = sum(reason == "length" for reason, _ in done)
    longest = max(tokens for _, tokens in done)
    data = {"sampled": len(done), "cut": cut, "longest": longest, "limit": limit}
    words = f"{cut} of {len(done)} completions of {step.stage.model} are cut off at {key}, {limit}"
    if cut > MANY * len(done):
        text = f"{words}: raise it, or first teach the model to end (SFT)"
        return Finding("warning", "probe", text, step.stage.name, data)
    return Finding("ok", "probe", f"{words}; the longest has {longest}", step.stage.name, data)


def _sample(
    context: Context, step: Step, path: str, rows: list[dict[str, object]], limit: int
) -> list[tuple[str, int]]:
    """Return how each completion ended, and its length; what was sampled is not kept."""
    from transformers.utils.logging import disable_progress_bar

    from chainforge.generate.local import LocalEngine, open_policy

    disable_progress_bar()
    given = step.given
    args = SamplingArgs(
        num_samples=1,
        max_new_tokens=limit,
        temperature=float(given.get("temperature", 1.0)),
        top_p=float(given.get("top_p", 1.0)),
        top_k=int(given.get("top_k", 0)),
        generation_batch_size=PROMPTS,
    )
    tokenizer = load_tokenizer(
        path,
        material.transcript_of(step),
        template=given.get("chat_template_path"),
        rows=rows,
    )
    engine = LocalEngine(open_policy(path, dtype="auto"), tokenizer, args)
    found: list[tuple[str, int]] = []

    def take(batch: list[Drawn]) -> None:
        found.extend((str(row["finish_reason"]), int(row["tokens"])) for _, row in batch)

    seed = int(given.get("seed", 42))
    engine.sample([Draw(row, 0, seed_of(seed, str(row["id"]), 0)) for row in rows], take)
    return found
