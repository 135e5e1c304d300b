"""Compare verifiers, or rewards, over the completions that a stage saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from chainforge.chain.check import read_params
from chainforge.core.errors import InputError
from chainforge.core.records import Row, read_rows
from chainforge.core.transcript import DEFAULT
from chainforge.core.yaml12 import read_yaml

if TYPE_CHECKING:
    from chainforge.rewards.disagreements import Case, Verdicts

FILES = ("samples.jsonl", "rollouts.jsonl")
SHOWN_CASES = 12
SHOWN_ANSWER = 40


def compare_judges(
    judge: str,
    samples: Path,
    against: Sequence[str] = (),
    params: Iterable[str] = (),
    rows: int | None = None,
) -> tuple[list[Verdicts], list[Case]]:
    """Judge saved completions by `judge` and by others; return the verdicts and the disagreements.

    `samples` is a stage's folder or a .jsonl file; `against` names verifiers, rewards, or `saved`
    (the verdict in the rows), and means what can read such answers when left out. Only `rows`
    completions, from the first, when given.
    """
    from chainforge.rewards.disagreements import cases, judge_all, usual_judges

    found, transcript = read_samples(samples)
    found = found[:rows]
    judges = [judge, *(against or usual_judges(judge, found))]
    verdicts = judge_all(judges, found, transcript, read_params(params))
    return verdicts, cases(verdicts, found, transcript)


def read_samples(path: Path) -> tuple[list[Row], str]:
    """Return a stage's completions, and the transcript preset that they are written in."""
    file = path
    if path.is_dir():
        there = [path / name for name in FILES if (path / name).is_file()]
        if not there:
            raise InputError(f"{path} holds no {' and no '.join(FILES)}; give a stage's folder")
        file = there[0]
    elif not path.is_file():
        raise InputError(f"--samples {path}: no such file or folder")
    rows = [
        row for row in read_rows(file, torn_tail=True) if isinstance(row.get("completion"), str)
    ]
    if not rows:
        raise InputError(f"{file} holds no row with a `completion`")
    for row in rows:
        if "answer" not in row:
            raise InputError(f"{file}: a row has no `answer` to judge by (id {row.get('id')!r})")
    config = file.parent / "config.yaml"
    settings = read_yaml(config) if config.is_file() else {}
    return rows, str(settings.get("transcript") or DEFAULT)


def print_agreement(verdicts: Sequence[Verdicts], found: Sequence[Case], console: Console) -> None:
    """Print what each judge said, how often it differs from the first, and on which answers."""
    first = verdicts[0]
    title = f"{len(first.values):,} completions"
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    table.add_column("judge", overflow="fold")
    for name in ("judged", "mean", f"not as {first.judge}", "ms each"):
        table.add_column(name, justify="right")
    for one in verdicts:
        table.add_row(
            one.judge,
            f"{one.judged:,}",
            "-" if one.mean is None else f"{one.mean:.4f}",
            "" if one is first else f"{one.differs(first):,}",
            f"{1000 * one.seconds / len(one.values):.3f}" if one.seconds else "",
        )
    console.print(table)
    for case in found[:SHOWN_CASES]:
        said = ", ".join(f"{judge} {_word(value)}" for judge, value in case.verdicts.items())
        times = f"{len(case.ids)} x " if len(case.ids) > 1 else ""
        text = f"{times}gold {shown(case.gold)}, answer {shown(case.answer)}: {said}"
        console.print(text, markup=False, soft_wrap=True)
    if len(found) > SHOWN_CASES:
        console.print(f"and {len(found) - SHOWN_CASES} more answers; --json lists all")
    total = sum(len(case.ids) for case in found)
    console.print(f"the judges differ on {total:,} completions, {len(found):,} different answers")


def to_json(verdicts: Sequence[Verdicts], found: Sequence[Case]) -> dict[str, Any]:
    """Return the comparison for a machine to read."""
    first = verdicts[0]
    return {
        "completions": len(first.values),
        "judges": [
            {
                "judge": one.judge,
                "judged": one.judged,
                "mean": one.mean,
                "differs": one.differs(first),
                "seconds": one.seconds,
            }
            for one in verdicts
        ],
        "disagreements": [vars(case) for case in found],
    }


def _word(value: float | None) -> str:
    return "cannot say" if value is None else f"{value:g}"


def shown(text: str) -> str:
    """Show a text on one line, whatever it holds."""
    line = ascii(text)
    return line if len(line) <= SHOWN_ANSWER else f"{line[: SHOWN_ANSWER - 3]}..."
