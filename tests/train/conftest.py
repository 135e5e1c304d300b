"""One way to train a stage on the tiny model, and the stages that others start from."""

import shutil
from pathlib import Path

import pytest
from stages import METHODS, stage_of


@pytest.fixture(scope="session")
def made(wide_model, tmp_path_factory):
    """Return the stage that others start from, trained once: `made("sft", "lora")`."""
    folder, stages = tmp_path_factory.mktemp("runs"), {}

    def make(kind, method):
        if (kind, method) not in stages:
            place = folder / f"{kind}-{method}"
            stages[kind, method] = stage_of(kind, wide_model, place, *METHODS[method])
        return stages[kind, method]

    return make


@pytest.fixture
def train(tmp_path):
    """Train a stage in a folder of its own: `train("sft", model, *flags)`."""
    return lambda kind, model, *flags: stage_of(kind, model, tmp_path / "out", *flags)


@pytest.fixture
def bare(made, tmp_path):
    """An adapter alone, away from the stage that left it."""
    return Path(shutil.copytree(made("sft", "lora").path("adapter"), tmp_path / "bare"))


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model that may be spoilt."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def half(wide_model, tmp_path):
    """A model in bfloat16."""
    from transformers import AutoModelForCausalLM

    path = Path(shutil.copytree(wide_model, tmp_path / "half"))
    AutoModelForCausalLM.from_pretrained(path).bfloat16().save_pretrained(path)
    return path
