"""Stages of two or three steps on the tiny model, trained in this process the recipes' way."""

import copy
import json
import sys
from types import SimpleNamespace
from unittest import mock

import torch
from transformers import TrainerCallback

from chainforge.core.config import parse
from chainforge.train.loop import train
from chainforge.train.policy import PolicyArgs, check_policy, open_policy, prepare
from chainforge.train.stage import open_stage
from chainforge.train.templates import load_tokenizer

TEXT = "<reasoning_process>1 + 1 = 2</reasoning_process>\n<summary>2</summary>"
PROMPT = [{"role": "user", "content": "1 + 1 ="}]
ROW = {"prompt": PROMPT, "completion": TEXT}
CPU = ["--use_cpu", "--max_steps", "2", "--report_to", "none", "--bf16", "false"]
CPU += ["--learning_rate", "0.01", "--gradient_checkpointing", "false", "--logging_steps", "1"]
CPU += ["--save_strategy", "no"]
GROUPS = ["--num_generations", "4", "--beta", "0.1", "--max_completion_length", "8"]
COMMON = {
    "sft": [*CPU, "--per_device_train_batch_size", "4"],
    "grpo": [*CPU, "--per_device_train_batch_size", "8", *GROUPS],
}
METHODS = {
    "full": [],
    "lora": ["--use_peft", "true", "--lora_r", "4"],
    "qlora": ["--use_peft", "true", "--lora_r", "4", "--load_in_4bit", "true"],
}


def rows(count=16):
    from datasets import Dataset

    done = [{"role": "assistant", "content": TEXT}]
    return Dataset.from_list([{"prompt": PROMPT, "completion": done}] * count)


def opened(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def adapted(path):
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(path)


def edit(path, **changes):
    """Change keys of a JSON file, which may not be there yet."""
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def same(one, two, tolerance=1e-3):
    torch.testing.assert_close(one, two, atol=tolerance, rtol=0)  # logits of about 10


def changed(tokenizer, **changes):
    """A tokenizer with other attributes."""
    other = copy.deepcopy(tokenizer)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def variety(completions, **columns):
    """A reward that a random model's completions differ in."""
    return [len(set(completion[0]["content"])) / 8 for completion in completions]


class First(TrainerCallback):
    """Look at the policy as its first step begins."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.logits = logits(model)


def distance(one, two):
    return float((one - two).norm() / two.norm())


def stage_of(kind, model, directory, *flags):
    """Train a stage as `recipes/sft.py` or `recipes/grpo.py` does; return it with its trainer."""
    argv = [*COMMON[kind], "--model_name_or_path", model, "--output_dir", directory, *flags]
    with mock.patch.object(sys, "argv", [f"{kind}.py", *map(str, argv)]):
        return _train(kind)


def _train(kind):
    from trl import GRPOConfig, GRPOTrainer, ModelConfig, SFTConfig, SFTTrainer

    config, make = (SFTConfig, SFTTrainer) if kind == "sft" else (GRPOConfig, GRPOTrainer)
    policy, training, model_args = parse(PolicyArgs, config, ModelConfig)
    start = check_policy(policy, training, model_args)
    with open_stage(kind, training.output_dir, policy, training, model_args) as stage:
        tokenizer = load_tokenizer(start.source.tokenizer, **start.tokenizer_options)
        data = rows() if kind == "sft" else rows().select_columns(["prompt"])
        trainer = make(
            model=open_policy(start, stage),
            args=prepare(training, stage),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=start.peft_config,
            **({} if kind == "sft" else {"reward_funcs": [variety]}),
        )
        look = First()
        trainer.add_callback(look)
        train(trainer, stage)
    logs = trainer.state.log_history
    return SimpleNamespace(
        path=stage.path, notes=stage.notes, begun=look.logits, ended=logits(trainer.model),
        kl=[log["kl"] for log in logs if "kl" in log], trainer=trainer,
    )  # fmt: skip


def logits(model):
    """The logits of a fixed text, as the policy gives them in evaluation."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found = model(input_ids=torch.arange(1, 41).reshape(2, 20)).logits.float()
    model.train(training)
    return found
