"""QLoRA from SFT through GRPO with the recipes themselves, on 4-bit weights (nf4) on a CPU."""

import itertools

import pytest
import torch
from small import GRPO, TRAIN, by_length

from chainforge.core.artifacts import read_manifest
from chainforge.core.jsonl import read_rows, write_rows

QLORA = {
    "use_peft": True, "lora_target_modules": ["q_proj", "down_proj"], "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4", "lora_r": 4,
}  # fmt: skip
ROW = {
    "prompt": [{"role": "user", "content": "1 + 1 ="}],
    "completion": "<reasoning_process>1 + 1 = 2</reasoning_process>\n<summary>2</summary>",
}


@pytest.mark.parametrize("how", ["continue", "merge"])
def test_qlora_goes_from_sft_through_grpo(how, tmp_path, wide_model, stage):
    from transformers import AutoModelForCausalLM

    write_rows(tmp_path / "rows.jsonl", [ROW] * 16)
    flags = ["--model_name_or_path", wide_model, "--data", tmp_path / "rows.jsonl"]
    code, error = stage("sft", "cold", TRAIN | QLORA | {"max_length": 256}, *flags)
    assert code == 0, error
    given = tmp_path / "cold" / ("adapter" if how == "continue" else "model")
    settings = GRPO | QLORA | {"rewards": by_length(tmp_path), "beta": 0.1, "adapter": how}
    code, error = stage("grpo", "reason", settings, "--model_name_or_path", given)
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
