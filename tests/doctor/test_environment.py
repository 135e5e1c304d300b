"""Launch files: the layout that each asks for, and what is wrong with it."""

from pathlib import Path

import pytest
import yaml

from chainforge.doctor.environment import faults, layout_of
from chainforge.train.distributed import Layout

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("accelerate_configs/*.yaml"))
TWO = {"distributed_type": "MULTI_GPU", "num_machines": 1, "num_processes": 2}
FSDP = TWO | {"distributed_type": "FSDP"}
ZERO = TWO | {"distributed_type": "DEEPSPEED"}
FULL = {"fsdp_version": 2}


def write(path, **values):
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_ships_is_without_fault(file):
    assert list(faults(file)) == []
    found = layout_of(file)
    kind = {"cpu": "single", "single_gpu": "single", "cpu_ddp": "ddp", "multi_node": "ddp"}
    assert found.kind == kind.get(file.stem, file.stem)
    assert found.on_cpu == file.stem.startswith("cpu")
    assert found.whole_model
    assert found.shards_weights == (file.stem in ("fsdp2", "zero3"))
    assert found.shards_optimizer == (file.stem in ("fsdp2", "zero2", "zero3"))
    assert found.machines == (2 if file.stem == "multi_node" else 1)


def test_a_launch_file_of_ones_own(tmp_path):
    assert layout_of(None) == Layout()
    assert layout_of(write(tmp_path / "one.yaml", **TWO | {"num_processes": 1})) == Layout()
    part = {"zero_stage": 3, "offload_param_device": "cpu", "zero3_save_16bit_model": True}
    found = layout_of(write(tmp_path / "z.yaml", **ZERO, deepspeed_config=part))
    assert (found.offload_parameters, found.offload_optimizer) == (True, False)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"distributed_type": "MULTI_CPU", "num_processes": 2}, "starts one process"),
        (TWO | {"num_machines": 3}, "not a multiple of num_machines"),
        (FSDP | {"fsdp_config": FULL, "use_cpu": True}, "runs as plain DDP"),
        (ZERO | {"deepspeed_config": {"zero_stage": 3}}, "can the weights be gathered"),
    ],
)
def test_faults_of_a_launch_file(tmp_path, values, words):
    found = list(faults(write(tmp_path / "launch.yaml", **values)))
    assert any(words in fault for fault in found), found
