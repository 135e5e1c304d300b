"""QLoRA from SFT through GRPO with the recipes themselves, on 4-bit weights (nf4) on a CPU."""

import itertools
import json

import pytest
import torch
import yaml

from chainforge.core.artifacts import read_manifest
from chainforge.core.jsonl import read_rows

SUMS = {"dataset": "chain_sum", "min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
TASK = {"fn": "reasoning_gym", "params": SUMS, "size": 24, "split": "train"}
TRAIN = {
    "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False,
    "max_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 0.01,
    "save_strategy": "no", "use_peft": True, "lora_target_modules": ["q_proj", "down_proj"],
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "lora_r": 4,
}  # fmt: skip
ROW = {
    "prompt": [{"role": "user", "content": "1 + 1 ="}],
    "completion": "<reasoning_process>1 + 1 = 2</reasoning_process>\n<summary>2</summary>",
}


@pytest.mark.parametrize("how", ["continue", "merge"])
def test_qlora_goes_from_sft_through_grpo(how, tmp_path, wide_model, recipe):
    from transformers import AutoModelForCausalLM

    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 16)
    (tmp_path / "reward.py").write_text("def short(completion):\n    return -len(completion)\n")
    grpo = {"tasks": [TASK], "rewards": [{"fn": f"{tmp_path}/reward.py:short"}], "beta": 0.1,
            "adapter": how, "num_generations": 4, "max_completion_length": 8}  # fmt: skip
    (tmp_path / "cold.yaml").write_text(yaml.safe_dump(TRAIN | {"max_length": 256}))
    (tmp_path / "reason.yaml").write_text(yaml.safe_dump(TRAIN | grpo))
    code, error = recipe("sft", "--config", tmp_path / "cold.yaml", "--data",
                         tmp_path / "rows.jsonl", "--model_name_or_path", wide_model,
                         "--output_dir", tmp_path / "cold")  # fmt: skip
    assert code == 0, error
    given = tmp_path / "cold" / ("adapter" if how == "continue" else "model")
    code, error = recipe("grpo", "--config", tmp_path / "reason.yaml", "--model_name_or_path",
                         given, "--output_dir", tmp_path / "reason")  # fmt: skip
    assert code == 0, error
    logs = [row for row in read_rows(tmp_path / "reason/metrics.jsonl") if "kl" in row]
    assert logs[0]["kl"] == 0
    assert logs[1]["kl"] > 0
    manifest = read_manifest(tmp_path / "reason")
    assert manifest.notes["kl_reference"] == manifest.notes["starts_from"] == str(given)
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        for path in (wide_model, tmp_path / "cold/model", tmp_path / "reason/model")
    ]
    weights = [dict(model.named_parameters()) for model in models]
    assert {weight.dtype for weight in weights[2].values()} == {torch.float32}  # the base's own
    for one, two in itertools.pairwise(weights):
        moved = {name for name in one if not torch.equal(one[name], two[name])}
        assert len(moved) == 4
        assert all("q_proj.weight" in name or "down_proj.weight" in name for name in moved)
