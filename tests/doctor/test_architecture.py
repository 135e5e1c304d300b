import json
from pathlib import Path

import pytest

from chainforge.core.errors import InputError
from chainforge.doctor.architecture import read_shape
from chainforge.train.preflight import config_of

# The sizes of real models, as their config.json has them.
QWEN = {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True}
QWEN_05 = QWEN | {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
                  "num_hidden_layers": 24, "num_attention_heads": 14}  # fmt: skip
QWEN_7 = QWEN | {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
                 "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                 "tie_word_embeddings": False, "torch_dtype": "bfloat16"}  # fmt: skip
SMOL = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True}  # fmt: skip
BIASED = SMOL | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "head_dim": 128,
         "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
         "num_key_value_heads": 8, "tie_word_embeddings": True}  # fmt: skip
MISTRAL = {"model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096,
           "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "tie_word_embeddings": False}  # fmt: skip
CONFIGS = {"qwen2.5-0.5b": QWEN_05, "qwen2.5-7b": QWEN_7, "smollm2-135m": SMOL, "biased": BIASED,
           "qwen3-0.6b": QWEN3, "mistral-7b": MISTRAL}  # fmt: skip


def built(config):
    """The model that transformers builds from a configuration, without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **values)
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_counts_are_those_of_the_real_model(name):
    from peft import LoraConfig, get_peft_model

    small = CONFIGS[name] | {"num_hidden_layers": 2}  # blocks are alike
    shape, model = read_shape(small), built(small)
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    block = model.model.layers[0]
    assert shape.block == sum(weight.numel() for weight in block.parameters())
    for targets in (None, "all-linear", ["q_proj", "down_proj"]):
        config = LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
        tuned = get_peft_model(built(small), config)
        trainable = sum(w.numel() for w in tuned.parameters() if w.requires_grad)
        assert shape.adapter(8, targets) == trainable, targets


def test_known_sizes_of_real_models():
    assert read_shape(QWEN_05).parameters == 494_032_768
    assert read_shape(QWEN_7).parameters == 7_615_616_512
    assert read_shape(SMOL).parameters == 134_515_008


def test_what_is_not_known_is_said():
    with pytest.raises(InputError, match="sizes are known for llama, mistral, qwen2, qwen3 only"):
        read_shape(SMOL | {"model_type": "mamba"})
    with pytest.raises(InputError, match="mixture of experts"):
        read_shape(SMOL | {"num_local_experts": 8})
    with pytest.raises(InputError, match="lora_target_modules"):
        read_shape(SMOL).adapter(8, ["query"])


def test_a_config_is_read_where_it_is(tiny_model, tmp_path):
    weights = built(json.loads(Path(tiny_model, "config.json").read_text())).parameters()
    shape = read_shape(config_of(tiny_model))
    assert shape.parameters == sum(weight.numel() for weight in weights)
    assert config_of("Qwen/Qwen2.5-0.5B") == {}
    assert config_of(str(tmp_path / "later/model")) == {}
