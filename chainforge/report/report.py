"""Write a chain's report: one HTML page that needs nothing else, also while the chain runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chainforge.core.disk import replacing
from chainforge.core.errors import Failed, InputError
from chainforge.core.secrets import redact
from chainforge.report.evidence import ChainEvidence, read_chain
from chainforge.report.page import render

SHARE = 0.1  # of the time, at most, that watching spends on writing


def write_report(chain_dir: Path, stages: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """Write `<chain_dir>/report.html` from what the stages left, and return its path.

    `stages` lists `{"name", "recipe"}` in order, and may say `inputs`, `state` and `note`; without
    it chain.json does, or the folders themselves. Raises `InputError` when there is no stage at all
    or a file is malformed. The same files give the same bytes.
    """
    return _write(Path(chain_dir), read_chain(Path(chain_dir), stages))


def watch(chain_dir: Path, every: float, tell: Callable[[str], None]) -> Path:
    """Write the report anew every so many seconds, until the chain is done or its run has ended.

    `tell` is called with what there is to say, such as why a report could not be written just now.
    """
    seen_running, said = False, ""
    while True:
        started = time.monotonic()
        chain = None
        try:
            chain = read_chain(chain_dir)
            path = _write(chain_dir, chain)
            words = _counted(chain)
        except (InputError, Failed, OSError) as error:
            if not chain_dir.is_dir():
                raise
            words = f"not written: {error}"  # a file is being replaced: the next time it is whole
        if words != said:
            tell(words)
            said = words
        elif chain and not chain.running and (seen_running or _done(chain)):
            return path
        seen_running = seen_running or bool(chain and chain.running)
        time.sleep(max(every, (time.monotonic() - started) / SHARE))


def _done(chain: ChainEvidence) -> bool:
    return all(stage.state == "done" for stage in chain.stages)


def _counted(chain: ChainEvidence) -> str:
    """Return how far a chain is: `4 of 9 stages done, final: 12 of 40 steps`."""
    words = [f"{sum(s.state == 'done' for s in chain.stages)} of {len(chain.stages)} stages done"]
    for stage in chain.stages:
        if stage.state in ("running", "failed"):
            words.append(f"{stage.name} {stage.state} {stage.how_far}".rstrip())
    if not chain.running and not _done(chain):
        words.append("nobody runs it just now")
    return ", ".join(words)


def _write(directory: Path, chain: ChainEvidence) -> Path:
    # A lone surrogate in a completion is no UTF-8; it must not cost the report.
    page = redact(render(chain)).encode("utf-8", "replace")
    path = directory / "report.html"
    with replacing(path, durable=False) as temporary:
        temporary.write_bytes(page)
    return path
