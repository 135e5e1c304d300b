import json
import shutil

import pytest

from chainforge.core.errors import InputError
from chainforge.train.checkpoints import check_saving, last_good, rotate, seal, window

FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "global_step/shard.pt",
)


def checkpoint(directory, step, sealed=True, **state):
    path = directory / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    for name in FILES:
        (path / name).write_bytes(f"{name} of step {step}".encode())
    state = {"global_step": step, "max_steps": 12} | state
    (path / "trainer_state.json").write_text(json.dumps(state))
    if sealed:
        seal(path)
    return path


def names(directory):
    return {path.name for path in directory.iterdir()}


def test_the_newest_by_number_counts_and_what_is_not_whole_is_set_aside(tmp_path, caplog):
    assert last_good(tmp_path / "none") is None
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, sealed=False)
    (tmp_path / "checkpoint-12").mkdir()
    assert last_good(tmp_path).name == "checkpoint-10"
    damaged = {"damaged-checkpoint-11", "damaged-checkpoint-12"}
    assert names(tmp_path) == {"checkpoint-9", "checkpoint-10"} | damaged
    assert "checkpoint-11 is not whole (it was not written to its end" in caplog.text
    rotate(tmp_path, None, None)  # once the next one is whole
    assert names(tmp_path) == {"checkpoint-9", "checkpoint-10"}


def test_a_checkpoint_is_no_better_than_the_best_one_that_it_points_to(tmp_path, caplog):
    checkpoint(tmp_path, 2)
    best = checkpoint(tmp_path, 4, best_model_checkpoint="runs/x/checkpoints/checkpoint-4")
    checkpoint(tmp_path, 6, best_model_checkpoint="runs/x/checkpoints/checkpoint-4")
    assert last_good(tmp_path).name == "checkpoint-6"
    (best / "global_step/shard.pt").write_bytes(b"")
    assert last_good(tmp_path).name == "checkpoint-2"
    assert "the best checkpoint before it, checkpoint-4: global_step/shard.pt" in caplog.text


def test_only_whole_ones_are_counted_when_old_ones_are_removed(tmp_path):
    for step in (2, 4, 6, 8):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 5, sealed=False)
    rotate(tmp_path, 2, best="runs/x/checkpoints/checkpoint-2")
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-6", "checkpoint-8"}
    rotate(tmp_path, 1, best=None)
    assert names(tmp_path) == {"checkpoint-8"}


def test_another_number_of_processes_is_refused(tmp_path):
    path = checkpoint(tmp_path, 4, sealed=False)
    for rank in (0, 1):
        shutil.copy(path / "rng_state.pth", path / f"rng_state_{rank}.pth")
    (path / "rng_state.pth").unlink()
    seal(path)
    assert last_good(tmp_path, processes=2) == path
    with pytest.raises(InputError, match="made by 2 processes, and this run has 1"):
        last_good(tmp_path, processes=1)


def grpo(**changes):
    """Return a GRPOConfig as the recipe gets it, with TRL's own resolution of the window."""
    from trl import GRPOConfig

    fixed = {"use_cpu": True, "bf16": False, "output_dir": "x", "report_to": "none"}
    fixed |= {"per_device_train_batch_size": 4, "num_generations": 4, "save_steps": 4}
    return GRPOConfig(**(fixed | changes))


HALVES = {"steps_per_generation": 4, "gradient_accumulation_steps": 2}
BETWEEN = [
    (4, {"num_iterations": 4}),
    (2, HALVES),
    (4, {"steps_per_generation": 4, "save_strategy": "epoch", "save_steps": 3}),
]
UNEVEN = {"steps_per_generation": 3, "gradient_accumulation_steps": 2}
REFUSED = [
    ("save_steps: 6 .* window of 4 .* of 4$", {"steps_per_generation": 4, "save_steps": 6}),
    ("save_steps: 3 .* multiple of 4$", {"generation_batch_size": 16, "save_steps": 3}),
    (r"gradient_accumulation_steps \(2\) and steps_per_generation x num_iterations \(3\)", UNEVEN),
    ("^save_strategy: best: use", {"save_strategy": "best", "metric_for_best_model": "reward"}),
    ("^save_only_model: ", {"save_only_model": True}),
    ("^reward_weights: ", {"reward_weights": [1.0]}),
    ("^resume_from_checkpoint: ", {"resume_from_checkpoint": "x"}),
]


@pytest.mark.parametrize(("steps", "changes"), BETWEEN)
def test_saves_between_generations_are_fine(steps, changes):
    check_saving(grpo(**changes))
    assert window(grpo(**changes)) == steps


@pytest.mark.parametrize(("words", "changes"), REFUSED)
def test_what_would_not_resume_exactly_is_refused(words, changes):
    with pytest.raises(InputError, match=words):
        check_saving(grpo(**changes))
