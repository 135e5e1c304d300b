"""Supervised fine-tuning on kept rows: the cold start, the second SFT, and distillation by traces.

    accelerate launch recipes/sft.py --config recipes/quickstart/cold_start.yaml \
        --model_name_or_path recipes/quickstart/base --data runs/quickstart/traces \
        --output_dir runs/quickstart/cold_start

Every option is TRL's own (SFTConfig, ModelConfig) except `data`, `transcript`, `adapter` (what to
do with a LoRA adapter that the stage is given) and `save`. The loss is on the completion alone; a
row that does not fit into `max_length` is an error, and is never cut silently.
"""

from types import SimpleNamespace
from typing import Any

from trl import ModelConfig, SFTConfig, SFTTrainer

from chainforge.core import process
from chainforge.core.config import parse
from chainforge.data.sft_dataset import DataArgs, sft_dataset
from chainforge.hub.push import check_push, push_signed
from chainforge.train.checkpoints import check_saving
from chainforge.train.loop import train
from chainforge.train.policy import PolicyArgs, check_policy, open_policy, prepare
from chainforge.train.stage import open_stage
from chainforge.train.templates import check_end, check_rows, load_tokenizer

CONFIGS = (DataArgs, PolicyArgs, SFTConfig, ModelConfig)


def preflight(configs: tuple[Any, ...]) -> SimpleNamespace:
    """Check settings, rows and tokenizer; return what was loaded. No weights are read."""
    data, policy, training, model = configs
    start = check_policy(policy, training, model)
    check_saving(training)
    check_push(training, start)
    rows, sources = sft_dataset(data)
    tokenizer = load_tokenizer(
        start.source.tokenizer,
        data.transcript,
        template=training.chat_template_path,
        rows=rows,
        template_options=data.chat_template_kwargs,
        **start.tokenizer_options,
    )
    training.chat_template_path = None  # the tokenizer has it; TRL would resize the model
    check_rows(rows, tokenizer, training.max_length)
    check_end(tokenizer, rows[0], start.source.model, training.eos_token)
    return SimpleNamespace(start=start, rows=rows, sources=sources, tokenizer=tokenizer)


def main() -> None:
    data, _, training, _ = configs = parse(*CONFIGS)
    ready = preflight(configs)
    inputs = {"model": ready.start.reference}
    inputs |= {f"data.{number}": path for number, path in enumerate(data.data)}
    with open_stage(
        "sft",
        training.output_dir,
        *configs,
        inputs=inputs,
        seed=training.seed,
        push=push_signed,
    ) as stage:
        trainer = SFTTrainer(
            model=open_policy(ready.start, stage),
            args=prepare(training, stage),
            train_dataset=ready.rows,
            processing_class=ready.tokenizer,
            peft_config=ready.start.peft_config,
        )
        stage.metrics |= {"rows": len(ready.rows), "sources": ready.sources}
        train(trainer, stage)


if __name__ == "__main__":
    process.run(main)
