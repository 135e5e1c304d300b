"""SFT as one writes it by hand with TRL: the quickstart's settings, rows from parquet files.

python benchmarks/raw/sft.py --model recipes/quickstart/base \
        --data runs/quickstart/traces/dataset/train.parquet --output_dir raw-cold
"""

import argparse

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--save_steps", type=int, default=500)  # as TRL has it
    parser.add_argument("--logging_steps", type=int, default=25)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    columns = ["prompt", "completion"]
    rows = load_dataset("parquet", data_files=args.data, columns=columns, split="train")
    trainer = SFTTrainer(
        model=args.model,
        args=SFTConfig(
            output_dir=args.output_dir,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=16,
            learning_rate=2.0e-3,
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            max_length=192,
            save_steps=args.save_steps,
            logging_steps=args.logging_steps,
            seed=args.seed,
        ),
        train_dataset=rows,
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    trainer.save_model(f"{args.output_dir}/model")


if __name__ == "__main__":
    main()
