"""Show how a chain comes along: one bar for the stage at work, one line for each that ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from chainforge.core import shapes
from chainforge.core.artifacts import PROGRESS, read_shaped
from chainforge.core.errors import InputError

# How often a stage's progress is told where there is no terminal to draw a bar on.
LINE_SECONDS = 30.0
BAR, PERCENT_AND_TIME = 16, 17  # columns of the terminal


def read_progress(directory: Path) -> dict[str, Any]:
    """Return what the stage last said of itself: `done`, `total`, `unit`, `note`."""
    default = {"done": 0, "total": 0, "unit": "", "note": ""}
    try:
        told = read_shaped(directory / PROGRESS, shapes.Progress, "a stage's progress")
    except (OSError, InputError):
        return default
    return {**default, **told}


def seconds_in_words(seconds: float) -> str:
    """Write 63 as `63 s`, 245 as `4 min 05 s` and 9,000 as `2 h 30 min`."""
    whole = round(seconds)
    if whole >= 7200:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole} s" if whole < 120 else f"{whole // 60} min {whole % 60:02d} s"


class Display:
    """What the person at the terminal sees of a run."""

    def __init__(self, names: list[str]) -> None:
        self.console = Console(highlight=False)
        self.width = max(map(len, names))

    def line(self, name: str, text: str) -> None:
        """Print one line about a stage."""
        self.console.print(f"{name:<{self.width}}  {text}", markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, directory: Path) -> Iterator[Callable[[], None]]:
        """Follow a stage; the function that this yields looks at its progress once."""
        if self.console.is_terminal:
            with self._bar(name, directory) as look:
                yield look
        else:
            self.line(name, "running")
            yield self._lines(name, directory)

    @contextmanager
    def _bar(self, name: str, directory: Path) -> Iterator[Callable[[], None]]:
        progress = Progress(
            TextColumn(f"{escape(name):<{self.width}} "),
            BarColumn(bar_width=BAR),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        task = progress.add_task("", total=None, note="starting")
        room = max(20, self.console.width - self.width - BAR - PERCENT_AND_TIME)

        def look() -> None:
            told = read_progress(directory)
            if told["total"]:
                note = told["note"] or f"{told['done']}/{told['total']} {told['unit']}"
                if len(note) > room:  # a line that does not fit would push out the name and bar
                    note = f"{note[: room - 1]}…"
                progress.update(task, completed=told["done"], total=told["total"], note=note)

        with progress:
            yield look

    def _lines(self, name: str, directory: Path) -> Callable[[], None]:
        started = told_at = time.monotonic()

        def look() -> None:
            nonlocal told_at
            now = time.monotonic()
            if now - told_at < LINE_SECONDS:
                return
            told_at = now
            told = read_progress(directory)
            how_far = f"{told['done']}/{told['total']} {told['unit']}" if told["total"] else ""
            words = (how_far, told["note"], seconds_in_words(now - started))
            self.line(name, "  ".join(word for word in words if word))

        return look
