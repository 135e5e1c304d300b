"""Every recipe runs alone, on a tiny model, and leaves what the next one opens."""

import json

import pytest
from server import Answer, Server, chat
from small import GRPO, TASK, TRAIN, by_length

from chainforge.core.artifacts import read_manifest
from chainforge.core.jsonl import read_rows


def funnel_of(folder):
    """Return a data stage's funnel and rows, which add up."""
    funnel = json.loads((folder / "funnel.json").read_text())
    rows = read_rows(folder / "samples.jsonl")
    assert funnel["in"] == len(rows) == funnel["kept"] + sum(funnel["dropped"].values())
    return funnel, rows


def test_collect_leaves_labelled_rows_and_sft_trains_on_them(tmp_path, tiny_model, stage):
    settings = {"tasks": [TASK], "system_prompt": "", "seed": 3}
    assert stage("collect", "traces", settings) == (0, "")
    funnel, rows = funnel_of(tmp_path / "traces")
    assert funnel["kept"] == len(rows) == 24
    assert {row["source"] for row in rows} == {"offline"}
    assert {row["correct"] for row in rows} == {True}
    traces = read_manifest(tmp_path / "traces")
    assert traces.metrics["sources"] == {"offline": 24}
    flags = ["--model_name_or_path", tiny_model, "--data", tmp_path / "traces"]
    code, error = stage("sft", "cold", TRAIN | {"max_length": 256}, *flags)
    assert code == 0, error
    manifest = read_manifest(tmp_path / "cold")
    assert manifest.inputs["data.0"] == traces.fingerprint
    assert manifest.metrics["steps"] == 2
    assert (tmp_path / "cold/model/model.safetensors").exists()


def test_every_loss_reaches_tensorboard(tmp_path, tiny_model, stage):
    events = pytest.importorskip("tensorboardX.proto.event_pb2", reason="of the extra `dev`")
    assert stage("collect", "traces", {"tasks": [TASK], "system_prompt": ""}) == (0, "")
    settings = TRAIN | {"max_length": 256, "report_to": "tensorboard"}
    flags = ["--model_name_or_path", tiny_model, "--data", tmp_path / "traces"]
    code, error = stage("sft", "cold", settings, *flags)
    assert code == 0, error
    (file,) = (tmp_path / "cold/tensorboard").glob("events.*")
    data, losses = file.read_bytes(), []
    while data:  # records of a length, 4 bytes of checksum, an event, and 4 bytes of checksum
        end = 12 + int.from_bytes(data[:8], "little")
        values = events.Event.FromString(data[12:end]).summary.value
        losses += [value.simple_value for value in values if value.tag == "train/loss"]
        data = data[end + 4 :]
    logged = [row["loss"] for row in read_rows(tmp_path / "cold/metrics.jsonl") if "loss" in row]
    assert losses == pytest.approx(logged)
    assert len(losses) == 2


QLORA = {"use_peft": True, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("method", [{}, {"use_peft": True}, QLORA])
def test_grpo_trains_and_its_reference_is_where_it_starts(tmp_path, wide_model, stage, method):
    settings = GRPO | {"rewards": by_length(tmp_path), "beta": 0.1} | method
    code, error = stage("grpo", "reason", settings, "--model_name_or_path", wide_model)
    assert code == 0, error
    logs = [row for row in read_rows(tmp_path / "reason/metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in logs] == [1, 2]
    assert logs[0]["rewards/short/mean"] < 0
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert read_manifest(tmp_path / "reason").notes["kl_reference"] == wide_model
    assert (tmp_path / "reason/adapter").exists() == bool(method)
    assert (tmp_path / "reason/model/model.safetensors").exists()


def test_random_rewards_are_one_flag(tmp_path, tiny_model, stage):
    flags = ["--model_name_or_path", tiny_model, "--random_rewards", "--log_rollouts", "false"]
    code, error = stage("grpo", "control", GRPO, *flags)
    assert code == 0, error
    logs = [row for row in read_rows(tmp_path / "control/metrics.jsonl") if "reward" in row]
    assert all(0 < row["rewards/accuracy_reward/mean"] < 1 for row in logs)
    assert not (tmp_path / "control/rollouts.jsonl").exists()


def test_reject_accounts_for_every_row_and_fails_if_it_keeps_none(tmp_path, tiny_model, stage):
    settings = {"tasks": [TASK], "num_samples": 2, "max_new_tokens": 200, "max_per_prompt": 2}
    flags = ["--model_name_or_path", tiny_model]
    loose = ["--require_correct", "false", "--require_format", "false"]
    code, error = stage("reject", "picks", settings, *flags, *loose)
    assert code == 0, error
    funnel, rows = funnel_of(tmp_path / "picks")
    assert sum(row["drop"] is None for row in rows) == funnel["kept"] > 0
    code, error = stage("reject", "none", settings | {"max_new_tokens": 6}, *flags)
    assert code == 2
    assert "no row was kept" in error
    assert read_manifest(tmp_path / "none") is None
    assert funnel_of(tmp_path / "none")[0]["kept"] == 0


def test_evaluate_compares_models_on_the_same_rows(tmp_path, tiny_model, stage):
    held_out = TASK | {"split": "test", "size": 10}
    settings = {"tasks": [held_out], "num_samples": 2, "max_new_tokens": 6}
    models = [f"first={tiny_model}", f"second={tiny_model}"]
    code, error = stage("evaluate", "scores", settings, "--models", *models)
    assert code == 0, error
    results = json.loads((tmp_path / "scores/results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["first", "second"]
    assert {model["n"] for model in results["models"]} == {10}
    (pair,) = results["pairs"]
    assert (pair["from"], pair["to"], pair["difference"], pair["p"]) == ("first", "second", 0, 1)
    assert len(read_rows(tmp_path / "scores/samples.jsonl")) == 40
    settings = results["settings"]
    drawn = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 6, "num_samples": 2}
    assert settings["sampling"] == drawn | {"engine": "transformers"}
    assert settings["tasks"] == [held_out]
    assert "<summary>" in settings["system_prompt"]


def test_evaluate_by_api_signs_nothing_until_every_row_is_answered(tmp_path, tiny_model, stage):
    held_out = TASK | {"split": "test", "size": 4}
    settings = {"tasks": [held_out], "num_samples": 1, "engine": "api"}
    answer = "<reasoning_process>two and two</reasoning_process>\n<summary>4</summary>"
    refuses = Answer({"detail": "Unexpected keys in the request: {'min_p'}"}, 422)

    def evaluate():
        models = ["--models", f"a={tiny_model}", "--base_url", server.url]
        return stage("evaluate", "scores", settings, *models)

    folder = tmp_path / "scores"
    with Server(lambda request: refuses if len(server.asked) < 2 else chat(answer)) as server:
        code, error = evaluate()
        assert (code, "1 of 4 completions" in error) == (2, True), error
        assert not {"results.json", "manifest.json"} & {path.name for path in folder.iterdir()}
        code, error = evaluate()
        assert code == 0, error
        assert len(server.asked) == 4 + 1
    (result,) = json.loads((folder / "results.json").read_text())["models"]
    assert (result["n"], result["format"]) == (4, 1)


def test_collect_that_keeps_nothing_shows_an_answer_escaped(tmp_path, stage, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-key-0123456789")
    answer = chat("\x1b[2Jnever", reasoning_content="The sum is never what it seems to be.")
    settings = {"tasks": [TASK], "teacher": "openai", "model": "small"}
    with Server(lambda request: answer) as server:
        code, error = stage("collect", "traces", settings, "--base_url", server.url)
    assert code == 2
    assert "24 of 24 are dropped as wrong" in error
    assert "\\x1b[2Jnever" in error
    assert read_manifest(tmp_path / "traces") is None
    assert len(read_rows(tmp_path / "traces/samples.jsonl")) == 24
