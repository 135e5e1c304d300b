"""Whether teacher and student of a distillation by probabilities share a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

from chainforge.core.errors import InputError
from chainforge.doctor import material
from chainforge.doctor.findings import Context, Finding, NotHere, Training, of_stage
from chainforge.generate.settings import ends_of
from chainforge.train.distill import Sizes, differences, rows_of, tokens_of


def check_vocabularies(context: Context) -> Iterator[Finding]:
    """Compare the tokenizers that student and teacher go back to, and how both are padded."""
    for stage in context.training:
        if stage.recipe == "distill":
            yield from _of(stage, context)


def _of(stage: Training, context: Context) -> Iterator[Finding]:
    student = context.root(stage.step.stage.model or "")
    teacher = context.root(stage.step.stage.teacher_model or "")
    tokenizers = []
    for name in (stage.step.stage.model or "", stage.step.stage.teacher_model or ""):
        try:
            tokenizers.append(material.tokenizer(context, name, stage.step))
        except (InputError, NotHere) as error:
            text = f"no tokenizer to compare: {error}"
            yield Finding("warning", "vocabulary", text, stage.name)
            return
    mine, theirs = tokenizers
    problems = list(differences(mine, theirs, ends_of(teacher)))
    sizes = Sizes(tokens_of(mine), rows_of(student), rows_of(teacher))
    try:
        sizes.check(stage.layout)
    except InputError as error:
        problems.append(str(error))
    padded = ""
    if sizes.student != sizes.teacher:
        padded = f", padded to {sizes.student} and {sizes.teacher} rows: brought together in memory"
    fine = f"student and teacher share {sizes.tokens} tokens{padded}"
    yield from of_stage("vocabulary", stage.name, problems, fine)
    if not problems and mine.chat_template != theirs.chat_template:
        text = "the teacher has another chat template: it is asked in the student's, unused to it"
        yield Finding("warning", "vocabulary", text, stage.name)
