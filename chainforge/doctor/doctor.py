"""Look a chain over before anything expensive: `chainforge doctor [CHAIN]`.

Each check is a plain function that yields findings, each of them ok, a warning or an error with
what to do. No weights are loaded, unless a probe is asked for; that comes last, and only when no
error was found. Nothing is asked of the network but servers that a stage itself names, and of the
Hub only with `online`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chainforge.doctor.accounts import check_accounts, fetch_models
from chainforge.doctor.batches import check_batches
from chainforge.doctor.engines import check_vllm
from chainforge.doctor.findings import Context, Finding, worst
from chainforge.doctor.golds import check_rewards
from chainforge.doctor.launches import check_launches, check_matrix
from chainforge.doctor.lengths import check_tokens
from chainforge.doctor.memory_check import check_memory
from chainforge.doctor.probe import probe
from chainforge.doctor.room import check_disk
from chainforge.doctor.settings import check_rows, check_settings
from chainforge.doctor.times import check_times
from chainforge.doctor.tokens import check_transcripts
from chainforge.doctor.versions import check_judges, check_machine, check_versions
from chainforge.doctor.vocabulary import check_vocabularies

Check = Callable[[Context], Iterable[Finding]]

CHECKS: tuple[Check, ...] = (
    fetch_models,
    check_versions,
    check_machine,
    check_judges,
    check_settings,
    check_launches,
    check_matrix,
    check_vllm,
    check_batches,
    check_rows,
    check_transcripts,
    check_tokens,
    check_vocabularies,
    check_rewards,
    check_accounts,
    check_memory,
    check_disk,
    check_times,
)
STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
HEAD, TAIL = 10, 30  # tokens of a sample that are shown: around where loss begins, and at the end


def examine(context: Context, *, probed: bool = False) -> list[Finding]:
    """Run every check; the probe, if it is asked for, when no error was found."""
    # What it has to say, of every import, is no news to whoever asks a doctor.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    found: list[Finding] = []
    for check in CHECKS:
        try:
            found.extend(check(context))
        except (TypeError, ValueError):  # over a value that the check of settings has refused
            if not any((f.level, f.check) == ("error", "settings") for f in found):
                raise
    if probed and worst(found) == "error":
        text = "left out: mend what is wrong first"
        found.append(Finding("warning", "probe", text))
    elif probed:
        found += probe(context)
    return found


def print_findings(findings: list[Finding], console: Console) -> None:
    """Print a line for each finding: its level, what was checked, the stages, what was seen."""
    lines: dict[tuple[str, str, str], list[str]] = {}  # what is alike stands in one line
    for finding in findings:
        stages = lines.setdefault((finding.level, finding.check, finding.text), [])
        stages += [finding.stage] if finding.stage else []
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for (level, check, text), stages in lines.items():
        words = f"{', '.join(stages)}: {text}" if stages else text
        table.add_row(Text(level, STYLES[level]), check, Text(words))
    console.print(table)
    samples = [f for f in findings if f.data and "sample" in f.data]
    if samples:
        first = samples[0]
        assert first.data is not None
        console.print(f"\nA row of {first.stage}, with what carries loss between « and »:")
        console.print(_coloured(**first.data["sample"]), soft_wrap=False)
    counts = {one: sum(level == one for level, _, _ in lines) for one in ("error", "warning")}
    summary = (f"{number} {one}{'s' * (number != 1)}" for one, number in counts.items())
    console.print(f"\n{', '.join(summary)}", highlight=False)


def _coloured(tokens: list[str], loss: list[bool]) -> Text:
    """Show a row's tokens one by one, those with loss in colour; of a long row not all."""
    first = loss.index(True) if any(loss) else len(loss)
    shown = {*range(max(0, first - HEAD), first + HEAD), *range(len(loss) - TAIL, len(loss))}
    text = Text()
    for place, (token, carries) in enumerate(zip(tokens, loss, strict=True)):
        if place not in shown:
            text.append("" if place - 1 not in shown and place else " … ", "bold")
            continue
        text.append("«" if place == first else "·" if carries else "", "bold")
        text.append(token.replace("\n", "⏎"), "green" if carries else "dim")
    text.append("»" if any(loss) else "", "bold")
    return text


def to_json(findings: list[Finding]) -> dict[str, Any]:
    """Return the findings for a machine to read."""
    return {"level": worst(findings), "findings": [vars(finding) for finding in findings]}
