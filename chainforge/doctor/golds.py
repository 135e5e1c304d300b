"""The rewards of each stage, tried on gold answers: they must be accepted, and pay most."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from chainforge.chain.check import shown, tail
from chainforge.chain.plan import Step
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.doctor import material, supply
from chainforge.doctor.findings import Context, Finding, Level, NotHere
from chainforge.rewards.audit import Audit, audit, completion_of, gold_answer
from chainforge.rewards.functions import accuracy_rewards
from chainforge.rewards.reward import RewardArgs, check_applicable, check_overlong, load_rewards

JUDGED = ("collect", "grpo", "reject", "evaluate")
EACH = 2  # rows of each task on which everything is tried
SHOWN_CONSTANTS = 2
MANY = 50  # rows of each task on which constant answers are tried


def check_rewards(context: Context) -> Iterator[Finding]:
    """Score the gold answer of a few rows, and answers that are none, by each stage's rewards."""
    for step in context.steps:
        if step.stage.recipe not in JUDGED:
            continue
        try:
            every = supply.examples(context, step)
            args = material.settings(context, step).get("RewardArgs")
        except (InputError, NotHere):
            continue  # the checks of settings and of rows say so
        rows = _first(every, MANY)
        try:
            if every and args is not None and step.stage.recipe == "grpo":
                check_applicable(load_rewards(args, set().union(*every)), every)
            if rows:
                yield from _of(context, step, rows, args)
        except InputError as error:
            yield Finding("error", "rewards", str(error), step.stage.name)


def _first(rows: list[Row], each: int) -> list[Row]:
    """Return the first rows of each task that have a gold answer."""
    taken: dict[str, list[Row]] = {}
    for row in rows:
        if gold_answer(row).strip() and len(taken.setdefault(row["task"], [])) < each:
            taken[row["task"]].append(row)
    return [row for some in taken.values() for row in some]


def _of(
    context: Context, step: Step, many: list[Row], args: RewardArgs | None
) -> Iterator[Finding]:
    name, form = step.stage.name, material.transcript_of(step)
    rows = _first(many, EACH)
    yield from _refused(name, rows, form)
    if args is None:  # an evaluation counts right answers, and has no other rewards
        args = RewardArgs(rewards=[{"fn": "accuracy_reward"}], transcript=form)
    rewards = load_rewards(args, set().union(*rows))
    if step.stage.recipe == "grpo":
        check_overlong(rewards, int(material.training_of(context, step)["max_completion_length"]))
    if args.random_rewards:
        yield Finding("warning", "rewards", "random_rewards: coin flips, as for a control", name)
        return
    ids = [row["id"] for row in rows]
    key = ("audit", json.dumps([args.rewards, form, ids], default=str))
    yield from _told(name, material.once(context, key, lambda: audit(rewards, rows, form, many)))


def _refused(stage: str, rows: list[Row], form: str) -> Iterator[Finding]:
    """Yield what a verifier says against the answers that it is to judge by."""
    golds = [
        {
            "completion": completion_of(gold_answer(row), form),
            "answer": row["answer"],
            "verifier": row["verifier"],
            "entry": row.get("entry"),
            "transcript": form,
        }
        for row in rows
    ]
    verdicts = accuracy_rewards(golds)
    refused = [row for row, right in zip(rows, verdicts, strict=True) if right != 1.0]
    if refused:
        row = refused[0]
        text = (
            f"the verifier {row['verifier']!r} does not accept {len(refused)} of {len(rows)} gold "
            f"answers, such as {shown(gold_answer(row))}: choose another `verifier`, or mend the "
            "answers"
        )
        level: Level = "error" if len(refused) > len(rows) // 2 else "warning"
        yield Finding(level, "rewards", text, stage)


def _told(stage: str, report: Audit) -> Iterator[Finding]:
    for error in report.errors:
        yield Finding("error", "rewards", error, stage)
    for constant in report.constants[:SHOWN_CONSTANTS]:
        text = f"{constant}; look closer with `chainforge check`"
        yield Finding("error", "rewards", text, stage, _data(report))
    judged = [row for row in report if not row.skipped]
    if not judged:
        text = "no reward applies to the gold answers that were tried"
        yield Finding("warning", "rewards", text, stage)
    if report.errors or not judged:
        return
    worse = [(row, one) for row, one in report.failures if (one.total or 0) > (row.gold or 0)]
    failures = worse or report.failures
    if failures:
        row, one = failures[0]
        kinds = ", ".join(dict.fromkeys(attempt.kind for _, attempt in failures))
        more = "more than" if worse else "as much as"
        text = (
            f"answers that are none ({kinds}) are paid {more} the gold answer: "
            f"{shown(row.answer)} gets {row.gold:g}, and {tail(one.completion)} gets "
            f"{one.total:g}; look closer with `chainforge check`"
        )
        yield Finding("error" if worse else "warning", "rewards", text, stage, _data(report))
    elif not report.constants:
        golds = sorted({round(float(row.gold or 0), 4) for row in judged})
        best = " to ".join(f"{value:g}" for value in dict.fromkeys((golds[0], golds[-1])))
        text = f"gold answers get {best}, and more than any other"
        yield Finding("ok", "rewards", text, stage, _data(report))


def _data(report: Audit) -> dict[str, Any]:
    return {"rows": len(report), "means": report.means}
