"""Return how a collection comes along: one line for a person, in a terminal or in a log."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chainforge.generate.collector import Collector
    from chainforge.generate.ledger import Ledger

logger = logging.getLogger(__name__)

Tell = Callable[[int, int, str, str], None]
LOG_SECONDS = 30.0
MOST_CLASSES = 3


def describe(run: Collector, done: int, total: int) -> str:
    """Return one line, what matters most first: done, cost, requests at once, speed, failures."""
    if not run.teacher.metered:
        return f"{done:,}/{total:,} answers"
    words = [f"{done:,}/{total:,}", _cost(run.ledger, done, total)]
    words.append(f"{len(run.under_way)}/{run.limiter.level} at once")
    words.append(f"{run.results.tokens_per_second():,.0f} tok/s")
    right, wrong = run.results.verdicts[True], run.results.verdicts[False]
    if right + wrong:
        words.append(f"{right / (right + wrong):.0%} right")
    if lost := run.results.lost_classes():
        words.append(f"{lost.total():,} failed ({_classes(lost.most_common())})")
    if run.results.faults:
        words.append(f"{run.results.faults.total():,} faults")
    unsure = run.ledger.spending.unsure.usd
    if unsure:
        words.append(f"{usd(unsure)} at most for lost requests")
    held = run.limiter.wait(time.monotonic()) or 0.0
    if run.breaker.open_since is not None:
        words.insert(1, "waiting for the server")
    elif 1 <= held < math.inf:
        words.insert(1, f"refused (429), waiting {held:.0f} s")
    return ", ".join(words)


def _classes(counts: list[tuple[str, int]]) -> str:
    named = [f"{kind} {count}" for kind, count in counts[:MOST_CLASSES]]
    return ", ".join(named) + (", ..." if len(counts) > MOST_CLASSES else "")


def _cost(ledger: Ledger, done: int, total: int) -> str:
    told = ledger.spending.told.usd
    if told is None:
        return "cost unknown"
    return f"{usd(told)} of ~{usd(told * total / done)}" if 0 < done < total else usd(told)


def usd(value: float) -> str:
    """Write money: $3.66, and small amounts with what digits they have: $0.0037."""
    digits = 2 if value == 0 or value >= 0.1 else 4 if value >= 0.001 else 6
    return f"${value:,.{digits}f}"


@contextlib.contextmanager
def watched(tell: Tell) -> Iterator[Callable[[int, int, str], None]]:
    """Tell a stage's progress, and draw it where a person sees: a bar, or a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    told_at = time.monotonic()

    def log(done: int, total: int, note: str) -> None:
        nonlocal told_at
        tell(done, total, "answers", note)
        if time.monotonic() - told_at >= LOG_SECONDS:
            told_at = time.monotonic()
            logger.info("%s", note)

    if not console.is_terminal:
        yield log
        return
    columns = (TimeElapsedColumn(), BarColumn(bar_width=10),
               TextColumn("{task.fields[note]}", markup=False))  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, note="starting")

        def draw(done: int, total: int, note: str) -> None:
            tell(done, total, "answers", note)
            bar.update(task, completed=done, total=total, note=note)

        yield draw
