"""What the doctor adds to a stage's preflight, and how it reports."""

import re
from pathlib import Path

import pytest
from quickcopy import Copy

from chainforge.doctor import environment
from chainforge.doctor.environment import Machine, check_launch, launch_variables
from chainforge.train.distributed import Layout, layout_here

ROOT = Path(__file__).parents[2]
GIB = 2**30
LAPTOP, SERVER = Machine((), 24 * GIB, 2), Machine((24 * GIB,) * 8, 512 * GIB, 64)


@pytest.fixture
def look(tmp_path, monkeypatch):
    """Change settings of one stage of the quickstart, and let the doctor look at that stage."""
    copy = Copy(tmp_path, monkeypatch)

    def examined(name, machine=LAPTOP, launch="cpu", **settings):
        copy.change(name, **settings)
        return copy.examine(name, machine, launch)

    examined.copy = copy
    return examined


def test_a_pool_that_is_not_made_yet_is_no_fault(look):
    """Neither that of rejection sampling, nor the one whose pass rates choose prompts of RL."""
    look.copy.stage("rejection", data="rl", model=None)
    look.copy.stage("rl_final", data="rejection")
    found = [f for f in look("rl_final") if f.level == "error"]
    assert not found


def test_what_a_server_runs_is_checked_for_its_processes(look):
    """Eight processes on GPUs, looked at from a machine without any."""
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    batch |= {"steps_per_generation": 1, "use_cpu": False}
    found = look("rl", SERVER, launch="ddp", **batch, num_generations=8)
    assert [f.text for f in found if (f.level, f.stage) == ("error", "rl")] == []
    (text,) = [f.text for f in found if (f.check, f.stage) == ("memory", "rl")]
    assert "of 24.0 GiB" in text
    found = look("rl", SERVER, launch="ddp", **batch, num_generations=16)
    assert any("divisible" in f.text for f in found if f.level == "error"), found


def test_launch_files_are_checked_for_the_machine():
    def said(name, machine=SERVER):
        command = [
            "accelerate",
            "launch",
            "--config_file",
            f"{ROOT}/accelerate_configs/{name}.yaml",
        ]
        return " ".join(finding.text for finding in check_launch(command, "rl", machine)[1])

    assert "DeepSpeed is not installed" in said("zero3")
    assert "num_processes: 2" in said("ddp", Machine((24 * GIB,) * 2, 64 * GIB, 8))
    assert check_launch(["accelerate", "launch", "grpo.py"], "rl", SERVER)[0].processes == 8
    for layout in (Layout("single", 1), Layout("ddp", 8), Layout("fsdp2", 8), Layout("zero3", 8)):
        assert layout_here(launch_variables(layout)) == layout


def test_the_versions_are_those_of_the_project():
    pins = re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text()
    for name, (oldest, tested) in environment.PACKAGES.items():
        assert dict(pins)[name] == tested
        assert f'"{name}>={oldest}' in project
    assert f'requires-python = ">={environment.PYTHON}"' in project
