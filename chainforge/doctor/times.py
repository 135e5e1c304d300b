"""How long each stage will take: as it took before, else by its arithmetic, else not known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from chainforge.chain.plan import Step
from chainforge.core.artifacts import read_manifest
from chainforge.core.errors import InputError
from chainforge.core.run_dir import DONE
from chainforge.doctor import extent, material
from chainforge.doctor.findings import Context, Finding, Machine, NotHere, Training
from chainforge.report.formatting import duration as seconds_in_words
from chainforge.train.architecture import DTYPES, Shape
from chainforge.train.distributed import method_of

# Dense half-precision TFLOP/s and GB/s, of the makers' data sheets.
CARDS = {"H200": (989, 4800), "H100": (989, 3350), "A100": (312, 2039), "L40S": (362, 864),
         "L4": (121, 300), "A10": (125, 600), "RTX 4090": (165, 1008), "RTX 3090": (71, 936),
         "V100": (125, 900), "T4": (65, 320)}  # fmt: skip
REACHED = 0.35  # of it, by training as a rule
SAMPLES = 3  # matrix products, of which the fastest counts
SIZE = 512


@dataclass(frozen=True)
class Rate:
    """What a device does in a second: operations and bytes; and how that is known."""

    operations: float
    bytes: float
    words: str


@dataclass(frozen=True)
class Duration:
    """A stage's seconds, and what they rest on: a run before, or arithmetic."""

    seconds: float
    before: bool


def check_times(context: Context) -> Iterator[Finding]:
    """Estimate the stages that are not done; say what each figure rests on."""
    if not context.steps:
        return
    found: dict[str, Duration] = {}
    unknown: list[str] = []
    rate = _rate(context.machine)
    for step in context.steps:
        if step.state == DONE:
            continue
        duration = _before(context, step)
        if duration is None and rate is not None:
            duration = _by_arithmetic(context, step, rate)
        if duration is None:
            unknown.append(step.stage.name)
        else:
            found[step.stage.name] = duration
    data = {name: vars(one) for name, one in found.items()} | dict.fromkeys(unknown)
    yield Finding("ok", "time", _in_words(found, unknown, rate), None, {"stages": data})


def _in_words(found: dict[str, Duration], unknown: list[str], rate: Rate | None) -> str:
    parts = []
    for before, basis in ((True, "as these stages took before"), (False, None)):
        some = {name: max(1, one.seconds) for name, one in found.items() if one.before is before}
        if some:
            total = seconds_in_words(sum(some.values()))
            each = ", ".join(f"{name} {seconds_in_words(took)}" for name, took in some.items())
            words = basis or f"by operations and bytes alone, at {rate.words if rate else ''}"
            parts.append(f"{'about' if before else 'at least'} {total} ({each}), {words}")
    if unknown:
        parts.append(f"not known of {', '.join(unknown)}")
    return "; ".join(parts) or "all stages are done"


def _before(context: Context, step: Step) -> Duration | None:
    """Scale what the same stage took before by how much there is to do now."""
    manifest = read_manifest(step.directory)
    if manifest is None:
        return None
    stage = context.trained(step)
    try:
        now = extent.work(step, step.given, extent.steps(context, stage) if stage else None)
        done = manifest.metrics.get("steps") if stage else None
        then = extent.work(step, manifest.given, done)
    except (InputError, NotHere, TypeError, ValueError):
        return None
    return Duration(manifest.seconds * now / then, True) if now and then else None


def _by_arithmetic(context: Context, step: Step, rate: Rate) -> Duration | None:
    """Count operations, and the bytes that each written token must read: a lower bound."""
    name = material.sampled(step)
    shape = context.shape(name) if name else "no model"
    if isinstance(shape, str):
        return None
    try:
        stage = context.trained(step)
        if stage is not None:
            return Duration(_training_seconds(context, stage, shape, rate), False)
        if step.stage.recipe not in ("reject", "evaluate") or not step.given.get("tasks"):
            return None
        prompt, written = extent.tokens(context, step)
        number = extent.prompts(context, step) * extent.samples(step.given, len(step.stage.models))
        at_once = int(step.given.get("generation_batch_size", 64))
        size = DTYPES.get(str(step.given.get("dtype", shape.dtype)), 4)
        seconds = _writing(shape, size, number, at_once, prompt, written, rate)
    except (InputError, NotHere, TypeError, ValueError, KeyError):
        return None
    return Duration(seconds, False)


def _training_seconds(context: Context, stage: Training, shape: Shape, rate: Rate) -> float:
    """6 operations a token and parameter to train, 2 to run forward once (arXiv 2001.08361)."""
    prompt, written = extent.tokens(context, stage.step)
    number = extent.steps(context, stage) * extent.batch(stage) / stage.layout.processes
    each = 6 if method_of(stage.settings) == "full" else 4
    each += 2 if stage.settings["gradient_checkpointing"] else 0
    each += 2 if stage.recipe != "sft" and stage.settings["beta"] else 0  # the reference's pass
    seconds = each * shape.parameters * number * (prompt + written) / rate.operations
    if stage.recipe == "sft":
        return seconds
    at_once = extent.batch(stage) // stage.layout.processes
    size = 2 if stage.settings["bf16"] or stage.settings["fp16"] else 4
    return seconds + _writing(shape, size, number, at_once, prompt, written, rate)


def _writing(
    shape: Shape, size: int, number: float, at_once: int, prompt: float, written: float, rate: Rate
) -> float:
    """Return the seconds of writing completions as long as they may be.

    Each token of a batch reads all weights once, and costs each line 2 operations a parameter.
    """
    reading = max(1.0, number / at_once) * written * shape.parameters * size / rate.bytes
    return max(reading, 2 * shape.parameters * number * (prompt + written) / rate.operations)


def _rate(machine: Machine) -> Rate | None:
    """Return what a GPU of a known name may reach, or what the CPU is seen to do now."""
    if machine.gpus:
        name = machine.cards[0] if machine.cards else ""
        known = next((key for key in CARDS if key in name), None)
        if known is None:
            return None
        peak, bandwidth = CARDS[known]
        words = f"{REACHED:.0%} of the {peak} TFLOP/s of a {known}'s data sheet"
        return Rate(REACHED * peak * 1e12, bandwidth * 1e9, words)
    import numpy as np

    matrix = np.ones((SIZE, SIZE), dtype=np.float32)
    operations = 2 * SIZE**3 / min(_seconds(lambda: matrix @ matrix) for _ in range(SAMPLES))
    block = np.ones(2**23, dtype=np.float32)
    speed = 2 * block.nbytes / min(_seconds(block.copy) for _ in range(SAMPLES))
    words = f"{operations / 1e9:.0f} GFLOP/s, as a product of matrices here just now"
    return Rate(operations, speed, words)


def _seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return max(1e-6, time.perf_counter() - started)
