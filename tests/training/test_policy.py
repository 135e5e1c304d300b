import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from chainforge.core.config import parse
from chainforge.core.errors import InputError
from chainforge.training import loop, policy
from chainforge.training.stage import open_stage

TEXT = "<reasoning_process>1 + 1 = 2</reasoning_process>\n<summary>2</summary>"


def rows(count=16):
    from datasets import Dataset

    prompt = [{"role": "user", "content": "1 + 1 ="}]
    return Dataset.from_dict(
        {
            "prompt": [prompt] * count,
            "completion": [[{"role": "assistant", "content": TEXT}]] * count,
        }
    )


SFT = ["--use_cpu", "--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none"]
SFT += ["--learning_rate", "0.01", "--bf16", "false", "--gradient_checkpointing", "false"]


def sft(tiny_model, directory, monkeypatch, *flags):
    """Train two steps the way `recipes/sft.py` does; return the stage."""
    from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

    argv = [*SFT, "--model_name_or_path", tiny_model, "--output_dir", str(directory), *flags]
    monkeypatch.setattr(sys, "argv", ["sft.py", *argv])
    training, model = parse(SFTConfig, ModelConfig)
    with open_stage("sft", training.output_dir, training, model, seed=training.seed) as stage:
        trainer = SFTTrainer(
            model=model.model_name_or_path,
            args=policy.prepare(training, model, stage),
            train_dataset=rows(),
            processing_class=policy.load_tokenizer(model.model_name_or_path),
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
        loop.train(trainer, stage)
    stage.trainer = trainer
    return stage


def logits(model):
    with torch.no_grad():
        return model(torch.arange(1, 9)[None]).logits


def test_full_training_leaves_a_plain_model(tiny_model, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stage = sft(tiny_model, tmp_path / "cold", monkeypatch)
    saved = AutoModelForCausalLM.from_pretrained(stage.path("model"))
    torch.testing.assert_close(logits(saved), logits(stage.trainer.model.eval()))
    assert AutoTokenizer.from_pretrained(stage.path("model")).chat_template
    assert not stage.path("model/training_args.bin").exists()
    assert not stage.path("adapter").exists()
    metrics = [json.loads(line) for line in stage.path("metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 2
    assert json.loads(stage.path("manifest.json").read_text())["metrics"]["steps"] == 2


def test_lora_leaves_an_adapter_and_the_merged_model(tiny_model, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    flags = ["--use_peft", "true", "--lora_r", "4", "--lora_dropout", "0"]
    stage = sft(tiny_model, tmp_path / "cold", monkeypatch, *flags)
    trained = logits(stage.trainer.model.eval())
    assert not torch.equal(trained, logits(AutoModelForCausalLM.from_pretrained(tiny_model)))
    merged = AutoModelForCausalLM.from_pretrained(stage.path("model"))
    torch.testing.assert_close(logits(merged), trained, atol=1e-5, rtol=1e-5)
    adapted = AutoPeftModelForCausalLM.from_pretrained(stage.path("adapter"))
    torch.testing.assert_close(logits(adapted), trained, atol=1e-5, rtol=1e-5)
    config = json.loads(stage.path("adapter/adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_absolute()


def test_training_that_changes_nothing_is_an_error(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(loop.NothingTrained, match="no weight changed in 2 steps"):
        sft(tiny_model, tmp_path / "cold", monkeypatch, "--learning_rate", "0")
    assert not (tmp_path / "cold/manifest.json").exists()
    assert not (tmp_path / "cold/model").exists()


def test_a_cut_run_goes_on_and_ends_the_same(tiny_model, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    saving = ["--save_steps", "1", "--logging_steps", "1", "--max_steps", "4"]
    whole = sft(tiny_model, tmp_path / "whole", monkeypatch, *saving)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    for name in ("manifest.json", "model/model.safetensors"):
        (cut / name).unlink()
    for step in (3, 4):
        shutil.rmtree(cut / f"checkpoints/checkpoint-{step}")
    again = sft(tiny_model, cut, monkeypatch, *saving)
    one, two = (load_file(stage.path("model/model.safetensors")) for stage in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    steps = [
        json.loads(line)["step"] for line in again.path("metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.mkdir(), "not a model directory: it has no config.json"),
        (lambda path: (path / "model").mkdir(parents=True), "not a model directory"),
        (lambda path: path.write_text(""), "no such model directory"),
        (lambda path: None, "no such model directory"),
    ],
)
def test_a_path_that_is_no_model_is_refused(tmp_path, make, words):
    make(tmp_path / "m")
    with pytest.raises(InputError, match=words):
        policy.check_model(str(tmp_path / "m"))


def test_a_model_is_found(tiny_model, tmp_path):
    assert policy.check_model(tiny_model) == tiny_model
    assert policy.check_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    shutil.copytree(tiny_model, tmp_path / "cold/model")
    with pytest.raises(InputError, match="its model/ is one: give that"):
        policy.check_model(str(tmp_path / "cold"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is a LoRA adapter"):
        policy.check_model(str(tmp_path / "adapter"))
    with pytest.raises(InputError, match="name a model"):
        policy.check_model(None)


def changed(tokenizer, **changes):
    import copy

    other = copy.deepcopy(tokenizer)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def test_a_good_template_passes(tokenizer):
    policy.check_template(tokenizer, "r1-cold-start", "tiny")
    policy.check_template(tokenizer, "think", "tiny")


def test_templates_that_break_the_transcript_are_found(tokenizer):
    template = tokenizer.chat_template
    prefills = template.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    eats = template.replace("m['content']", "m['content'].split('</think>')[-1]")
    doubles = template.replace("m['content']", "m['content'] + m['content']")
    dates = template.replace("'<|im_start|>' +", "messages | length ~ '<|im_start|>' +")
    cases = [
        (None, "has no chat template"),
        (prefills, "itself writes <think>"),
        (eats, "keeps <think> 0 times"),
        (doubles, "keeps <think> 2 times"),
        (dates, "renders a prompt otherwise"),
    ]
    for broken, words in cases:
        with pytest.raises(InputError, match=words):
            policy.check_template(changed(tokenizer, chat_template=broken), "think", "tiny")


def test_tags_that_are_special_tokens_are_found(tokenizer):
    broken = changed(tokenizer)
    broken.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    with pytest.raises(InputError, match="the tags are lost in decoding"):
        policy.check_template(broken, "think", "tiny")


def test_rows_that_do_not_fit_are_named(tokenizer):
    policy.check_lengths(rows(2), tokenizer, 200)
    policy.check_lengths(rows(2), tokenizer, None)
    with pytest.raises(
        InputError, match="max_length: 2 of 2 rows have more than 20 tokens .*row 0"
    ):
        policy.check_lengths(rows(2), tokenizer, 20)


def test_vocabularies_are_compared_by_their_tokens(tokenizer):
    policy.check_vocabulary(tokenizer, changed(tokenizer))
    other = changed(tokenizer)
    other.add_tokens(["<extra>"])
    with pytest.raises(InputError, match="differ in 1 tokens"):
        policy.check_vocabulary(tokenizer, other)
