"""See that a launcher started what it was asked for, before anything is loaded.

`accelerate launch --cpu --num_processes 2` starts one process and says nothing of it; the same
goes for a launch file with `distributed_type: NO` or `MULTI_CPU` (accelerate 1.15, its
`simple_launcher`). The run would go on with half the batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from chainforge.core.errors import InputError

# What tells a process that it is one of several, from torchrun and from the MPI launchers.
WORLD_KEYS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# accelerate gives these to a lone process only when it was asked for more than one.
MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
LAUNCHED = "ACCELERATE_DYNAMO_MODE"  # every launcher of accelerate sets it


def check_started(
    environment: Mapping[str, str] = os.environ, outside: Mapping[str, str] | None = None
) -> None:
    """Raise `InputError` when accelerate was asked for several processes and started one.

    `outside` is the launcher's own environment (the parent's, when left out): what is set there
    already was not set by accelerate, and says nothing.
    """
    if LAUNCHED not in environment or any(key in environment for key in WORLD_KEYS):
        return
    if not all(key in environment for key in MEETING_POINT):
        return
    outside = _environment_of(os.getppid()) if outside is None else outside
    if any(key in outside for key in MEETING_POINT):
        return
    raise InputError(
        "accelerate launch was asked for several processes and started one: with --cpu, and with "
        "`distributed_type: NO` or `MULTI_CPU`, it never starts more. For two on the CPU use "
        "--config_file accelerate_configs/cpu_ddp.yaml (and `use_cpu: true` in the recipe); for "
        "one leave --num_processes out"
    )


def _environment_of(process: int) -> dict[str, str]:
    """Return the environment that a process was started with; empty where that cannot be read."""
    try:
        text = Path(f"/proc/{process}/environ").read_bytes().decode("utf-8", "replace")
    except OSError:
        return {}
    pairs = (item.partition("=") for item in text.split("\0") if item)
    return {key: value for key, _, value in pairs}
