import dataclasses
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from chainforge.core.errors import InputError
from chainforge.train import layout
from chainforge.train.layout import Layout, faults, layout_here, layout_of

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("accelerate_configs/*.yaml"))
TWO = {"distributed_type": "MULTI_GPU", "num_machines": 1, "num_processes": 2}


def write(path, **values):
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_known_keys_are_those_of_the_installed_accelerate():
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    fields = {field.name for field in dataclasses.fields(ClusterConfig)}
    assert fields == layout.KEYS
    parser = launch_command_parser()
    options = {action.dest for action in parser._actions}
    assert {name for name in options if name.startswith("fsdp_")} == layout.FSDP_KEYS
    (group,) = [group for group in parser._action_groups if group.title == "DeepSpeed Arguments"]
    assert {action.dest for action in group._group_actions} == layout.DEEPSPEED_KEYS


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_ships_is_without_fault(file):
    assert list(faults(file)) == []
    found = layout_of(file)
    kind = {"cpu": "single", "single_gpu": "single", "cpu_ddp": "ddp", "multi_node": "ddp"}
    assert found.kind == kind.get(file.stem, file.stem)
    assert found.on_cpu == file.stem.startswith("cpu")
    assert found.whole_model


def test_a_layout_says_what_each_process_holds(tmp_path):
    assert layout_of(None) == Layout()
    zero3 = layout_of(ROOT / "accelerate_configs/zero3.yaml")
    zero2 = layout_of(ROOT / "accelerate_configs/zero2.yaml")
    assert (zero3.shards_weights, zero3.shards_optimizer) == (True, True)
    assert (zero2.shards_weights, zero2.shards_optimizer) == (False, True)
    assert layout_of(ROOT / "accelerate_configs/multi_node.yaml").machines == 2
    one = write(tmp_path / "one.yaml", **TWO | {"num_processes": 1})
    assert layout_of(one) == Layout()
    part = {"zero_stage": 3, "offload_param_device": "cpu", "zero3_save_16bit_model": True}
    file = write(tmp_path / "z.yaml", **TWO | {"distributed_type": "DEEPSPEED"},
                 deepspeed_config=part)  # fmt: skip
    assert layout_of(file).offload_parameters
    assert not layout_of(file).offload_optimizer


FSDP = TWO | {"distributed_type": "FSDP"}
ZERO = TWO | {"distributed_type": "DEEPSPEED"}
FULL = {"fsdp_version": 2}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (TWO | {"num_proceses": 2}, "unknown key 'num_proceses'; did you mean 'num_processes'"),
        (FSDP | {"fsdp_config": FULL | {"fsdp_offload": True}}, "fsdp_config: unknown key"),
        (ZERO | {"deepspeed_config": {"zero_stag": 3}}, "deepspeed_config: unknown key"),
        ({"num_processes": 2}, "distributed_type is missing"),
        ({"distributed_type": "NO", "num_processes": 2}, "starts one process"),
        ({"distributed_type": "MULTI_CPU", "num_processes": 2}, "starts one process"),
        (TWO | {"num_machines": 3}, "not a multiple of num_machines"),
        (FSDP | {"fsdp_config": FULL, "use_cpu": True}, "runs as plain DDP"),
        (FSDP | {"fsdp_config": FULL | {"fsdp_use_orig_params": True}}, "leave out"),
        (FSDP | {"fsdp_config": FULL | {"fsdp_reshard_after_forward": "FULL_SHARD"}}, "true or"),
        (ZERO | {"deepspeed_config": {"zero_stage": 3}}, "can the weights be gathered"),
    ],
)
def test_faults_of_a_launch_file(tmp_path, values, words):
    found = list(faults(write(tmp_path / "launch.yaml", **values)))
    assert any(words in fault for fault in found), found


def test_a_section_that_is_no_mapping(tmp_path):
    with pytest.raises(InputError, match="fsdp_config must hold"):
        list(faults(write(tmp_path / "launch.yaml", **FSDP, fsdp_config="full")))


def test_the_layout_of_this_process():
    assert layout_here({}) == Layout()
    ddp = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    assert layout_here(ddp) == Layout("ddp", 16, 2)
    fsdp = ddp | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert layout_here(fsdp) == Layout("fsdp2", 16, 2)
    zero = ddp | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert layout_here(zero).shards_weights
    assert not layout_here(zero).whole_model
    assert layout_here(zero | {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}).whole_model
    assert layout_here(zero | {"WORLD_SIZE": "1"}).kind == "single"


def test_the_slurm_script_starts_each_machine_with_its_rank(tmp_path):
    """The script itself, with stand-ins for Slurm's commands and for accelerate."""
    programs = {
        "scontrol": 'printf "node-a\\nnode-b\\n"',
        "srun": 'shift; for n in 0 1; do SLURM_NODEID=$n "$@"; done',
        "accelerate": 'printf "%s\\n" "$*"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "123"}
    words = ["recipes/grpo.py", "--config", "my reason.yaml"]
    done = subprocess.run(
        ["bash", ROOT / "accelerate_configs/multi_node.slurm", *words],
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
