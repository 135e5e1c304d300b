import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from configs import settings_of

from chainforge.core.errors import InputError
from chainforge.train.distributed import (
    Layout,
    check_supported,
    refusals,
)

ROOT = Path(__file__).parents[2]


def test_the_slurm_script_starts_each_machine_with_its_rank(tmp_path):
    """The script itself, with small scripts for Slurm's commands and for accelerate."""
    programs = {
        "scontrol": 'printf "node-a\\nnode-b\\n"',
        "srun": 'shift; for n in 0 1; do SLURM_NODEID=$n "$@"; done',
        "accelerate": 'printf "%s\\n" "$*"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "123"}
    script = ROOT / "accelerate_configs/multi_node.slurm"
    done = subprocess.run(
        ["bash", script, "recipes/grpo.py", "--config", "my reason.yaml"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"} | slurm,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    common = "--num_machines 2 --num_processes 16 --machine_rank"
    assert f"{common} 0 --main_process_ip node-a --main_process_port 20123 recipes/grpo.py" in first
    assert f"{common} 1 --main_process_ip node-a" in second
    assert second.endswith("recipes/grpo.py --config my reason.yaml")


LORA = {"use_peft": True}
QLORA = LORA | {"load_in_4bit": True, "dtype": "bfloat16"}
VLLM = {"use_vllm": True}


def refused(settings, kind, **layout):
    return list(refusals(settings_of("grpo", settings), Layout(kind, 8, **layout)))


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        (QLORA, "fsdp2", "FSDP 2 cannot shard 4-bit weights"),
        (QLORA | VLLM, "single", "does not merge into the 4-bit"),
        (QLORA, "zero3", "bnb_4bit_quant_storage: under ZeRO-3"),
        ({"load_in_4bit": True}, "single", "quantised weights cannot be trained"),
        (LORA | {"load_in_8bit": True}, "zero3", "ZeRO-3 cannot shard bytes"),
        (VLLM | {"use_cpu": True}, "single", "feeds vLLM on GPUs only"),
        ({"use_cpu": True}, "fsdp2", "runs as plain DDP on the CPU"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(settings, kind, words):
    assert any(words in reason for reason in refused(settings, kind))


def test_a_stage_is_refused_where_it_was_launched():
    def check(environment, world_size=2, **settings):
        training = SimpleNamespace(**settings_of("sft", settings), world_size=world_size)
        check_supported(training, SimpleNamespace(), environment)

    ddp = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    fsdp = ddp | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    zero = ddp | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    check(ddp)
    check(fsdp, use_peft=True)
    for environment, settings, words in (
        (fsdp, QLORA, "cannot shard 4-bit"),
        (ddp, {"world_size": 1}, "2 processes were launched, but each would train alone"),
        (zero, {}, "16bit_model"),
    ):
        with pytest.raises(InputError, match=words):
            check(environment, **settings)
    check(zero | {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"})
