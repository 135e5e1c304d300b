"""Distillation by probabilities where the padded vocabularies differ, from the recipe to the files."""

import pytest
from small import TASK, TRAIN

from chainforge.core import artifacts
from chainforge.core.jsonl import read_rows

SMALL, LARGE = 320, 384  # as in `padded_models`
SETTINGS = TRAIN | {"tasks": [TASK | {"size": 32}], "max_steps": 16, "max_completion_length": 12}
SETTINGS |= {"per_device_train_batch_size": 16, "learning_rate": 5e-3, "beta": 0.5}
LORA = {"use_peft": True, "lora_target_modules": "all-linear", "learning_rate": 0.02}


@pytest.mark.parametrize("method", [{}, LORA])
def test_the_student_learns_and_nothing_is_resized_on_disk(padded_models, tmp_path, stage, method):
    from safetensors.torch import load_file

    before = {path: artifacts.sha256(path) for path in padded_models.values()}
    flags = ["--model_name_or_path", padded_models["student", SMALL]]
    flags += ["--teacher_model_name_or_path", padded_models["teacher", LARGE]]
    code, error = stage("distill", "pupil", SETTINGS | method, *flags)
    assert code == 0, error
    losses = [row["loss"] for row in read_rows(tmp_path / "pupil/metrics.jsonl") if "loss" in row]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses
    assert {path: artifacts.sha256(path) for path in padded_models.values()} == before
    weights = load_file(tmp_path / "pupil/model/model.safetensors")
    assert weights["model.embed_tokens.weight"].shape[0] == SMALL
    assert not [name for name in weights if name.endswith("head.bias")]
    notes = artifacts.read_manifest(tmp_path / "pupil").notes["vocabulary"]
    assert (notes["student"], notes["teacher"]) == (SMALL, LARGE)
