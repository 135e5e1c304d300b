"""`push_to_hub` in a stage: what would fail is refused before anything is trained."""

import sys
from types import SimpleNamespace

import pytest

from chainforge.core.artifacts import UPLOAD, write_json
from chainforge.core.errors import InputError
from chainforge.generate.build import BuildArgs
from chainforge.hub.push import check_push, push_signed
from chainforge.train.stage import open_stage


def start(base="Qwen/Qwen2.5-0.5B", adapter=None):
    source = SimpleNamespace(model=base, adapter=adapter)
    return SimpleNamespace(source=source, reference=base, lora=object(), adapter="merge")


@pytest.mark.parametrize(
    ("settings", "begin", "message"),
    [
        ({"hub_token": "hf_some-token"}, start(), "set HF_TOKEN in the environment"),
        ({"push_to_hub": True}, start(), "as `hub_model_id: me/my-name`"),
        ({"hub_model_id": "mine"}, start(), "hub_model_id: expected owner/name"),
        ({"hub_model_id": "me/mine"}, start("."), "--what model --to me/mine"),
        ({"hub_model_id": "me/mine"}, start(adapter="a"), "--what model"),
    ],
)
def test_a_push_that_would_fail_is_refused_first(tmp_path, monkeypatch, settings, begin, message):
    from trl import SFTConfig

    monkeypatch.setenv("HF_TOKEN", "hf_some-token")
    settings = settings | {"push_to_hub": "hub_token" not in settings}
    training = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
    with pytest.raises(InputError, match=message) as error:
        check_push(training, begin)
    assert "hf_some-token" not in str(error.value)


def test_rows_are_pushed_to_a_named_data_set_with_a_token(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    check_push(BuildArgs())
    for settings, message in (
        ({"push_to_hub": True}, "as `hub_dataset_id: me/my-name`"),
        ({"push_to_hub": True, "hub_dataset_id": "me/rows"}, "set HF_TOKEN"),
    ):
        with pytest.raises(InputError, match=message):
            check_push(BuildArgs(**settings))


def test_a_push_prevented_by_a_kill_is_made_when_the_stage_is_run_again(tmp_path, monkeypatch):
    """Once: what the Hub refuses is left to `chainforge export`, and the stage is done."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "argv", ["reject.py"])
    cold, order = tmp_path / "cold", {"hub_dataset_id": "me/mine", "hub_private": False}
    said = rf"no dataset to export.*\n.* is done; .*: chainforge export {cold} --what dataset .*--public"

    def work(**settings):
        with open_stage("reject", str(cold), BuildArgs(**settings), push=push_signed) as stage:
            stage.path("model").mkdir(exist_ok=True)
            stage.path("model/config.json").write_text("{}")

    with pytest.raises(InputError, match=said):
        work(push_to_hub=True, **order)
    manifest = (cold / "manifest.json").read_bytes()
    with pytest.raises(SystemExit):
        work(push_to_hub=True, **order)  # it was tried
    write_json(cold / UPLOAD, order)
    with pytest.raises(InputError, match=said):
        work(push_to_hub=True, **order)
    assert not (cold / UPLOAD).exists()
    assert (cold / "manifest.json").read_bytes() == manifest
    write_json(cold / UPLOAD, order)
    (cold / "manifest.json").unlink()
    work()  # killed before it was signed, and not to be sent any more
    assert not (cold / UPLOAD).exists()
