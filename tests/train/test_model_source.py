"""What may be opened, what is refused before it is loaded, and what a library cannot load."""

import shutil

import pytest
import torch
from stages import edit, opened

from chainforge.core import process
from chainforge.core.errors import InputError
from chainforge.generate.local import open_policy
from chainforge.train.model_source import check_model, find_source
from chainforge.train.templates import load_tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """An adapter's directory, as far as it is looked at before it is loaded."""
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes(b"")
    edit(path / "adapter_config.json", peft_type="LORA", base_model_name_or_path=tiny_model, r=4)
    return path


def refused(path, words):
    for find in (check_model, find_source):
        with pytest.raises(InputError, match=words):
            find(str(path))


def test_a_path_that_is_no_model_is_refused(tmp_path, tiny_model):
    refused(tmp_path, "not a model directory: it has no config.json")
    refused(tmp_path / "none", "no such model directory")
    shutil.copytree(tiny_model, tmp_path / "cold/model")
    refused(tmp_path / "cold", "give its model/")
    with pytest.raises(InputError, match="name a model"):
        check_model(None)
    with pytest.raises(InputError, match="me/nowhere: not found locally .* or on the Hub"):
        find_source("me/nowhere")


def test_a_model_and_an_adapter_are_told_apart(tiny_model, adapter):
    assert check_model(tiny_model) == tiny_model
    assert check_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    with pytest.raises(InputError, match="is a LoRA adapter; merge it: chainforge export"):
        check_model(str(adapter))
    plain, adapted = find_source(tiny_model), find_source(str(adapter))
    assert (plain.model, plain.adapter, plain.tokenizer) == (tiny_model, None, tiny_model)
    assert (adapted.model, adapted.adapter) == (tiny_model, adapter)
    assert adapted.tokenizer == tiny_model
    assert adapted.config["model_type"] == "qwen2"
    assert adapted.lora["r"] == 4


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_models_own_code_runs_only_when_it_is_trusted(model, file):
    edit(model / file, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (model / "evil.py").write_text(f"open({str(model / 'ran')!r}, 'w')\n")
    refused(model, "auto_map.*trust_remote_code: true")
    assert find_source(str(model), trust_remote_code=True).model == str(model)
    assert not (model / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model_name_or_path": None}, "name a model"),
        ({"base_model_name_or_path": "/no/such"}, "no such model directory"),
        ({"base_model_name_or_path": "gone"}, "base_model_name_or_path: gone: not found locally"),
        ({"base_model_name_or_path": "adapter"}, "is a LoRA adapter"),
        ({"peft_type": "IA3"}, "of type IA3; only LoRA"),
        ({"bias": "all"}, "with bias: all cannot be merged exactly"),
    ],
)
def test_an_adapter_that_cannot_be_opened_is_refused(changes, words, adapter, monkeypatch):
    monkeypatch.chdir(adapter.parent)
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(InputError, match=words):
        find_source("adapter")


def test_pickles_are_refused(model, adapter):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(model, "only pytorch_model.bin, which is a pickle")
    (model / "pytorch_model.bin").unlink()
    refused(model, "found no weights")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="only adapter_model.bin, which is a pickle"):
        find_source(str(adapter))


HOSTILE = [
    {"a": "dummy.safetensors", "b": "pytorch_model-00002-of-00002.bin"},
    {"a": "../other/model.safetensors"},
    {"a": "model-00001-of-00002.safetensors"},  # a part that is missing
    {"a": 3},
    {},
]


@pytest.mark.parametrize("parts", HOSTILE, ids=str)
def test_an_index_may_name_only_safetensors_beside_it(parts, model):
    """transformers opens each file by the ending of its name: pickles with torch.load."""
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    (model / "dummy.safetensors").write_bytes(b"")
    edit(model / INDEX, weight_map=parts)
    refused(model, INDEX)


def test_a_configuration_cannot_send_the_loader_elsewhere(model):
    edit(model / "config.json", transformers_weights="adapter_model.bin")
    refused(model, "transformers_weights")


def test_a_sharded_model_is_opened_and_pickles_beside_it_are_left_alone(model, tiny_model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    opened(tiny_model).save_pretrained(model, max_shard_size="30KB")
    assert (model / INDEX).exists()
    assert find_source(str(model)).model == check_model(str(model)) == str(model)


def test_what_is_in_the_hubs_cache_is_checked_too(model, adapter, tmp_path, monkeypatch):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    edit(model / INDEX, weight_map={"a": "pytorch_model.bin"})
    for name, folder in (("evil", model), ("cold", adapter)):
        repository = tmp_path / f"hub/models--me--{name}"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for find in (find_source, open_policy):
        with pytest.raises(InputError, match="pytorch_model.bin"):
            find("me/evil")
    assert find_source("me/cold").adapter.name == "0" * 40


def cannot_load(capsys, act):
    """Return the one message for what a library cannot load."""
    with pytest.raises(SystemExit) as end:
        process.run(act)
    told = capsys.readouterr().err
    assert (end.value.code, "failed: " in told) == (2, False), told
    return next(line for line in told.splitlines() if line.startswith("error: "))


DAMAGE = [
    ("model.safetensors", lambda old: old[:1000], "cannot be loaded"),
    ("generation_config.json", lambda old: b"[]", "cannot be loaded"),
    ("config.json", lambda old: b'{"model_type": "nope"}', "model type `nope`"),
    ("config.json", lambda old: old.replace(b'size": 32', b'size": 8'), "cannot be loaded"),
    ("tokenizer.json", lambda old: b"{", ""),
    ("tokenizer.json", lambda old: b'{"model": 3}', ""),
]


@pytest.mark.parametrize(("file", "change", "words"), DAMAGE)
def test_a_damaged_model_or_tokenizer_is_named(model, capsys, file, change, words):
    (model / file).write_bytes(change((model / file).read_bytes()))
    load = load_tokenizer if file == "tokenizer.json" else opened
    said = cannot_load(capsys, lambda: load(str(model)))
    assert str(model) in said
    assert words in said


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_configuration_that_is_no_object_is_named(model, file, content):
    (model / file).write_text(content)
    with pytest.raises(InputError, match=f"{file}.*JSON"):
        find_source(str(model))


def test_an_adapter_that_does_not_fit_is_named(model, tmp_path, capsys):
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file, save_file

    get_peft_model(opened(model), LoraConfig()).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    more = {"base_model.model.model.embed_tokens.weight": torch.zeros(999, 32)}
    save_file(load_file(file) | more, file)
    base, lacking = opened(model), LoraConfig(target_modules=["zzz"])
    said = cannot_load(capsys, lambda: PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert "adapter: cannot be loaded" in said
    said = cannot_load(capsys, lambda: get_peft_model(opened(model), lacking))
    assert all(word in said for word in ("lora_target_modules", "zzz", "all-linear"))
