"""Every recipe runs alone, on a tiny model, and leaves what the next one opens."""

import json
import re
from pathlib import Path

import pytest
import yaml
from server import Answer, Server, chat

from chainforge.core.artifacts import read_manifest
from chainforge.core.jsonl import read_rows

SUMS = {"dataset": "chain_sum", "min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
TASK = {"fn": "reasoning_gym", "params": SUMS, "size": 24, "split": "train"}
CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
TRAIN = CPU | {"max_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1}
FIXED = {"learning_rate": 0.01, "save_strategy": "no"}


def write(path, **values):
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def traces(tmp_path, recipe):
    config = write(tmp_path / "collect.yaml", tasks=[TASK], system_prompt="", seed=3)
    assert recipe("collect", "--config", config, "--output_dir", tmp_path / "traces") == (0, "")
    return tmp_path / "traces"


def test_collect_leaves_labelled_rows_and_a_funnel_that_adds_up(traces):
    rows = read_rows(traces / "samples.jsonl")
    funnel = json.loads((traces / "funnel.json").read_text())
    assert funnel["in"] == len(rows) == 24 == funnel["kept"] + sum(funnel["dropped"].values())
    assert {row["source"] for row in rows} == {"offline"}
    assert {row["correct"] for row in rows} == {True}
    assert read_manifest(traces).metrics["sources"] == {"offline": 24}


def test_sft_trains_on_them_and_needs_no_chain(tmp_path, traces, tiny_model, recipe):
    config = write(tmp_path / "cold.yaml", **TRAIN, **FIXED, max_length=256)
    code, _ = recipe("sft", "--config", config, "--model_name_or_path", tiny_model,
                     "--data", traces, "--output_dir", tmp_path / "cold")  # fmt: skip
    assert code == 0
    manifest = read_manifest(tmp_path / "cold")
    assert manifest.inputs["data.0"] == read_manifest(traces).fingerprint
    assert manifest.metrics["steps"] == 2
    assert (tmp_path / "cold/model/model.safetensors").exists()


def grpo(tmp_path, tiny_model, recipe, name="reason", *flags):
    # Every reward of a random model is 0; what varies, and so trains it, is a reward on length.
    (tmp_path / "reward.py").write_text(
        "def short(completion):\n    return -len(completion) / 20\n"
    )
    rewards = [{"fn": "accuracy_reward"}, {"fn": f"{tmp_path}/reward.py:short", "weight": 0.1}]
    config = write(
        tmp_path / "reason.yaml",
        **TRAIN,
        **FIXED,
        tasks=[TASK],
        rewards=rewards,
        num_generations=4,
        max_completion_length=8,
    )
    return recipe("grpo", "--config", config, "--model_name_or_path", tiny_model,
                  "--output_dir", tmp_path / name, *flags)  # fmt: skip


@pytest.mark.parametrize("flags", [[], ["--beta", "0.1"], ["--use_peft", "true", "--beta", "0.1"]])
def test_grpo_trains_and_its_reference_is_where_it_starts(tmp_path, tiny_model, recipe, flags):
    code, error = grpo(tmp_path, tiny_model, recipe, "reason", *flags)
    assert code == 0, error
    logs = [row for row in read_rows(tmp_path / "reason/metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in logs] == [1, 2]
    assert logs[0]["rewards/short/mean"] < 0
    if "--beta" in flags:
        assert logs[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert read_manifest(tmp_path / "reason").notes["kl_reference"] == tiny_model
    assert (tmp_path / "reason/adapter").exists() == ("--use_peft" in flags)
    assert (tmp_path / "reason/model/model.safetensors").exists()


def test_random_rewards_are_one_flag(tmp_path, tiny_model, recipe):
    code, error = grpo(tmp_path, tiny_model, recipe, "control", "--random_rewards")
    assert code == 0, error
    logs = [row for row in read_rows(tmp_path / "control/metrics.jsonl") if "reward" in row]
    assert all(0 < row["rewards/accuracy_reward/mean"] < 1 for row in logs)


def test_rewards_that_never_differ_train_nothing_and_that_is_an_error(tmp_path, tiny_model, recipe):
    code, error = grpo(
        tmp_path, tiny_model, recipe, "reason", "--rewards", "[{fn: accuracy_reward}]"
    )
    assert code == 1
    assert "all completions of every group had the same reward" in error
    assert read_manifest(tmp_path / "reason") is None
    assert not (tmp_path / "reason/model").exists()


def reject(tmp_path, tiny_model, recipe, **changes):
    values = {"tasks": [TASK], "num_samples": 2, "max_new_tokens": 6, "max_per_prompt": 2}
    config = write(tmp_path / "picks.yaml", **(values | changes))
    return recipe("reject", "--config", config, "--model_name_or_path", tiny_model,
                  "--output_dir", tmp_path / "picks")  # fmt: skip


def test_reject_says_where_every_row_went(tmp_path, tiny_model, recipe):
    code, error = reject(
        tmp_path,
        tiny_model,
        recipe,
        require_correct=False,
        require_format=False,
        max_new_tokens=200,
    )
    assert code == 0, error
    funnel = json.loads((tmp_path / "picks/funnel.json").read_text())
    rows = read_rows(tmp_path / "picks/samples.jsonl")
    assert funnel["in"] == len(rows) == 48 == funnel["kept"] + sum(funnel["dropped"].values())
    assert sum(row["drop"] is None for row in rows) == funnel["kept"]


def test_reject_that_keeps_nothing_is_no_success(tmp_path, tiny_model, recipe):
    code, error = reject(tmp_path, tiny_model, recipe)
    assert code == 2
    assert "no row was kept" in error
    assert read_manifest(tmp_path / "picks") is None
    assert json.loads((tmp_path / "picks/funnel.json").read_text())["kept"] == 0


def test_evaluate_compares_models_on_the_same_rows(tmp_path, tiny_model, recipe, capsys):
    held_out = TASK | {"split": "test", "size": 10}
    config = write(tmp_path / "scores.yaml", tasks=[held_out], num_samples=2, max_new_tokens=6)
    models = [f"first={tiny_model}", f"second={tiny_model}"]
    code, error = recipe("evaluate", "--config", config, "--models", *models,
                         "--output_dir", tmp_path / "scores")  # fmt: skip
    assert code == 0, error
    results = json.loads((tmp_path / "scores/results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["first", "second"]
    assert {model["n"] for model in results["models"]} == {10}
    (pair,) = results["pairs"]
    assert (pair["from"], pair["to"], pair["difference"], pair["p"]) == ("first", "second", 0, 1)
    assert len(read_rows(tmp_path / "scores/samples.jsonl")) == 40
    settings = results["settings"]
    assert settings["sampling"] == {"engine": "transformers", "temperature": 1.0, "top_p": 1.0,
                                    "top_k": 0, "max_new_tokens": 6, "num_samples": 2}  # fmt: skip
    assert settings["tasks"] == [held_out]
    assert "<summary>" in settings["system_prompt"]


def test_evaluate_by_api_signs_nothing_until_every_row_is_answered(tmp_path, tiny_model, recipe):
    held_out = TASK | {"split": "test", "size": 4}
    config = write(tmp_path / "scores.yaml", tasks=[held_out], num_samples=1, engine="api")
    said = "<reasoning_process>two and two</reasoning_process>\n<summary>4</summary>"
    refuses = Answer({"detail": "Unexpected keys in the request: {'min_p'}"}, 422)
    stage = tmp_path / "scores"

    def evaluate():
        return recipe("evaluate", "--config", config, "--models", f"a={tiny_model}",
                      "--base_url", server.url, "--output_dir", stage)  # fmt: skip

    with Server(lambda request: refuses if len(server.asked) < 6 else chat(said)) as server:
        code, error = evaluate()
        assert code == 2
        assert "the server refused every request: status 422: Unexpected keys" in error
        assert "extra_body: {}" in error
        assert not {"results.json", "manifest.json"} & {path.name for path in stage.iterdir()}
        code, error = evaluate()  # of four rows one is refused
        assert (code, "1 of 4 completions" in error) == (2, True), error
        assert not (stage / "results.json").exists()
        code, error = evaluate()
        assert code == 0, error
        assert len(server.asked) == 4 + 4 + 1
    (result,) = json.loads((stage / "results.json").read_text())["models"]
    assert (result["n"], result["format"], result["reasoning_tokens_mean"] > 0) == (4, 1, True)
    assert (stage / "requests.rank-0.jsonl").is_file()
    assert not Path("requests.rank-0.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"extra_body": {"n": 8}}, "extra_body: 'n' .*num_samples"),
        ({"served_model": "m"}, "served_model: names one model"),
    ],
)
def test_evaluate_by_api_refuses_what_it_cannot_ask_for(
    tmp_path, tiny_model, recipe, settings, words
):
    config = write(tmp_path / "c.yaml", tasks=[TASK], num_samples=1, engine="api", **settings)
    code, error = recipe("evaluate", "--config", config, "--models", f"a={tiny_model}",
                         f"b={tiny_model}", "--base_url", "http://127.0.0.1:9/v1",
                         "--output_dir", tmp_path / "scores")  # fmt: skip
    assert code == 2
    assert re.search(words, error), error
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"extra_body": {"max_tokens": 9}}, "set `max_new_tokens`"),
        ({"num_samples": 0}, "expected"),
    ],
)
def test_collect_refuses_bad_settings_before_it_leaves_anything(tmp_path, recipe, settings, words):
    config = write(tmp_path / "c.yaml", tasks=[TASK], **settings)
    code, error = recipe("collect", "--config", config, "--output_dir", tmp_path / "traces")
    assert (code, words in error) == (2, True), error
    assert not (tmp_path / "traces").exists()


def test_collect_that_keeps_nothing_shows_an_answer_and_what_would_accept_it(
    tmp_path, recipe, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-key-0123456789")
    answer = chat("\x1b[2Jnever", reasoning_content="The sum is never what it seems to be.")
    with Server(lambda request: answer) as server:
        config = write(tmp_path / "c.yaml", tasks=[TASK], teacher="openai", model="small")
        code, error = recipe("collect", "--config", config, "--base_url", server.url,
                             "--output_dir", tmp_path / "traces")  # fmt: skip
    assert code == 2
    assert "24 of 24 are dropped as wrong" in error
    assert "\\x1b[2Jnever" in error
    assert "`require_correct: false` would accept it" in error
    assert read_manifest(tmp_path / "traces") is None
    assert len(read_rows(tmp_path / "traces/samples.jsonl")) == 24


def test_distill_learns_from_a_teachers_probabilities(tmp_path, tiny_model, recipe):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight += 0.1 * torch.randn_like(weight)
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "teacher")
    config = write(tmp_path / "d.yaml", **TRAIN, **FIXED, tasks=[TASK], max_completion_length=8)
    code, error = recipe("distill", "--config", config, "--model_name_or_path", tiny_model,
                         "--teacher_model_name_or_path", tmp_path / "teacher",
                         "--output_dir", tmp_path / "pupil")  # fmt: skip
    assert code == 0, error
    assert read_manifest(tmp_path / "pupil").metrics["steps"] == 2
