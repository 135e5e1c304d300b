"""Check what a chain needs of this machine: versions, GPUs, launch files and servers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.version import Version

from chainforge.core import paths
from chainforge.core.config import read_yaml
from chainforge.core.errors import InputError
from chainforge.rewards.confinement import gaps
from chainforge.rewards.verifier_pool import cores
from chainforge.train.distributed import DDP, SINGLE, ZERO3, Layout, truth

# Oldest supported, then tested, first the one of constraints.txt. A test compares the files.
PACKAGES: dict[str, tuple[str, ...]] = {
    "torch": ("2.6", "2.13.0"),
    "transformers": ("5.23", "5.23.0", "5.24.0"),
    "trl": ("1.16", "1.16.0"),
    "peft": ("0.21", "0.21.2"),
    "accelerate": ("1.15", "1.15.0"),
    "datasets": ("5.2", "5.2.0"),
    "bitsandbytes": ("0.50", "0.50.2"),
}
PYTHON = "3.11"
SECONDS = 5.0  # for a server to answer


Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One finding: its level, what was checked, the stage and the setting, and what to do."""

    level: Level
    check: str
    text: str
    stage: str | None = None
    key: str | None = None


@dataclass(frozen=True)
class Machine:
    """The memory of each GPU and of the machine in bytes, and its cores."""

    gpus: tuple[int, ...]
    memory: int
    cores: int


def this_machine() -> Machine:
    """Return what this machine has; torch is not asked, because it takes seconds to load."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        sizes = [line.partition(",")[0].strip() for line in done.stdout.splitlines()]
    except (OSError, subprocess.SubprocessError):
        sizes = []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    gpus = tuple(int(size) * 2**20 for size in sizes if size.isdigit())
    return Machine(gpus, memory, cores())


def check_machine(machine: Machine) -> Iterator[Finding]:
    """Compare the installed libraries with those tested, and report what the machine has."""
    if Version(platform.python_version()) < Version(PYTHON):
        yield Finding("error", "versions", f"Python {PYTHON} or newer is needed")
    for name, (oldest, *tested) in PACKAGES.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("error", "versions", f"{name} is not installed: pip install {name}")
            continue
        if Version(found) < Version(oldest):
            text = f"{name} {found} is too old: pip install '{name}>={oldest}'"
            yield Finding("error", "versions", text)
        elif Version(found).release[:2] not in [Version(one).release[:2] for one in tested]:
            was = f"{name} {found} was not tested; {tested[0]} was"
            text = f"{was}: pip install -c constraints.txt ."
            yield Finding("warning", "versions", text)
        else:
            yield Finding("ok", "versions", f"{name} {found}")
    gpus = ", ".join(f"{size / 2**30:.0f} GiB" for size in machine.gpus)
    words = f"{len(machine.gpus)} GPUs ({gpus})" if machine.gpus else "no GPU"
    memory = f"{machine.memory / 2**30:.0f} GiB of memory"
    yield Finding("ok", "machine", f"{words}, {machine.cores} cores, {memory}")
    if missing := gaps():
        text = (
            f"this machine cannot deny verifier processes {', '.join(missing)}: that "
            "needs Linux 5.13 with seccomp and Landlock, and libseccomp (apt install libseccomp2)"
        )
        yield Finding("warning", "verifier", text)
    else:
        yield Finding("ok", "verifier", "no network, files, new processes or others' secrets")


def layout_of(given: dict[str, Any]) -> Layout:
    """Return the layout that a launch file asks for."""
    launch = str(given.get("distributed_type", "NO")).upper()
    fsdp, zero = (dict(given.get(name) or {}) for name in ("fsdp_config", "deepspeed_config"))
    kinds = {
        "MULTI_GPU": DDP,
        "FSDP": f"fsdp{fsdp.get('fsdp_version', 1)}",
        "DEEPSPEED": f"zero{zero.get('zero_stage', 2)}",
    }
    kind, processes = kinds.get(launch, SINGLE), int(given.get("num_processes", 1))
    offload = truth(fsdp.get("fsdp_offload_params"))
    return Layout(
        kind=kind if processes > 1 else SINGLE,
        processes=1 if kind == SINGLE else processes,
        machines=max(1, int(given.get("num_machines", 1))),
        on_cpu=truth(given.get("use_cpu")),
        offload_parameters=offload or zero.get("offload_param_device") in ("cpu", "nvme"),
        offload_optimizer=offload or zero.get("offload_optimizer_device") in ("cpu", "nvme"),
        whole_model=kind != ZERO3 or truth(zero.get("zero3_save_16bit_model")),
    )


def faults(given: dict[str, Any], layout: Layout, gpus: int) -> Iterator[str]:
    """Yield what is wrong with a launch file on this machine, and what to write instead.

    What a stage's own settings decide, such as 4-bit weights, is `train.distributed.refusals`.
    """
    processes, machines = int(given.get("num_processes", 1)), layout.machines
    if processes != layout.processes:
        yield (
            f"num_processes: {processes} with distributed_type "
            f"{given.get('distributed_type', 'NO')}: accelerate starts one process and says "
            "nothing; write MULTI_GPU"
        )
    if processes % machines:
        yield f"num_processes: {processes} is not a multiple of num_machines, {machines}"
    if machines > 1:
        yield (
            "several machines: the launcher must be started on each, which a chain does not do; "
            "use the stage's command in accelerate_configs/multi_node.slurm"
        )
    if layout.kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        yield "DeepSpeed is not installed: pip install 'deepspeed>=0.18'"
    wanted = layout.processes // layout.machines
    if not layout.on_cpu and 0 < gpus < wanted:
        yield f"{wanted} processes, but {gpus} GPUs: set num_processes: {gpus}"


def check_launch(command: list[str], stage: str, machine: Machine) -> tuple[Layout, list[Finding]]:
    """Return how a command spreads a stage over processes, and what is wrong with its file."""
    gpus = len(machine.gpus)
    if "--config_file" not in command:  # accelerate uses all GPUs by itself
        several = command[0] == "accelerate" and gpus > 1
        return (Layout(DDP, gpus) if several else Layout()), []
    file = Path(command[command.index("--config_file") + 1])
    layout = Layout()
    try:
        given = read_yaml(file)
        layout = layout_of(given)
        problems = list(faults(given, layout, gpus))
    except (InputError, ValueError, TypeError) as error:
        problems = [str(error)]
    name = paths.short(file)
    found = [Finding("error", "launch", f"{name}: {text}", stage) for text in problems]
    fine = Finding("ok", "launch", f"{name}: {layout.kind}, {layout.processes} processes", stage)
    return layout, found or [fine]


def launch_variables(layout: Layout) -> dict[str, str]:
    """Return the environment from which a stage reads its layout, as the launcher sets it."""
    found = {"WORLD_SIZE": str(layout.processes)}
    found["LOCAL_WORLD_SIZE"] = str(layout.processes // layout.machines)
    if layout.kind.startswith("fsdp"):
        found |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": layout.kind[-1]}
    if layout.kind.startswith("zero"):
        found["ACCELERATE_USE_DEEPSPEED"] = "true"
        found["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = layout.kind[-1]
        found["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] = str(layout.whole_model)
    return found


def check_server(address: str, stage: str) -> Finding:
    """Ask a server whether it is up: any answer counts, also that a key is missing."""
    address = address.rstrip("/")
    try:
        with urllib.request.urlopen(f"{address}/models", timeout=SECONDS) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    except (OSError, ValueError):
        status = 0
    if 0 < status < 500:
        return Finding("ok", "server", f"the server at {address} answers", stage)
    said = f"answers {status}" if status else "does not answer"
    text = f"the server at {address} {said}: start it, or correct `base_url`"
    return Finding("error", "server", text, stage, "base_url")
