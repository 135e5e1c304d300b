"""Supervised fine-tuning on kept rows: the cold start, the second SFT, and distillation by traces.

    accelerate launch recipes/sft.py --config recipes/quickstart/cold.yaml \
        --model_name_or_path recipes/quickstart/base --data runs/quickstart/traces \
        --output_dir runs/quickstart/cold

Every option is TRL's own (SFTConfig, ModelConfig) but for `data`, `data_weights` (the ratio in
which several sources stand) and `transcript`. The loss is on the completion alone; a row that does
not fit into `max_length` is an error, never cut in silence.
"""

from chainforge.core import process
from chainforge.core.config import parse
from chainforge.data.datasets import DataArgs, sft_mixture
from chainforge.training.checkpoints import check_saving
from chainforge.training.loop import train
from chainforge.training.policy import check_lengths, check_model, load_tokenizer, prepare
from chainforge.training.stage import open_stage


def main() -> None:
    from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

    data, training, model = configs = parse(DataArgs, SFTConfig, ModelConfig)
    base = check_model(model.model_name_or_path)
    check_saving(training)
    inputs = {"model": base} | {f"data.{i}": path for i, path in enumerate(data.data)}
    with open_stage(
        "sft", training.output_dir, *configs, inputs=inputs, seed=training.seed
    ) as stage:
        rows, sources = sft_mixture(data, training.seed)
        tokenizer = load_tokenizer(base, data.transcript)
        check_lengths(rows, tokenizer, training.max_length)
        trainer = SFTTrainer(
            model=base,
            args=prepare(training, model, stage),
            train_dataset=rows,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
        stage.metrics |= {"rows": len(rows), "sources": sources}
        train(trainer, stage)


if __name__ == "__main__":
    process.run(main)
