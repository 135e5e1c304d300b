"""The memory that each training stage needs, against what the machine has."""

from __future__ import annotations

from collections.abc import Iterator

from chainforge.core.errors import InputError
from chainforge.doctor.findings import Context, Finding, Level, NotHere, Training
from chainforge.doctor.lengths import longest_prompt
from chainforge.train.architecture import Shape
from chainforge.train.memory import GIB, Estimate, estimate
from chainforge.train.remedies import remedies

TIGHT = 0.9  # of the device: beyond this a longer prompt may be one too many
SHOWN = 4


def check_memory(context: Context) -> Iterator[Finding]:
    """Estimate each training stage; where it does not fit, say which setting would make it."""
    for stage in context.training:
        try:
            yield _of(stage, context)
        except (InputError, TypeError, ValueError, KeyError) as error:
            yield Finding("warning", "memory", f"not known: {error}", stage.name)


def _of(stage: Training, context: Context) -> Finding:
    shape = context.shape(stage.step.stage.model or "")
    if isinstance(shape, str):
        return Finding("warning", "memory", f"not known: {shape}", stage.name)
    teacher: Shape | None = None
    if stage.step.stage.teacher_model:
        found = context.shape(stage.step.stage.teacher_model)
        if isinstance(found, str):
            return Finding("warning", "memory", f"not known: {found}", stage.name)
        teacher = found
    device = _device(stage, context)
    needed = estimate(
        stage.recipe,
        stage.settings,
        shape,
        stage.layout,
        teacher=teacher,
        prompt_tokens=_prompt_tokens(stage, context),
        device_bytes=device,
    )
    words = _in_words(needed)
    if device is None:
        return Finding("ok", "memory", f"{words}; no GPU is here to compare it with", stage.name)
    of = f"of {device / GIB:.1f} GiB"
    if needed.peak <= TIGHT * device:
        return Finding("ok", "memory", f"{words}, {of}", stage.name)
    changes, then = remedies(
        stage.recipe, stage.settings, shape, stage.layout, int(TIGHT * device), teacher=teacher
    )
    if not changes:
        advice = "no setting is known that would help: take a smaller model or a larger device"
    elif then.peak <= TIGHT * device:
        advice = f"{'; '.join(changes)} would need {then.peak / GIB:.1f} GiB"
    else:
        advice = (
            f"not even {'; '.join(changes)} would do ({then.peak / GIB:.1f} GiB): take a smaller "
            "model, or more or larger GPUs"
        )
    level: Level = "error" if needed.peak > device else "warning"
    return Finding(level, "memory", f"{words}, {of}: {advice}", stage.name)


def _prompt_tokens(stage: Training, context: Context) -> int | None:
    """Return the tokens of a stage's longest prompt; None where they cannot be counted."""
    try:
        return longest_prompt(context, stage.step).tokens or None
    except (NotHere, InputError):
        return None


def _device(stage: Training, context: Context) -> int | None:
    """Return the memory that one process of a stage has for itself."""
    if stage.settings["use_cpu"]:
        here = max(1, stage.layout.processes // stage.layout.machines)
        return context.machine.memory // here
    return min(context.machine.gpus, default=None)


def _in_words(needed: Estimate) -> str:
    parts = [(name, size) for name, size in needed.parts.items() if size > needed.peak // 50]
    shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts[:SHOWN])
    assumed = f"; {', '.join(needed.assumed)}" if needed.assumed else ""
    return f"{needed.peak / GIB:.1f} GiB a device ({shown}{assumed})"
