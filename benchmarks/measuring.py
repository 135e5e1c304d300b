"""What the benchmarks share: runs in fresh processes, sides in turn, medians, and result files."""

from __future__ import annotations

import compileall
import functools
import hashlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from chainforge.core.artifacts import read_json, write_json
from chainforge.train.stage import device, versions

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes/quickstart"
T = TypeVar("T")
CHAINFORGE = [sys.executable, "-m", "chainforge.cli"]


@dataclass(frozen=True)
class Run:
    """What one process took; its peak is that of the largest process it waited for."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def results() -> Path:
    """Return where results are written: `BENCH_RESULTS`, or what is in the repository."""
    return Path(os.environ.get("BENCH_RESULTS") or ROOT / "benchmarks/results")


def save(path: Path, result: dict[str, Any], *packages: str) -> None:
    """Write a result with what it depends on: versions, these packages' too, and the hardware."""
    found = versions() | {package: importlib.metadata.version(package) for package in packages}
    surroundings = {
        "versions": found,
        "hardware": device(),
        "load": os.getloadavg(),  # above the cores' number: others were at work too
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(path, result | surroundings)


def stored(name: str, folder: Path | None = None) -> Any:
    """Return a result that was written before, or None."""
    path = (folder or results()) / f"{name}.json"
    return read_json(path) if path.is_file() else None


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return the median with the least and the largest."""
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


@functools.cache
def compile_package() -> None:
    """Compile the package as pip does what it installs, the peers' libraries among it.

    Else a process that may write no bytecode would compile a hundred modules at each start.
    """
    compileall.compile_dir(ROOT / "chainforge", quiet=1)


def run(command: Sequence[str], log: Path, **environment: str) -> Run:
    """Run a command to its end; raise `RuntimeError` with the end of its log when it fails."""
    compile_package()
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        started = time.perf_counter()
        child = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env=os.environ | environment,
        )  # fmt: skip
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {child.returncode}\n{tail(log)}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * unit)


def tail(log: Path) -> str:
    """Return the end of a log."""
    return log.read_text(errors="replace")[-2000:]


def turns(sides: Iterable[T], repeats: int) -> Iterator[tuple[T, int]]:
    """Yield the sides in turn, so that each is first as often as the others."""
    names = list(sides)
    for repeat in range(repeats):
        for side in names if repeat % 2 == 0 else reversed(names):
            yield side, repeat


def summary(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return the medians of several runs, with their spread."""
    return {
        "seconds": spread([one.seconds for one in runs]),
        "cpu_seconds": spread([one.cpu_seconds for one in runs]),
        "peak_bytes": spread([one.peak_bytes for one in runs], 0),
    }


def ratios(ours: Sequence[Run], theirs: Sequence[Run], name: str) -> dict[str, float]:
    """Return ours over theirs, run by run."""
    pairs = zip(ours, theirs, strict=True)
    return spread([getattr(a, name) / getattr(b, name) for a, b in pairs], 4)


def weights(folder: Path) -> str:
    """Return a hash of the tensors of a saved model: their names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")  # after the header's length and the header
        for name, tensor in sorted(json.loads(data[8:start]).items()):
            if name != "__metadata__":
                first, last = tensor["data_offsets"]
                digest.update(f"{name} {tensor['dtype']} {tensor['shape']}\0".encode())
                digest.update(data[start + first : start + last])
    return digest.hexdigest()
