"""`push_to_hub` in a stage: what would fail is refused before anything is trained."""

import sys
from types import SimpleNamespace

import pytest

from chainforge.core.artifacts import UPLOAD, write_json
from chainforge.core.errors import InputError
from chainforge.generate.build import BuildArgs
from chainforge.hub.push import check_push, push_signed
from chainforge.train.stage import open_stage


@pytest.fixture(autouse=True)
def logged_out(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("settings", "base", "adapter", "message"),
    [
        ({"hub_token": "hf_some-token"}, "me/base", None, "set HF_TOKEN in the environment"),
        ({}, "me/base", None, "as `hub_model_id: me/my-name`"),
        ({"hub_model_id": "mine"}, "me/base", None, "hub_model_id: expected owner/name"),
        ({"hub_model_id": "me/mine"}, ".", None, "--what model --to me/mine"),
        ({"hub_model_id": "me/mine"}, "me/base", "a", "--what model"),
        ({"hub_model_id": "me/mine"}, "me/base", None, "no token for the Hub: set HF_TOKEN"),
    ],
)
def test_a_push_that_would_fail_is_refused_first(tmp_path, settings, base, adapter, message):
    from trl import SFTConfig

    source = SimpleNamespace(model=base, adapter=adapter)
    start = SimpleNamespace(source=source, reference=base, lora=object(), adapter="merge")
    settings = settings | {"push_to_hub": "hub_token" not in settings}
    training = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
    with pytest.raises(InputError, match=message) as error:
        check_push(training, start)
    assert "hf_some-token" not in str(error.value)


def test_rows_are_pushed_to_a_named_data_set_with_a_token():
    check_push(BuildArgs())
    with pytest.raises(InputError, match="as `hub_dataset_id: me/my-name`"):
        check_push(BuildArgs(push_to_hub=True))
    with pytest.raises(InputError, match="set HF_TOKEN"):
        check_push(BuildArgs(push_to_hub=True, hub_dataset_id="me/rows"))


def test_a_push_prevented_by_a_kill_is_made_when_the_stage_is_run_again(tmp_path, monkeypatch):
    """Once: what the Hub refuses is left to `chainforge export`, and the stage is done."""
    monkeypatch.setattr(sys, "argv", ["reject.py"])
    cold, order = tmp_path / "cold", {"hub_dataset_id": "me/mine", "hub_private": False}
    command = f"chainforge export {cold} --what dataset --to me/mine --public"
    said = rf"no dataset to export.*\n.* is done; .*: {command}"

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
