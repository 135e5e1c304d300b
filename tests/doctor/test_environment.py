"""Launch files: the layout that each asks for, and what is wrong with it."""

import re
from pathlib import Path

import pytest
import yaml

from chainforge.doctor.environment import (
    PACKAGES,
    PYTHON,
    Machine,
    check_launch,
    launch_variables,
    layout_of,
)
from chainforge.train.distributed import Layout, layout_here

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("accelerate_configs/*.yaml"))
TWO = {"distributed_type": "MULTI_GPU", "num_machines": 1, "num_processes": 2}
ZERO = TWO | {"distributed_type": "DEEPSPEED"}
GIB = 2**30
SERVER = Machine((24 * GIB,) * 8, 512 * GIB, 64)


def check(file, machine=SERVER):
    """Return the layout of a launch file, and what is wrong with it."""
    command = ["accelerate", "launch", "--config_file", str(file), "grpo.py"]
    layout, found = check_launch(command, "rl", machine)
    return layout, [finding.text for finding in found if finding.level == "error"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_ships_is_without_fault(file):
    found, problems = check(file)
    kind = {"cpu": "single", "single_gpu": "single", "cpu_ddp": "ddp", "multi_node": "ddp"}
    assert found.kind == kind.get(file.stem, file.stem)
    assert found.on_cpu == file.stem.startswith("cpu")
    assert found.whole_model
    assert found.shards_weights == (file.stem in ("fsdp2", "zero3"))
    assert found.shards_optimizer == (file.stem in ("fsdp2", "zero2", "zero3"))
    assert found.machines == (2 if file.stem == "multi_node" else 1)
    words = {"multi_node": "several machines", "zero2": "DeepSpeed", "zero3": "DeepSpeed"}
    assert [text for text in problems if words.get(file.stem, "none") not in text] == []


def test_a_launch_file_of_ones_own():
    assert layout_of(TWO | {"num_processes": 1}) == Layout()
    part = {"zero_stage": 3, "offload_param_device": "cpu"}
    found = layout_of(ZERO | {"deepspeed_config": part})
    assert (found.offload_parameters, found.offload_optimizer) == (True, False)
    assert not found.whole_model
    assert check_launch(["accelerate", "launch", "grpo.py"], "rl", SERVER)[0].processes == 8


@pytest.mark.parametrize(
    ("values", "gpus", "words"),
    [
        ({"distributed_type": "MULTI_CPU", "num_processes": 2}, 8, "starts one process and says"),
        (TWO | {"num_machines": 3}, 8, "not a multiple of num_machines"),
        (TWO | {"num_machines": 2}, 8, "the launcher must be started on each"),
        (TWO | {"num_processes": 8}, 2, "set num_processes: 2"),
        (ZERO | {"deepspeed_config": {"zero_stage": 2}}, 8, "DeepSpeed is not installed"),
        (TWO | {"num_machines": 0, "num_processes": 16}, 8, "set num_processes: 8"),
        ({"num_processes": "two"}, 8, "two"),
    ],
)
def test_faults_of_a_launch_file(tmp_path, values, gpus, words):
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(values))
    _, problems = check(tmp_path / "launch.yaml", Machine((24 * GIB,) * gpus, 64 * GIB, 8))
    assert any(words in text for text in problems), problems


@pytest.mark.parametrize("kind", ["single", "ddp", "fsdp2", "zero2", "zero3"])
def test_a_stage_reads_its_layout_from_the_variables_of_its_launcher(kind):
    layout = Layout(kind, 1 if kind == "single" else 8)
    assert layout_here(launch_variables(layout)) == layout


def test_the_versions_are_those_of_the_project():
    pins = re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text()
    for name, (oldest, tested, *_) in PACKAGES.items():
        assert dict(pins)[name] == tested
        assert f'"{name}>={oldest}' in project
    assert f'requires-python = ">={PYTHON}"' in project
