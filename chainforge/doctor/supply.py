"""The rows that stages ask about and learn from, loaded once, or such as there will be."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from chainforge.chain.check import at_most
from chainforge.chain.plan import Step
from chainforge.core.errors import InputError, first_line
from chainforge.core.jsonl import Row
from chainforge.core.run_dir import DONE
from chainforge.data.datasets import DataArgs, sft_mixture
from chainforge.data.tasks import load_examples
from chainforge.doctor.findings import Context, NotHere
from chainforge.doctor.material import ONLINE, once, settings, step_of, transcript_of
from chainforge.rewards.audit import completion_of, gold_answer

MOST = 4096  # rows of a task that are looked at: enough for its longest, and seconds at most


def examples(context: Context, step: Step) -> list[Row]:
    """Return the rows of a stage's tasks, `MOST` of each at most; none where it needs no tasks."""
    args = settings(context, step).get("TaskArgs")
    if args is None or "pool" in step.given:
        return []
    seed, form = int(step.given.get("seed", 42)), transcript_of(step)

    def make() -> list[Row]:
        few = replace(args, tasks=[at_most(task, MOST) for task in args.tasks])
        try:
            return load_examples(few, form, seed)
        except InputError as error:
            names = [name for task in args.tasks if (name := _on_hub(task))]
            if not context.online and names:
                raise NotHere(f"no data set {names[0]} on this machine; {ONLINE}") from None
            raise InputError(first_line(error)) from None
        except Exception as error:  # a task of the user's own may raise anything
            raise InputError(f"tasks: {type(error).__name__}: {error}") from error

    key = json.dumps([args.tasks, args.system_prompt, seed, form], default=str)
    return list(once(context, ("examples", key), make))


def _on_hub(task: Any) -> str | None:
    """Return the name of a task's data set where it is one of the Hub's."""
    params = task.get("params") if isinstance(task, dict) and task.get("fn") == "hub" else None
    name = str(params.get("dataset")) if isinstance(params, dict) else None
    return None if name is None or Path(name).exists() else name


@dataclass(frozen=True)
class Learnt:
    """Rows that an SFT stage learns from: `prompt` and `completion` messages.

    `real` when these rows, or worked solutions just like them, will be trained on; else they are
    the prompts with gold answers in the transcript's form, and say nothing of lengths.
    """

    rows: list[Row]
    real: bool
    source: str


def learnt_from(context: Context, step: Step) -> list[Learnt]:
    """Return what an SFT stage learns from: rows that are there, or such as will be."""

    def make() -> list[Learnt]:
        args = settings(context, step).get("DataArgs")
        assert isinstance(args, DataArgs)
        found = []
        for place, name in enumerate(step.stage.data):
            giver = step_of(context, name)
            if giver is None or giver.state == DONE:
                path = step.inputs[f"data.{place}"].path
                rows, _ = sft_mixture(replace(args, data=[path], data_weights=[]))
                found.append(Learnt(list(rows), True, name))
            else:
                key, make_up = ("foreseen", name), partial(_foreseen, context, giver)
                found += [part for part in (once(context, key, make_up),) if part]
        return found

    return list(once(context, ("learnt", step.stage.name), make))


def _foreseen(context: Context, giver: Step) -> Learnt | None:
    """Return rows as a data stage that has not run will leave them; None where nobody knows."""
    rows, form = examples(context, giver), transcript_of(giver)
    args = settings(context, giver).get("TeacherArgs")
    if args is not None and args.teacher == "offline":
        from chainforge.generate.settings import Draw
        from chainforge.generate.teacher import OfflineTeacher

        teacher = OfflineTeacher(args.styles, int(giver.given.get("seed", 42)), form)
        teacher.check(rows)
        texts = [teacher.answer(Draw(row, 0, 0))["completion"] for row in rows]
    else:
        rows = [row for row in rows if gold_answer(row).strip()]
        texts = [completion_of(gold_answer(row), form) for row in rows]
    if not rows:
        return None
    pairs = [
        {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": text}]}
        for row, text in zip(rows, texts, strict=True)
    ]
    return Learnt(pairs, args is not None and args.teacher == "offline", giver.stage.name)


def taught(context: Context, name: str) -> list[Learnt]:
    """Return what the last SFT below a policy learns from: how long its answers are."""
    step = step_of(context, name)
    while step is not None and step.stage.recipe != "sft":
        step = step_of(context, step.stage.model or "")
    return learnt_from(context, step) if step else []
