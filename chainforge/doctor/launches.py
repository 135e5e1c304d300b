"""Launch files, and which ways of training go with them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from chainforge.core import paths
from chainforge.core.errors import InputError
from chainforge.doctor.findings import Context, Finding, of_stage
from chainforge.train.distributed import LAYOUTS, Layout, faults, method_of, refusals


def check_launches(context: Context) -> Iterator[Finding]:
    """Look through the launch file of each stage that has one."""
    for step in context.steps:
        file = context.launch_file(step)
        if file is None:
            continue
        try:
            problems = list(faults(file))
        except (InputError, ValueError, TypeError) as error:
            problems = [str(error)]
        layout = context.layout(step)
        problems += _out_of_place(layout)
        name = paths.short(file)
        fine = f"{name}: {_in_words(layout)}"
        yield from of_stage(
            "launch", step.stage.name, [f"{name}: {problem}" for problem in problems], fine
        )
        gpus, wanted = len(context.machine.gpus), layout.processes // layout.machines
        if not layout.on_cpu and 0 < gpus < wanted:
            words = f"{name}: {wanted} processes, but {gpus} GPUs here: set num_processes: {gpus}"
            yield Finding("error", "launch", words, step.stage.name)


def check_matrix(context: Context) -> Iterator[Finding]:
    """Hold each training stage to the table of what goes together."""
    for stage in context.training:
        method, layout = method_of(stage.settings), stage.layout
        words = f"{method}, {LAYOUTS.get(layout.kind, layout.kind)}"
        problems = list(refusals(stage.settings, layout))
        yield from of_stage("matrix", stage.name, problems, f"{words}: nothing is against it")
        if layout.on_cpu and not stage.settings["use_cpu"]:
            text = "the launch file is for the CPU: set `use_cpu: true` in the stage too"
            yield Finding("error", "matrix", text, stage.name)


def _out_of_place(layout: Layout) -> Iterator[str]:
    if layout.machines > 1:
        yield (
            "several machines: the launcher must be started on each, which a chain does not do; "
            "send the stage's line to accelerate_configs/multi_node.slurm"
        )
    if layout.kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        yield "DeepSpeed is not installed: pip install '.[deepspeed]'"


def _in_words(layout: Layout) -> str:
    if layout.processes == 1:
        return "one process"
    return f"{layout.processes} processes, {LAYOUTS.get(layout.kind, layout.kind)}"
