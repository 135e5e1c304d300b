import pytest

from chainforge.core.options import ALIASES, RANGES, meant

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
    from chainforge.core.config import _hints
    from chainforge.core.references import shipped
    from chainforge.pipeline.checkup.material import kinds_of

    scripts = list(shipped("recipes").glob("*.py"))
    known = {name for script in scripts for name in _hints(kinds_of(script))}
    assert set(ALIASES) <= known
    assert set(RANGES) <= known
