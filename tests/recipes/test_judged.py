"""Prompts without answers through real stages: judged RL that is killed, and a chain of six stages."""

import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import yaml
from forks import Warm
from server import Answer, Server, chat
from small import CPU

from chainforge.chain.plan import override, plan_chain
from chainforge.chain.spec import load_chain
from chainforge.core.artifacts import read_json, read_manifest, sha256
from chainforge.core.jsonl import read_rows, write_rows
from chainforge.core.run_dir import holder
from chainforge.report.html import write_report
from chainforge.rewards.reward import Reward, score

ROOT = Path(__file__).parents[2]
PROMPTS = [f"Explain thing {n}" for n in range(8)]
RL = CPU | {
    "prompts": PROMPTS, "system_prompt": "", "learning_rate": 0.01, "max_steps": 6,
    "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 8, "num_generations": 4,
    "max_completion_length": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def warm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_API_KEY", "sk-of-a-test-0123456789abcdef")
        process = Warm()
    yield process
    process.close()


def verdict(request):
    """Grade by the hash of what is asked."""
    digest = hashlib.sha256(request.body["messages"][1]["content"].encode()).digest()
    return chat(f"Well.\nScore: {digest[0] % 11}", usage={**USAGE, "completion_tokens": 5})


USAGE = {"prompt_tokens": 40, "completion_tokens": 5, "total_tokens": 45}


@pytest.mark.parametrize("when", ["between two steps", "while it asks"])
def test_a_killed_judged_stage_ends_the_same_and_pays_no_verdict_twice(
    warm, tmp_path, tiny_model, when
):
    killed, whole = tmp_path / "killed/stage", tmp_path / "whole/stage"

    def script(request):
        if when == "while it asks" and request.number == 25:
            os.kill(int(holder(killed).split()[1]), signal.SIGKILL)
            return Answer(how="hang")
        return verdict(request)

    def run(place, fault=None):
        place.parent.mkdir(exist_ok=True)
        judge = {"fn": "llm_judge", "params": {"part": "all", "model": "m", "base_url": server.url}}
        settings = tmp_path / "rl.yaml"
        settings.write_text(yaml.safe_dump(RL | {"rewards": [judge]}))
        words = ["--config", settings, "--output_dir", place, "--model_name_or_path", tiny_model]
        return warm.run("grpo", *words, log=place.with_name("log.txt"), fault=fault)

    with Server(script) as server:
        code, text = run(killed, {"step": 5} if when == "between two steps" else None)
        assert code == -signal.SIGKILL, text
        (ledger,) = killed.glob("judge-*.jsonl")
        lines = read_rows(ledger, torn_tail=True)
        unheard = {line["key"] for line in lines} - {x["key"] for x in lines if "outcome" in x}
        code, text = run(killed)
        assert code == 0, text
        asked = Counter(json.dumps(request.body["messages"]) for request in server.asked)
        code, text = run(whole)
        assert code == 0, text
    assert "resuming from" in killed.with_name("log.txt").read_text()
    assert sum(count > 1 for count in asked.values()) <= len(unheard)
    assert max(asked.values()) <= 2
    assert (len(unheard) == 0) == (when == "between two steps")
    paths = [place / "model/model.safetensors" for place in (killed, whole)]
    assert sha256(paths[0]) == sha256(paths[1])
    assert sha256(paths[0]) != sha256(Path(tiny_model) / "model.safetensors")
    rows = [read_rows(place / "rollouts.jsonl") for place in (killed, whole)]
    assert rows[0] == rows[1]
    assert {row["correct"] for row in rows[0]} == {None}
    spent = read_manifest(whole).metrics["spending"]
    assert spent["requests"] == len(asked)
    assert spent["tokens"] == 45 * len(asked)


@pytest.fixture(scope="module")
def reward_model(tokenizer, tmp_path_factory):
    """A random sequence classifier with one label."""
    import torch
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_labels=1, initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("reward") / "scorer"
    Qwen2ForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_reward_model_scores_as_trl_scores_with_it(tiny_model, reward_model, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none",
                        per_device_train_batch_size=4, num_generations=4)  # fmt: skip
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS[:4]]
    rows = Dataset.from_dict({"prompt": prompts})
    trainer = GRPOTrainer(model=tiny_model, reward_funcs=str(reward_model), args=config,
                          train_dataset=rows, processing_class=tokenizer)  # fmt: skip
    said = ["1", "two", "", "a longer answer, of more tokens"]
    turns = [[{"role": "assistant", "content": text}] for text in said]
    theirs = trainer._calculate_rewards([{}] * 4, prompts, turns, [[1]] * 4)[:, 0].tolist()
    reward = Reward({"model": str(reward_model), "params": {"part": "all"}}, {"prompt"})
    ours = [one.total for one in score([reward], [{"prompt": prompt} for prompt in prompts], said)]
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert len(set(ours)) == 4


def test_a_reward_model_is_bound_to_its_task_in_rl_reject_and_evaluate(
    stage, tmp_path, tiny_model, reward_model
):
    """On a mixture of rows with answers, and of prompts without."""
    rows = [{"question": f"{n}?", "answer": str(n), "task": "sums"} for n in range(4)]
    rows += [{"question": f"Say {n}.", "task": "general"} for n in range(4)]
    write_rows(tmp_path / "mixed.jsonl", rows)
    task = {"fn": "jsonl", "params": {"path": "mixed.jsonl"}, "split": "all"}
    scorer = {"model": str(reward_model), "weight": 0.5, "task": "general", "name": "kind",
              "params": {"part": "all"}}  # fmt: skip
    rewards = [{"fn": "accuracy_reward"}, {"fn": "format_reward", "weight": 0.2}, scorer]
    given = RL | {"tasks": [task], "rewards": rewards, "prompts": []}
    code, error = stage("grpo", "alone", given | {"rewards": rewards[::2]}, "--model_name_or_path",
                        tiny_model, "--max_steps", "1")  # fmt: skip
    assert code == 0, error
    code, error = stage("grpo", "rl", given, "--model_name_or_path", tiny_model)
    assert code == 0, error
    rolled = read_rows(tmp_path / "rl/rollouts.jsonl")
    for row in rolled:
        general = row["task"] == "general"
        assert (row["rewards"]["kind"] is None) != general
        assert (row["rewards"]["accuracy_reward"] is None) == general
    assert {row["task"] for row in rolled} == {"sums", "general"}
    logged = [row for row in read_rows(tmp_path / "rl/metrics.jsonl") if "reward" in row]
    assert any(abs(row.get("rewards/kind/mean") or 0) > 0 for row in logged)
    keep = {"require_format": False, "require_correct": False, "max_repetition": None,
            "min_language": None}  # fmt: skip
    code, error = stage("reject", "kept", {"rewards": rewards} | keep, "--pool", tmp_path / "rl")
    assert code == 0, error
    again = read_rows(tmp_path / "kept/samples.jsonl")
    first = {(row["id"], row["completion"]): row["rewards"]["kind"] for row in rolled}
    for row in again:
        there = first[row["id"], row["completion"]]
        assert row["rewards"]["kind"] == (there and pytest.approx(there, abs=1e-4))
    best = {}
    for row in again:
        if row["task"] == "general" and row["finish_reason"] == "stop":
            best.setdefault(row["id"], []).append(row)
    for samples in best.values():  # of each prompt the best one is kept
        (chosen,) = [row for row in samples if row["drop"] is None] or [max(samples, key=_reward)]
        assert _reward(chosen) == max(map(_reward, samples))
    measured = {"tasks": [task], "rewards": [scorer], "num_samples": 1, "max_new_tokens": 8}
    code, error = stage("evaluate", "eval", measured, "--models", f"a={tiny_model}",
                        f"b={tmp_path / 'rl/model'}")  # fmt: skip
    assert code == 0, error
    results = read_json(tmp_path / "eval/results.json")
    assert [model["rewards"]["kind"]["n"] for model in results["models"]] == [4, 4]
    assert [model["general"]["n"] for model in results["models"]] == [4, 4]
    assert [(pair["reward"], pair["n"]) for pair in results["reward_pairs"]] == [("kind", 4)]
    assert len(results["pairs"]) == 1


def _reward(row):
    return row["reward"]


def test_rl_on_prompts_that_no_reward_applies_to_ends_before_a_model_is_loaded(stage, tmp_path):
    settings = RL | {"rewards": [{"fn": "accuracy_reward"}]}
    code, error = stage(
        "grpo", "none", settings, "--model_name_or_path", ROOT / "recipes/quickstart/base"
    )
    assert (code, "none applies to 8 of 8 rows" in error) == (2, True), error
    assert not (tmp_path / "none/checkpoints").exists()


def explanation(request):
    """Reason and answer as a teacher does, in words of the question."""
    words = request.prompt.lower()
    return chat(f"{words} {request.tries}", reasoning_content=f"We think of {words}.")


def test_the_original_scripts_prompts_settings_and_reward_go_through_one_chain(warm, tmp_path):
    """The chain and the reward that the documentation shows, with a small model and more steps."""
    shutil.copytree(ROOT / "docs/original", tmp_path / "original")
    file = tmp_path / "original/chain.yaml"
    chain = yaml.safe_load(file.read_text())
    chain |= {"base": f"{ROOT}/recipes/quickstart/base", "launch": "none"}
    chain["models"] = {"student_base": f"{ROOT}/recipes/quickstart/student_base"}
    file.write_text(yaml.safe_dump(chain, sort_keys=False))
    sets = {"training.use_cpu": "true", "training.bf16": "false", "sft.num_train_epochs": "80",
            "sft.learning_rate": "2e-3", "grpo.max_completion_length": "100",
            "grpo.max_steps": "4", "grpo.temperature": "1.5", "reject.max_new_tokens": "100",
            "reject.max_repetition": "1", "evaluate.max_new_tokens": "100"}  # fmt: skip
    with Server(explanation) as server:
        sets["traces.base_url"] = server.url
        chain = override(load_chain(file), [f"{key}={value}" for key, value in sets.items()])
        for step in plan_chain(chain, tmp_path):
            step.directory.parent.mkdir(exist_ok=True)
            first = next(n for n, word in enumerate(step.command) if word.endswith(".py"))
            log = tmp_path / f"{step.stage.name}.txt"
            code, text = warm.run(step.stage.recipe, *step.command[first + 1 :], log=log)
            assert code == 0, f"{step.stage.name}: {text}"
    traces = read_rows(tmp_path / "original/traces/samples.jsonl")
    assert {row["prompt"][-1]["content"] for row in traces} == set(chain.prompts)
    assert {(row["answer"], row["correct"], row["drop"]) for row in traces} == {(None, None, None)}
    results = read_json(tmp_path / "original/eval/results.json")
    assert {model["strict"] for model in results["models"]} == {None}
    assert results["pairs"] == []
    names = {model["name"]: model["rewards"] for model in results["models"]}
    assert names["cold_start"]["explains"]["n"] == 3
    assert names["cold_start"]["explains"]["mean"] > names["base"]["explains"]["mean"]
    assert {pair["reward"] for pair in results["reward_pairs"]} == {"explains", "format_reward"}
    page = write_report(tmp_path / "original").read_text()
    assert "No prompt has an answer to check" in page
    assert "held-out" not in page  # the same prompts were trained on
    assert "Explain quantum entanglement" in page
    assert "not judged" not in page
