"""Run a recipe sharded on the CPU: FSDP2 and DeepSpeed, which accelerate runs on GPUs only.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 \
        --mixed_precision no benchmarks/on_cpu.py recipes/sft.py --bf16 false ...

Not for use: it replaces two private methods of accelerate, so that the layouts can be tested on a
machine without a GPU. DeepSpeed also needs `DS_ACCELERATOR=cpu`. With `KILL_AT=n` the last process
is killed (SIGKILL) when n steps are taken, as a machine that goes down would.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer


def backend(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def set_device(self: PartialState) -> None:
    self.device = torch.device("cpu")


def kill_at(steps: int) -> None:
    """Kill the last process of the launch when so many steps are taken."""
    take = Trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == steps and os.environ["RANK"] != "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, *args, **kwargs)

    Trainer.training_step = training_step


def main() -> None:
    if sys.argv[1:2] in (["--help"], []):
        print(f"usage: on_cpu.py RECIPE [settings]\n\n{__doc__}")
        return
    PartialState._prepare_backend, PartialState.set_device = backend, set_device
    if os.environ.get("KILL_AT"):
        kill_at(int(os.environ["KILL_AT"]))
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
