"""What may be opened, and what is refused before anything of it is loaded."""

import json
import shutil
from pathlib import Path

import pytest
from stages import edit, opened

from chainforge.core.errors import InputError
from chainforge.generate.local import open_policy
from chainforge.train.model_source import check_model, find_source

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model that may be spoilt."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


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


def test_a_relative_base_is_found_and_made_absolute(tiny_model, adapter, monkeypatch):
    monkeypatch.chdir(Path(tiny_model).parent)
    edit(adapter / "adapter_config.json", base_model_name_or_path=Path(tiny_model).name)
    assert find_source(str(adapter)).model == tiny_model
    monkeypatch.chdir(adapter)
    with pytest.raises(InputError, match="base_model_name_or_path: tiny: not found locally"):
        find_source(str(adapter))


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
        ({"base_model_name_or_path": "."}, "it has no config.json"),
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


HOSTILE = {
    "one pickle": {"a": "dummy.safetensors", "b": "pytorch_model-00002-of-00002.bin"},
    "a file elsewhere": {"a": "../other/model.safetensors"},
    "a part that is missing": {"a": "model-00001-of-00002.safetensors"},
    "a part that is no name": {"a": 3},
    "nothing": {},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_index_may_name_only_safetensors_beside_it(case, model):
    """transformers opens each file by the ending of its name: pickles with torch.load."""
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    (model / "dummy.safetensors").write_bytes(b"")
    (model / INDEX).write_text(json.dumps({"weight_map": HOSTILE[case]}))
    refused(model, INDEX)


def test_a_configuration_cannot_send_the_loader_elsewhere(model):
    edit(model / "config.json", transformers_weights="adapter_model.bin")
    refused(model, "transformers_weights")


def test_a_sharded_model_is_opened_and_pickles_beside_it_are_left_alone(model, tiny_model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    opened(tiny_model).save_pretrained(model, max_shard_size="30KB")
    assert (model / INDEX).exists()
    assert find_source(str(model)).model == check_model(str(model)) == str(model)


def test_an_index_in_the_hubs_cache_is_checked_too(model, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub/models--me--evil/snapshots" / ("0" * 40)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    shutil.copytree(model, snapshot)
    (tmp_path / "hub/models--me--evil/refs").mkdir()
    (tmp_path / "hub/models--me--evil/refs/main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for find in (find_source, open_policy):
        with pytest.raises(InputError, match="pytorch_model.bin"):
            find("me/evil")
