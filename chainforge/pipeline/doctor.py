"""Look a chain over before anything expensive: `chainforge doctor [CHAIN]`.

Each check is a plain function that yields findings, each of them ok, a warning or an error with
what to do. Nothing is loaded that weighs anything, and nothing is asked of the network but a server
that a stage itself names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.text import Text

from chainforge.pipeline.checkup.batches import check_batches
from chainforge.pipeline.checkup.engines import check_vllm
from chainforge.pipeline.checkup.findings import Context, Finding, worst
from chainforge.pipeline.checkup.launches import check_launches, check_matrix
from chainforge.pipeline.checkup.memory import check_memory
from chainforge.pipeline.checkup.versions import check_machine, check_versions
from chainforge.pipeline.checkup.vocabulary import check_vocabularies

Check = Callable[[Context], Iterable[Finding]]

CHECKS: tuple[Check, ...] = (
    check_versions,
    check_machine,
    check_launches,
    check_matrix,
    check_vllm,
    check_batches,
    check_memory,
    check_vocabularies,
)
STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def examine(context: Context) -> list[Finding]:
    """Run every check."""
    return [finding for check in CHECKS for finding in check(context)]


def print_findings(findings: list[Finding], console: Console) -> None:
    """Print a line for each finding: its level, what was checked, the stages, what was seen."""
    checks = max((len(finding.check) for finding in findings), default=0)
    lines: dict[tuple[str, str, str], list[str]] = {}  # what is alike stands in one line
    for finding in findings:
        stages = lines.setdefault((finding.level, finding.check, finding.text), [])
        stages += [finding.stage] if finding.stage else []
    for (level, check, text), stages in lines.items():
        line = Text(f"{level:<7}  ", STYLES[level])
        where = f"{', '.join(stages)}: " if stages else ""
        line.append(f"{check:<{checks}}  {where}{text}", "default")
        console.print(line, soft_wrap=True)
    counts = {level: sum(f.level == level for f in findings) for level in STYLES}
    console.print(f"\n{counts['error']} errors, {counts['warning']} warnings", highlight=False)


def to_json(findings: list[Finding]) -> dict[str, Any]:
    """Return the findings for a machine to read."""
    return {"level": worst(findings), "findings": [vars(finding) for finding in findings]}
