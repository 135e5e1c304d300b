"""Sizes of models, estimates against measurements, and what a device can hold."""

import json
from pathlib import Path

import pytest
from configs import settings_of

from chainforge.core.errors import InputError
from chainforge.doctor.memory import GIB, PROMPT_TOKENS, compare, estimate, read_shape
from chainforge.generate.settings import config_of
from chainforge.train.distributed import Layout

SHAPE = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28,
         "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}  # fmt: skip
SEVEN = read_shape(SHAPE | {"tie_word_embeddings": False})
MEASURED = json.loads(
    (Path(__file__).parents[2] / "benchmarks/results/memory.json").read_text()
)["cases"]  # fmt: skip
LORA = {"use_peft": True, "dtype": "bfloat16"}
QLORA = LORA | {"load_in_4bit": True}


def need(recipe="sft", kind="single", processes=1, device=None, teacher=None, **given):
    settings = settings_of(recipe, given)
    layout = Layout(kind, processes)
    return estimate(recipe, settings, SEVEN, layout, device_bytes=device, teacher=teacher)


SMOL = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"attention_bias": True, "tie_word_embeddings": False}])
def test_sizes_are_those_of_the_model_that_transformers_builds(more):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = read_shape(SMOL | more)
    for targets in (None, "all-linear", ["q_proj", "down_proj"]):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**SMOL | more))
        assert shape.parameters == sum(weight.numel() for weight in model.parameters())
        config = LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
        tuned = get_peft_model(model, config)
        trainable = sum(w.numel() for w in tuned.parameters() if w.requires_grad)
        assert shape.adapter(8, targets) == trainable, targets


def test_a_reward_model_stays_on_the_device_beside_the_policy():
    settings = settings_of("grpo", {"dtype": "bfloat16", "use_peft": True})
    small = read_shape(SMOL | {"dtype": "bfloat16"})
    found = estimate("grpo", settings, SEVEN, Layout("single", 1), scorers=[small, small])
    assert found.resident["reward models"] == 2 * 2 * small.parameters
    assert "reward models" not in need("grpo").resident


def test_known_and_unknown_models(tiny_model, tmp_path):
    assert SEVEN.parameters == 7_615_616_512
    assert read_shape(SMOL).parameters == 134_515_008
    assert read_shape(config_of(tiny_model)).layers == 2
    assert config_of("Qwen/Qwen2.5-0.5B") == config_of(str(tmp_path / "later/model")) == {}
    for config in ({"model_type": "mamba"}, {}):
        with pytest.raises(InputError, match="are not known"):
            read_shape(config)
    with pytest.raises(InputError, match="lora_target_modules"):
        read_shape(SMOL).adapter(8, ["query"])


@pytest.mark.parametrize("name", MEASURED)
def test_the_estimate_is_near_what_was_measured(name, monkeypatch):
    """Against the recorded measurements of `benchmarks/memory.py`, on the same cases."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import memory as benchmark

    row = MEASURED[name]
    expected = benchmark.expected(name, "tensors" in row)
    assert expected["estimate"] == row["estimate"], "run benchmarks/memory.py again"
    peak = row.get("tensors") or row["allocated"]
    assert 0.9 < expected["estimate"] / peak < 1.1


def test_the_parts_are_what_one_would_say_by_hand():
    full = need()
    assert full.resident["weights"] == SEVEN.parameters * 4
    assert full.resident["optimizer"] == SEVEN.parameters * 8
    assert need(kind="zero3", processes=8).resident["optimizer"] == SEVEN.parameters * 12 // 8
    assert need(kind="zero2", processes=8).resident["weights"] == SEVEN.parameters * 2
    assert need(kind="fsdp2", processes=8).resident["weights"] == SEVEN.parameters * 4 // 8
    lora = need(**LORA)
    assert lora.resident["weights"] == SEVEN.parameters * 2
    assert lora.resident["adapter"] == SEVEN.adapter(16, None) * 4
    assert need(**QLORA).resident["weights"] < 0.45 * lora.resident["weights"]
    assert need(**QLORA, use_bnb_nested_quant=True).peak < need(**QLORA).peak
    assert need(optim="adamw_8bit").resident["optimizer"] == SEVEN.parameters * 2


def test_what_takes_memory_and_what_spares_it():
    assert need(**LORA).peak < need(**LORA, gradient_checkpointing=False).peak
    assert need(**LORA).peak < need(**LORA, per_device_train_batch_size=32).peak
    assert need(kind="ddp", processes=8).peak > need().peak  # its buckets
    grpo = need("grpo", **LORA)
    assert "reference" not in grpo.resident
    assert need("grpo", beta=0.04).resident["reference"] == SEVEN.parameters * 4
    dpo, loss = need("dpo"), need("sft").phases["loss"]
    assert dpo.resident["reference"] == SEVEN.parameters * 4
    assert dpo.phases["loss"]["activations"] == 2 * loss["activations"]  # of chosen and rejected
    assert need("grpo", **LORA, beta=0.04).resident["reference"] < grpo.resident["weights"] / 100
    many = need("grpo", **LORA, gradient_accumulation_steps=32)
    assert (many.phase, "key-value cache" in many.parts) == ("generation", True)
    assert any(str(PROMPT_TOKENS) in words for words in many.assumed)
    gathered = need("grpo", kind="zero3", processes=8).phases["generation"]
    assert gathered["gathered weights"] == SEVEN.parameters * 2
    assert need("distill", **LORA, teacher=SEVEN).resident["teacher"] == SEVEN.parameters * 4
    vllm = LORA | {"use_vllm": True}
    stays = need("grpo", device=80 * GIB, **vllm)
    assert stays.resident["vLLM"] == int(0.3 * 80 * GIB)
    sleeps = need("grpo", device=80 * GIB, **vllm, vllm_enable_sleep_mode=True)
    assert sleeps.peak < stays.peak
    assert need("grpo", **vllm, vllm_mode="server").peak < sleeps.peak


def test_an_estimate_is_compared_with_the_device():
    needed = need(**LORA)
    assert compare(needed, None)[0] == compare(needed, 80 * GIB)[0] == "ok"
    level, check, text = compare(needed, int(needed.peak * 1.05))
    assert (level, check) == ("warning", "memory")
    assert "change, in this order: `gradient_checkpointing: true`" in text
    level, _, text = compare(needed, 8 * GIB)
    assert level == "error"
    assert text.startswith(f"{needed.peak / GIB:.1f} GiB a device (weights ")
    assert "of 8.0 GiB" in text
