"""The round trip of a transcript: through the chat template, the tokenizer, and the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from chainforge.chain.plan import Step
from chainforge.core.errors import InputError, first_line
from chainforge.core.options import truth
from chainforge.core.transcript import tags_of, write
from chainforge.doctor import material, supply
from chainforge.doctor.findings import Context, Finding, NotHere, Training, of_stage
from chainforge.generate.settings import ends_of
from chainforge.train.templates import check_template


def trained_tokens(
    tokenizer: Any, row: Any, *, assistant_only: bool = False
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a row of SFT, and which of them carry loss, as TRL's SFTTrainer has it.

    `row` has `prompt` and `completion` messages. With `assistant_only` (`assistant_only_loss`) TRL
    replaces the templates that it knows by its own training templates.
    """
    from trl.chat_template_utils import get_training_chat_template
    from trl.data_utils import common_prefix_length

    template = get_training_chat_template(tokenizer) if assistant_only else None

    def tokens(turns: Any, **options: Any) -> Any:
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=True, return_dict=True, **options
        )

    prompt = tokens(row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = tokens(row["prompt"] + row["completion"], return_assistant_tokens_mask=assistant_only)
    ids = list(whole["input_ids"])
    start = common_prefix_length(prompt, ids)
    mask = whole["assistant_masks"] if assistant_only else [1] * len(ids)
    return ids, [place >= start and bool(bit) for place, bit in enumerate(mask)]


def check_transcripts(context: Context) -> Iterator[Finding]:
    """See for each training stage that tags survive, carry loss, and that ends are learnt."""
    sampling = [step for step in context.steps if step.stage.recipe in ("reject", "evaluate")]
    looks = [(stage.name, _of(stage, context)) for stage in context.training]
    looks += [(step.stage.name, _sampled(step, context)) for step in sampling]
    for name, findings in looks:
        try:
            yield from findings
        except NotHere as reason:
            yield Finding("warning", "transcript", f"not looked at: {reason}", name)
        except InputError as error:
            yield Finding("error", "transcript", str(error), name)


def _sampled(step: Step, context: Context) -> Iterator[Finding]:
    """See that the models of a stage that samples take its prompts."""
    if step.given.get("engine") != "api" and "pool" not in step.given:
        prompts = [row["prompt"] for row in supply.examples(context, step)]
        for model in step.stage.models or [step.stage.model or ""]:
            tokenizer = material.tokenizer(context, model, step)
            root, form = context.root(model), material.transcript_of(step)
            check_template(tokenizer, form, root, prompts)
    yield from ()


def _of(stage: Training, context: Context) -> Iterator[Finding]:
    model = stage.step.stage.model or ""
    form, root = material.transcript_of(stage.step), context.root(model)
    tokenizer = material.tokenizer(context, model, stage.step)
    row = _row(stage, context)
    asked = [row] if stage.recipe == "sft" else supply.examples(context, stage.step)
    options = stage.step.given.get("chat_template_kwargs")
    options = options if isinstance(options, dict) else {}
    try:
        check_template(tokenizer, form, root, [one["prompt"] for one in asked], **options)
        only = truth(stage.step.given.get("assistant_only_loss")) is True and stage.recipe == "sft"
        ids, loss = trained_tokens(tokenizer, row, assistant_only=only)
    except InputError:
        raise
    except Exception as error:  # a template is a program, and may raise anything
        raise InputError(f"{root}: the chat template fails: {first_line(error)}") from error
    if stage.recipe == "sft" and truth(stage.step.given.get("completion_only_loss")) is False:
        loss = [True] * len(ids)
    carrying = [one for one, carries in zip(ids, loss, strict=True) if carries]
    problems = list(_lost(tokenizer.decode(carrying), row, form)) if stage.recipe == "sft" else []
    ending = next((one for one in carrying[::-1] if tokenizer.decode([one]).strip()), None)
    unlearnt = list(_unlearnt(stage, context, tokenizer, ending))
    if stage.recipe != "sft":
        if stage.step.stage.model in (context.chain.models if context.chain else {}):
            yield from (Finding("warning", "transcript", text, stage.name) for text in unlearnt)
        yield from of_stage("transcript", stage.name, problems, f"the tags of {form} survive")
        return
    end = tokenizer.decode([ending]) if ending is not None else ""
    fine = f"the tags of {form} survive and carry loss, and so does {end}, which ends a turn"
    findings = of_stage("transcript", stage.name, [*problems, *unlearnt], fine)
    sample = {"tokens": [tokenizer.decode([one]) for one in ids], "loss": loss}
    for number, one in enumerate(findings):
        data = {"sample": sample} if number == 0 else None
        yield Finding(one.level, one.check, one.text, one.stage, data)


def _row(stage: Training, context: Context) -> Any:
    """Return the first row that an SFT stage learns from, or one in the form."""
    if stage.recipe == "sft":
        try:
            for part in supply.learnt_from(context, stage.step):
                if part.rows:
                    return part.rows[0]
        except (InputError, NotHere):
            pass  # the check of rows says so
    text = write("1 + 1 = 2", "2", material.transcript_of(stage.step))
    return {
        "prompt": [{"role": "user", "content": "1 + 1 ="}],
        "completion": [{"role": "assistant", "content": text}],
    }


def _lost(carrying: str, row: Any, form: str) -> Iterator[str]:
    """Return which tags of a row carry no loss, or more than they should."""
    said = row["completion"][0]["content"]
    for tag in tags_of(form).all:
        if carrying.count(tag) != said.count(tag):
            yield (
                f"{tag} carries loss {carrying.count(tag)} times, and is written "
                f"{said.count(tag)} times: the chat template or the tokenizer changes it"
            )


def _unlearnt(
    stage: Training, context: Context, tokenizer: Any, ending: int | None
) -> Iterator[str]:
    """Report when the last token that is learnt is not one at which generation stops."""
    name = stage.name if stage.recipe == "sft" else stage.step.stage.model or ""
    own = material.end_token(context, name)
    stops = {tokenizer.convert_tokens_to_ids(own)} if own else set()
    stops |= ends_of(context.root(name), local_files_only=True)
    if ending in stops:
        return
    last = tokenizer.decode([ending]) if ending is not None else "nothing"
    if ending in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[ending].special:
        do = f"set `eos_token: {last}` in the SFT stage"
    else:
        do = f"use a chat template that writes {own} after the assistant's text"
    yield (
        f"a turn ends with {last!r}, and generation stops at "
        f"{', '.join(repr(tokenizer.decode([one])) for one in sorted(stops))}: every completion "
        f"would be cut off; {do}"
    )
