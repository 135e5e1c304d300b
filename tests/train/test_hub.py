"""`push_to_hub` in a training stage: what cannot go well is refused before anything is trained."""

import sys

import pytest

from chainforge.core.artifacts import UPLOAD, write_json
from chainforge.core.errors import InputError
from chainforge.train.repo_files import take_over
from chainforge.train.stage import Stage, open_stage


@pytest.fixture
def stage(tmp_path):
    return Stage("sft", tmp_path / "cold", "print", {}, {}, 42, {})


def args(tmp_path, base="Qwen/Qwen2.5-0.5B", use_peft=True, **settings):
    from trl import ModelConfig, SFTConfig

    training = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
    return training, ModelConfig(model_name_or_path=base, use_peft=use_peft)


def test_a_push_is_taken_over_from_trl(tmp_path, stage, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_some-token")
    training, model = args(tmp_path, push_to_hub=True, hub_model_id="me/mine")
    take_over(training, model, stage)
    assert not training.push_to_hub
    assert stage.upload == {"what": None, "to": "me/mine", "private": True}
    stage.upload = None
    take_over(*args(tmp_path), stage)
    assert stage.upload is None  # not asked for


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hub_token": "hf_some-token"}, "set HF_TOKEN in the environment"),
        ({"push_to_hub": True}, "say where to, as `hub_model_id: me/my-model`"),
        ({"push_to_hub": True, "hub_model_id": "mine"}, "hub_model_id: expected owner/name"),
        ({"push_to_hub": True, "hub_model_id": "me/mine", "hub_strategy": "all_checkpoints"},
         "hub_strategy: all_checkpoints: checkpoints stay here"),
        ({"push_to_hub": True, "hub_model_id": "me/mine", "base": "."}, "--what model --to me/mine"),
    ],
)  # fmt: skip
def test_what_cannot_go_well_is_refused_first(tmp_path, stage, monkeypatch, settings, message):
    monkeypatch.setenv("HF_TOKEN", "hf_some-token")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        take_over(*args(tmp_path, **settings), stage)
    assert "hf_some-token" not in str(error.value)
    assert stage.upload is None


def test_without_a_token_nothing_is_trained_for_the_hub(tmp_path, stage, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="set HF_TOKEN"):
        take_over(*args(tmp_path, push_to_hub=True, hub_model_id="me/mine"), stage)


def test_what_was_not_sent_before_a_kill_is_sent_when_it_is_run_again(tmp_path, monkeypatch):
    """Once: what the Hub does not take is left to `chainforge export`, and the stage is done."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "argv", ["sft.py"])
    cold, order = tmp_path / "cold", {"what": None, "to": "me/mine", "private": True}
    said = rf"set HF_TOKEN.*\n.* is done; send it with: chainforge export {cold} --what model"

    def work(upload=order):
        with open_stage("sft", str(cold)) as stage:
            stage.path("model").mkdir(exist_ok=True)
            stage.path("model/config.json").write_text("{}")
            stage.upload = upload

    with pytest.raises(InputError, match=said):
        work()
    manifest = (cold / "manifest.json").read_bytes()
    with pytest.raises(SystemExit):
        work()  # it was tried
    write_json(cold / UPLOAD, order)
    with pytest.raises(InputError, match=said):
        work()
    assert not (cold / UPLOAD).exists()
    assert (cold / "manifest.json").read_bytes() == manifest
    write_json(cold / UPLOAD, order)
    (cold / "manifest.json").unlink()
    work(upload=None)  # killed before it was signed, and not to be sent any more
    assert not (cold / UPLOAD).exists()
