"""Keep a chain's report up to date while the chain runs, without holding up the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from chainforge.core.errors import Failed, InputError

FIRST_SECONDS, EVERY_SECONDS = 5.0, 60.0  # into a stage, and then
SHARE = 0.05  # of the time, at most, that writing takes


class LiveReport:
    """The report of a chain that this process runs; writing happens in a thread of its own."""

    def __init__(self, directory: Path, tell: Callable[[str], None]) -> None:
        self.directory, self._tell = directory, tell
        self._thread: threading.Thread | None = None
        self._due = 0.0

    def begin(self) -> None:
        """A stage begins."""
        self._due = time.monotonic() + FIRST_SECONDS

    def look(self) -> None:
        """Write the report if it is time to; to be called now and then while a stage works."""
        if time.monotonic() < self._due or (self._thread and self._thread.is_alive()):
            return
        self._due = float("inf")  # until this one is written
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def write(self) -> None:
        """Write the report now."""
        if self._thread:
            self._thread.join()
        self._write()

    def _write(self) -> None:
        from chainforge.report.report import write_report

        started = time.monotonic()
        try:
            write_report(self.directory)
        # A stage's file, or a full disk: the run says itself what is wrong with it, if anything.
        except (InputError, Failed, OSError) as error:
            self._tell(f"not written: {error}")
        now = time.monotonic()
        self._due = now + max(EVERY_SECONDS, (now - started) / SHARE)
