import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from chainforge.core.config import parse
from chainforge.train import loop, policy
from chainforge.train.stage import open_stage
from chainforge.train.templates import load_tokenizer

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
            processing_class=load_tokenizer(model.model_name_or_path),
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
