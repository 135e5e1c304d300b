import dataclasses

import pytest

from chainforge.train.settings import DEFAULTS, of_objects, settings_of


@pytest.mark.parametrize("recipe", DEFAULTS)
def test_the_defaults_are_those_of_the_installed_trl(recipe):
    import trl

    names = {"sft": "SFTConfig", "grpo": "GRPOConfig", "distill": "DistillationConfig"}
    fields = {
        field.name: field.default
        for kind in (getattr(trl, names[recipe]), trl.ModelConfig)
        for field in dataclasses.fields(kind)
    }
    for key, value in DEFAULTS[recipe].items():
        assert fields[key] == value, key


def test_settings_are_read_as_the_recipe_reads_them():
    given = {"learning_rate": "1e-5", "beta": "0.04", "num_generations": "16", "use_peft": "true"}
    found = settings_of("grpo", given)
    assert (found["beta"], found["num_generations"], found["use_peft"]) == (0.04, 16, True)
    assert found["bf16"] is True
    assert settings_of("grpo", {"fp16": True})["bf16"] is False
    assert settings_of("sft", {"max_length": None})["max_length"] is None
    assert settings_of("sft", {"max_length": "many"})["max_length"] == "many"


def test_parsed_configurations_give_the_same(tmp_path):
    from trl import GRPOConfig, ModelConfig

    given = {"use_cpu": True, "bf16": False, "num_generations": 4, "beta": 0.1}
    training = GRPOConfig(output_dir=str(tmp_path), **given)
    found = of_objects("grpo", training, ModelConfig(use_peft=True))
    expected = settings_of("grpo", given | {"use_peft": True})
    # TRL fills these in from one another once it is built.
    assert {key for key in found if found[key] != expected[key]} <= {
        "generation_batch_size", "steps_per_generation"
    }  # fmt: skip


def test_a_word_is_the_bool_that_the_recipe_takes_it_for():
    given = {"bf16": "no", "use_cpu": "on", "use_peft": "off", "gradient_checkpointing": "No"}
    found = settings_of("sft", given)
    assert [found[key] for key in given] == [False, True, False, False]
