"""A small trained model, which servers, engines, peers and llama.cpp all run."""

import pytest
import yaml
from runs import CPU, ROOT, greedy, recipe, tasks


@pytest.fixture(scope="session")
def traces(tmp_path_factory):
    """Worked solutions of the quickstart's problems."""
    folder = tmp_path_factory.mktemp("data")
    recipe(folder, "collect", tasks=tasks(400, "train"), system_prompt="", output_dir="traces")
    return folder / "traces"


@pytest.fixture(scope="session")
def trained(tmp_path_factory, traces):
    """The quickstart's cold start with little data, in full: it answers most problems."""
    folder = tmp_path_factory.mktemp("trained")
    settings = yaml.safe_load((ROOT / "recipes/quickstart/cold_start.yaml").read_text())
    base = ROOT / "recipes/quickstart/base"
    recipe(folder, "sft", **settings | CPU, model_name_or_path=base, data=traces,
           output_dir="cold_start")  # fmt: skip
    return folder / "cold_start/model"


@pytest.fixture(scope="session")
def local(tmp_path_factory, trained):
    """What the model answers in a process of its own, with transformers."""
    return greedy(tmp_path_factory.mktemp("local"), "local", trained)
