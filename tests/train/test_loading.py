"""What a library cannot load is wrong input: one message that names it, and exit code 2."""

import json
import shutil

import pytest
import torch
from stages import opened

from chainforge.core import process
from chainforge.core.errors import InputError
from chainforge.train.model_source import find_source
from chainforge.train.templates import load_tokenizer


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def adapt(path, **options):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(opened(path), LoraConfig(**options))


def refused(capsys, act):
    with pytest.raises(SystemExit) as end:
        process.run(act)
    told = capsys.readouterr().err
    assert (end.value.code, "failed: " in told) == (2, False), told
    return next(line for line in told.splitlines() if line.startswith("error: "))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", lambda old: old[:1000], "cannot be loaded"),
        ("generation_config.json", lambda old: b"[]", "cannot be loaded"),
        ("config.json", lambda old: b'{"model_type": "nope"}', "model type `nope`"),
        ("config.json", lambda old: json.dumps(json.loads(old) | {"hidden_size": 8}).encode(),
         "cannot be loaded"),
    ],
)  # fmt: skip
def test_a_damaged_model_is_named(model, capsys, file, content, words):
    (model / file).write_bytes(content((model / file).read_bytes()))
    said = refused(capsys, lambda: opened(model))
    assert str(model) in said
    assert words in said


@pytest.mark.parametrize("content", ["{", '{"model": 3}', None])
def test_a_damaged_tokenizer_is_named(model, capsys, content):
    (model / "tokenizer.json").unlink()
    if content is not None:
        (model / "tokenizer.json").write_text(content)
    assert str(model) in refused(capsys, lambda: load_tokenizer(str(model)))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_configuration_that_is_no_object_is_named(model, file, content):
    (model / file).write_text(content)
    with pytest.raises(InputError, match=f"{file}.*JSON"):
        find_source(str(model))


def test_an_adapter_of_another_vocabulary_is_named(model, tmp_path, capsys):
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    adapt(model).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    width = opened(model).config.hidden_size
    more = {"base_model.model.model.embed_tokens.weight": torch.zeros(999, width)}
    save_file(load_file(file) | more, file)
    said = refused(capsys, lambda: PeftModel.from_pretrained(opened(model), tmp_path / "adapter"))
    assert "adapter: cannot be loaded" in said


def test_layers_that_a_model_lacks_are_named(model, capsys):
    said = refused(capsys, lambda: adapt(model, target_modules=["zzz"]))
    assert all(word in said for word in ("lora_target_modules", "zzz", "all-linear"))
