"""What a library cannot load is wrong input: one message that names it, and exit code 2."""

import json
import shutil

import pytest

from chainforge.core import process
from chainforge.core.errors import InputError
from chainforge.core.paths import shipped
from chainforge.train.model_source import find_source
from chainforge.train.policy import PolicyArgs, _check_method
from chainforge.train.templates import load_tokenizer

BASE = shipped("recipes") / "quickstart/base"


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(BASE, tmp_path / "model")


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def adapt(path, **options):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(load(path), LoraConfig(**options))


def refused(capsys, act):
    with pytest.raises(SystemExit) as end:
        process.run(act)
    told = capsys.readouterr().err
    assert (end.value.code, "failed: " in told) == (2, False), told
    return next(line for line in told.splitlines() if line.startswith("error: "))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", lambda old: old[:1000], "a file of weights is damaged or cut"),
        ("model.safetensors", lambda old: old[:-1000], "SafetensorError"),
        ("model.safetensors", lambda old: b"", "a file of weights is damaged or cut"),
        ("generation_config.json", lambda old: b"[]", "cannot be loaded"),
        ("config.json", lambda old: b'{"model_type": "nope"}', "model type `nope`"),
        (
            "config.json",
            lambda old: json.dumps(json.loads(old) | {"hidden_size": 8}).encode(),
            "cannot be loaded",
        ),
    ],
)
def test_a_damaged_model_is_named(model, capsys, file, content, words):
    (model / file).write_bytes(content((model / file).read_bytes()))
    said = refused(capsys, lambda: load(model))
    assert str(model) in said
    assert words in said


@pytest.mark.parametrize("content", ["[]", "{", '{"model": 3}', None])
def test_a_damaged_tokenizer_is_named(model, capsys, content):
    if content is None:
        (model / "tokenizer.json").unlink()
    else:
        (model / "tokenizer.json").write_text(content)
    assert str(model) in refused(capsys, lambda: load_tokenizer(str(model)))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[]", "3", "{", "null"])
def test_a_configuration_that_is_no_object_is_named(model, file, content):
    (model / file).write_text(content)
    with pytest.raises(InputError, match=f"{file}.*JSON"):
        find_source(str(model))


def test_an_adapter_of_another_vocabulary_is_named(model, tmp_path, capsys):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    adapt(model).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    more = {"base_model.model.model.embed_tokens.weight": torch.zeros(999, 128)}
    save_file(load_file(file) | more, file)
    said = refused(capsys, lambda: PeftModel.from_pretrained(load(model), tmp_path / "adapter"))
    assert "adapter: cannot be loaded" in said
    assert "another base or vocabulary" in said


def test_layers_that_a_model_lacks_are_named(model, capsys):
    said = refused(capsys, lambda: adapt(model, target_modules=["zzz"]))
    assert "lora_target_modules" in said
    assert "zzz" in said
    assert "all-linear" in said
    assert adapt(model, target_modules="all-linear")


def test_other_failures_keep_their_traceback(capsys):
    def fail():
        raise RuntimeError("a fault of ours")

    with pytest.raises(SystemExit) as end:
        process.run(fail)
    assert end.value.code == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("targets", ["q_proj,v_proj", ["q_proj, v_proj"]])
def test_names_in_one_word_are_asked_for_as_a_list(targets):
    from trl import ModelConfig

    model = ModelConfig(use_peft=True, lora_target_modules=targets)
    with pytest.raises(InputError, match=r"in a YAML as a list: \[q_proj, v_proj\]"):
        _check_method(PolicyArgs(), model, {})
    for fine in ("all-linear", ["q_proj", "v_proj"], [r".*\.(q|v)_proj"], None):
        _check_method(PolicyArgs(), ModelConfig(use_peft=True, lora_target_modules=fine), {})
