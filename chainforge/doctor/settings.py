"""Every stage's settings and rows, read as its recipe will read them, and nothing built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from chainforge.chain.plan import Step
from chainforge.core.errors import InputError
from chainforge.core.transcript import read
from chainforge.data.filters import FilterArgs, filters
from chainforge.data.select import SelectionArgs
from chainforge.data.tasks import check_answers
from chainforge.doctor import material, supply
from chainforge.doctor.findings import Context, Finding, Level, NotHere, of_stage
from chainforge.generate.settings import RequestArgs
from chainforge.rewards.language import scripts_of


def check_settings(context: Context) -> Iterator[Finding]:
    """Hold every key to what its recipe takes: its name, its type, its choices."""
    for step in context.steps:
        problems = []
        try:
            for args in material.settings(context, step).values():
                _check(args)
        except InputError as error:
            problems.append(str(error))
        except NotHere as reason:
            yield Finding("ok", "settings", str(reason), step.stage.name)
            continue
        yield from of_stage("settings", step.stage.name, problems, "every key and value is known")


def _check(args: Any) -> None:
    """Raise `InputError` for values that go with nothing, as the recipes do."""
    if isinstance(args, RequestArgs | SelectionArgs):
        args.check()
    elif isinstance(args, FilterArgs):
        filters(args)
    elif language := getattr(args, "language", None):
        scripts_of(language)


def check_rows(context: Context) -> Iterator[Finding]:
    """Load the rows of every stage: of its tasks, and what it is trained on."""
    counts: dict[str, int] = {}
    for step in context.steps:
        name = step.stage.name
        try:
            if rows := supply.examples(context, step):
                counts[name] = len(rows)
                if step.stage.recipe == "evaluate":
                    check_answers(rows)
            if step.stage.recipe == "sft":
                yield from _of_sft(context, step)
        except NotHere as reason:
            yield Finding("warning", "rows", f"not looked at: {reason}", name)
        except InputError as error:
            if not _said_elsewhere(context, step):
                yield Finding("error", "rows", str(error), name)
    if counts:
        words = ", ".join(f"{name} {number:,}" for name, number in counts.items())
        yield Finding("ok", "rows", f"of tasks: {words}", None, {"stages": counts})


def _of_sft(context: Context, step: Step) -> Iterator[Finding]:
    """See that the completions of an SFT stage are transcripts of its form."""
    form, name = material.transcript_of(step), step.stage.name
    for part in supply.learnt_from(context, step):
        odd = [
            number
            for number, row in enumerate(part.rows)
            if read(row["completion"][0]["content"], form) is None
        ]
        if odd:
            level: Level = "error" if len(odd) == len(part.rows) else "warning"
            text = (
                f"{len(odd):,} of {len(part.rows):,} completions of {part.source} are no "
                f"transcripts of the form {form} (the first is row {odd[0]}): each tag once, in "
                "order, nothing outside; mend them, or set `transcript`"
            )
            yield Finding(level, "rows", text, name)


def _said_elsewhere(context: Context, step: Step) -> bool:
    """Whether it is the settings that cannot be read, which their own check says."""
    try:
        material.settings(context, step)
    except (InputError, NotHere):
        return True
    return False
