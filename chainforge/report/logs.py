"""Read the end of a stage's log: how its last attempt ended, as a terminal would show it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

LINES = 20
LAUNCHER_LINES = 60  # more than a launcher's own traceback takes
LAST_BYTES = 65_536
# As `chainforge.core.process.run` ends a recipe that did not end well.
OUTCOMES = {"error: ": "failed", "failed: ": "failed", "stopped: ": "stopped"}
ATTEMPT = "$ "  # what stands before a command that `execute` starts
# A trainer's numbers and bars, which metrics.jsonl and progress.json have too, and warnings of
# libraries to those who write programs.
_NOISE = re.compile(
    r"\s*\{'[\w/.-]+': .*\}$|.*\d+%\|.*\||.*\b(Future|Deprecation)Warning: |\s*warnings\.warn\("
)


@dataclass(frozen=True)
class Ending:
    """The last lines of a log, what they end in (`failed`, `stopped` or nothing), and why."""

    lines: list[str] = field(default_factory=list)
    outcome: str = ""
    message: str = ""


def ending(path: Path) -> Ending:
    """Read the end of a log, up to the message that ended the last attempt.

    What a launcher adds of its own after that message, its traceback, is left out.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return Ending()
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    starts = [number for number, line in enumerate(lines) if line.startswith(ATTEMPT)]
    lines = lines[starts[-1] + 1 :] if starts else lines
    for number in range(len(lines) - 1, max(-1, len(lines) - LAUNCHER_LINES), -1):
        for mark, outcome in OUTCOMES.items():
            if lines[number].startswith(mark):
                said = _whole(lines[number:])
                text = "\n".join(said).removeprefix(mark)
                return Ending(_last([*lines[:number], *said]), outcome, text)
    return Ending(_last(lines))


def message(text: str, mark: str = "error: ") -> str:
    """Return the last `error: …` that a recipe printed, with its indented further lines."""
    lines = text.splitlines()
    for number in range(len(lines) - 1, -1, -1):
        if lines[number].startswith(mark):
            return "\n".join(_whole(lines[number:])).removeprefix(mark)
    return ""


def _whole(lines: list[str]) -> list[str]:
    """Return the first line and those that go on with it, which are indented."""
    return [lines[0], *takewhile(lambda line: line.startswith("  "), lines[1:])]


def _last(lines: list[str]) -> list[str]:
    return [line for line in lines if line and not _NOISE.match(line)][-LINES:]
