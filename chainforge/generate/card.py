"""The data set's card: what the rows are, who wrote them, and where the others went."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainforge.core.jsonl import Row
from chainforge.data import card
from chainforge.data.card import code
from chainforge.data.datasets import FALLBACK
from chainforge.generate.progress import usd

if TYPE_CHECKING:
    from chainforge.generate.settings import TeacherArgs

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


def write_card(
    folder: Path, args: TeacherArgs, rows: list[Row], funnel: dict[str, Any], spending: Row
) -> None:
    """Write `folder`/README.md about the kept `rows` of a collection."""
    sections = {"Teacher": _teacher(args, rows), "Terms": _terms(args, rows)}
    sections |= {"Cost": _cost(spending)} if spending else {}
    card.write_card(folder, rows, funnel, {}, sections=sections)


def _teacher(args: TeacherArgs, rows: list[Row]) -> str:
    asked = [row for row in rows if row.get("teacher") != "offline"]
    lines = []
    for (source, model, host), count in _groups(asked, "source", "model", "host"):
        lines.append(f"- {count:,} rows: asked for `{source}` at `{host}`, answered by `{model}`")
    own = Counter(row["source"] for row in rows if row.get("teacher") == "offline")
    for source, count in own.items():
        why = " They stand in for a teacher that did not answer." if source == FALLBACK else ""
        lines.append(f"- {count:,} rows: `{source}`. {OFFLINE}{why}")
    if asked:
        days = sorted(row["time"][:10] for row in asked)
        when = f"from {days[0]} to {days[-1]}" if days[0] != days[-1] else f"on {days[0]}"
        lines.append(f"- collected {when}")
        first = asked[0]
        lines.append(f"- sent with each prompt: `{code(first['sampling'])}`")
        if args.instruction:
            lines.append(f"- under the instruction: `{code(args.instruction)}`")
        if args.teacher == "deepseek":
            lines.append("- temperature has no effect on a model that thinks")
    return "\n".join(lines)


def _groups(rows: list[Row], *columns: str) -> list[tuple[tuple[str, ...], int]]:
    return Counter(tuple(code(row.get(name)) for name in columns) for row in rows).most_common()


def _terms(args: TeacherArgs, rows: list[Row]) -> str:
    hosts = ", ".join(sorted({f"`{code(row['host'])}`" for row in rows if row.get("host")}))
    return TERMS[args.teacher].format(hosts=hosts or "the server")


def _cost(spending: Row) -> str:
    if spending["usd"] is None:
        return f"{spending['requests']:,} requests, {spending['tokens']:,} tokens; price unknown."
    text = (
        f"{usd(spending['usd'])} for {spending['requests']:,} requests and "
        f"{spending['tokens']:,} tokens"
    )
    if spending["untold_requests"]:
        text += (
            f", and at most {usd(spending['untold_usd_at_most'] or 0)} for "
            f"{spending['untold_requests']:,} requests that were cut off before they said"
        )
    return text + "."
