import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from chainforge.core.errors import InputError
from chainforge.training.checkpoints import check_save_steps, damage, last_good


def checkpoint(directory, step):
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"w": torch.zeros(4)}, str(path / "model.safetensors"))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (path / name).write_bytes(b"x")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def test_the_newest_by_number_not_by_name(tmp_path):
    assert last_good(tmp_path / "none") is None
    for step in (9, 10, 2):
        checkpoint(tmp_path, step)
    assert last_good(tmp_path).name == "checkpoint-10"


FAULTS = {
    "trainer_state.json": lambda path: path.write_text('{"global'),
    "model.safetensors": lambda path: path.write_bytes(path.read_bytes()[:10]),
    "optimizer.pt": lambda path: path.unlink(),
    "scheduler.pt": lambda path: path.write_bytes(b""),
    "rng_state.pth": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_torn_checkpoint_is_set_aside_and_the_one_before_used(tmp_path, name, caplog):
    checkpoint(tmp_path, 4)
    torn = checkpoint(tmp_path, 5)
    assert damage(torn) is None
    FAULTS[name](torn / name)
    assert name.partition(".")[0] in damage(torn)
    assert last_good(tmp_path).name == "checkpoint-4"
    assert (tmp_path / "checkpoint-5.torn").is_dir()
    assert "checkpoint-5 is not whole" in caplog.text
    checkpoint(tmp_path, 5)
    assert last_good(tmp_path).name == "checkpoint-5"


def test_an_empty_checkpoint_is_torn(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    assert last_good(tmp_path) is None


def options(**changes):
    values = {
        "save_strategy": "steps",
        "save_steps": 4,
        "steps_per_generation": 4,
        "num_iterations": 1,
        "gradient_accumulation_steps": 1,
    }
    return SimpleNamespace(**(values | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"save_steps": 8},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 4, "save_steps": 1},
        {"save_strategy": "no", "save_steps": 3},
        {"steps_per_generation": 1, "num_iterations": 2, "save_steps": 2},
    ],
)
def test_saves_between_generations_are_fine(changes):
    check_save_steps(options(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"save_steps": 6},
        {"save_steps": 0.5},
        {"steps_per_generation": 1, "num_iterations": 2, "save_steps": 3},
    ],
)
def test_saves_inside_a_generation_window_are_refused(changes):
    with pytest.raises(InputError, match="use a multiple of"):
        check_save_steps(options(**changes))
