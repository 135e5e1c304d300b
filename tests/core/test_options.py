import runpy

import pytest

from chainforge.core.options import ALIASES, RANGES, WORDS, meant

GRPO = ["lora_r", "lora_target_modules", "dtype", "torch_compile", "num_generations", "heldout_size", "local_rank", "epsilon", "max_steps", "learning_rate", "max_completion_length", "use_peft", "beta", "seed"]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "option"),
    [
        ("lora_rank", "lora_r"), ("torch_dtype", "dtype"), ("group_size", "num_generations"),
        ("clip_ratio", "epsilon"), ("num_rl_steps", "max_steps"), ("learning_rat", "learning_rate"),
        ("laerning_rate", "learning_rate"), ("max_new_tokens", "max_completion_length"),
        ("Learning_Rate", "learning_rate"), ("kl_coef", "beta"), ("seeds", "seed"),
        ("batch_size", None), ("local", None), ("torch", None), ("heldout", None), ("tasks", None),
        ("size", None), ("", None),
    ],
)  # fmt: skip
def test_a_hint_is_near_in_meaning_or_in_spelling(key, option):
    assert meant(key, GRPO) == option


def test_the_tables_name_options_that_some_recipe_has():
    from chainforge.core.config import _fields
    from chainforge.core.paths import shipped

    scripts = list(shipped("recipes").glob("*.py"))
    recipes = [runpy.run_path(str(script), run_name="recipe") for script in scripts]
    known = {name for recipe in recipes for name in _fields(recipe["CONFIGS"])}
    assert set(ALIASES) <= known
    assert set(RANGES) | set(WORDS) <= known


@pytest.mark.parametrize("text", [
    "loss_type: gpro", "scale_rewards: groups", "scale_rewards: off", "vllm_mode: colocated", "repetition_penalty: 0",
    "importance_sampling_level: seq", "vllm_importance_sampling_mode: mask", "ddp_timeout: 0",
    "multi_objective_aggregation: sum", "vllm_server_port: 99999", "accelerator_config: gone.json",
])  # fmt: skip
def test_what_trl_would_find_out_late_is_found_at_once(text, tmp_path):
    from trl import GRPOConfig

    from chainforge.core.config import parse
    from chainforge.core.errors import InputError

    (tmp_path / "x.yaml").write_text(f"output_dir: o\nuse_cpu: true\nbf16: false\n{text}\n")
    with pytest.raises(InputError, match=text.partition(": ")[2]):
        parse(GRPOConfig, argv=["--config", str(tmp_path / "x.yaml")])
