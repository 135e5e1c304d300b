"""Supervised fine-tuning on kept rows: the cold start, the second SFT, and distillation by traces.

    accelerate launch recipes/sft.py --config recipes/quickstart/cold_start.yaml \
        --model_name_or_path recipes/quickstart/base --data runs/quickstart/traces \
        --output_dir runs/quickstart/cold_start

Every option is TRL's own (SFTConfig, ModelConfig) but for `data`, `data_weights` (the ratio in
which several sources stand), `transcript`, `adapter` (what becomes of a LoRA adapter that the stage
is given) and `save`. The loss is on the completion alone; a row that does not fit into `max_length`
is an error, never cut in silence.
"""

from chainforge.core import process
from chainforge.core.config import parse
from chainforge.data.datasets import DataArgs, sft_mixture
from chainforge.hub.export import check_push, push_signed
from chainforge.train.checkpoints import check_saving
from chainforge.train.loop import train
from chainforge.train.policy import PolicyArgs, check_policy, open_policy, prepare
from chainforge.train.stage import open_stage
from chainforge.train.templates import check_rows, check_uncut, load_tokenizer


def main() -> None:
    from trl import ModelConfig, SFTConfig, SFTTrainer

    data, policy, training, model = configs = parse(DataArgs, PolicyArgs, SFTConfig, ModelConfig)
    start = check_policy(policy, training, model)
    check_saving(training)
    check_push(training, start)
    inputs = {"model": start.reference} | {f"data.{i}": p for i, p in enumerate(data.data)}
    with open_stage(
        "sft",
        training.output_dir,
        *configs,
        inputs=inputs,
        seed=training.seed,
        push=push_signed,
    ) as stage:
        rows, sources = sft_mixture(data, training.seed)
        tokenizer = load_tokenizer(
            start.source.tokenizer,
            data.transcript,
            template=training.chat_template_path,
            rows=rows,
            **start.tokenizer_options,
        )
        training.chat_template_path = None  # the tokenizer has it; TRL would resize the model
        check_rows(rows, tokenizer, training.max_length)
        trainer = SFTTrainer(
            model=open_policy(start, stage),
            args=prepare(training, stage),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=start.peft_config,
        )
        check_uncut(trainer, rows)
        stage.metrics |= {"rows": len(rows), "sources": sources}
        train(trainer, stage)


if __name__ == "__main__":
    process.run(main)
