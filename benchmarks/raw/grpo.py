"""GRPO as one writes it by hand with TRL: the quickstart's settings and two plain rewards.

python benchmarks/raw/grpo.py --model raw-cold/model --tasks tasks.json --output_dir raw-reason
"""

import argparse
from typing import Any

from datasets import Dataset
from questions import correct, formatted, load
from trl import GRPOConfig, GRPOTrainer

Conversations = list[list[dict[str, str]]]


def accuracy(completions: Conversations, answer: list[str], **_: Any) -> list[float]:
    """Return 1 for a right answer."""
    pairs = zip(completions, answer, strict=True)
    return [float(correct(done[0]["content"], gold)) for done, gold in pairs]


def form(completions: Conversations, **_: Any) -> list[float]:
    """Return 1 for a well-formed completion."""
    return [float(formatted(done[0]["content"])) for done in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--learning_rate", type=float, default=1.0e-4)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--max_steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--updates", type=int, default=None, help="of a rollout")
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step")
    parser.add_argument("--length", type=int, default=72, help="of a completion, in tokens")
    parser.add_argument("--save_steps", type=int, default=500)  # as TRL has it
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()

    trainer = GRPOTrainer(
        model=args.model,
        args=GRPOConfig(
            output_dir=args.output_dir,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulate,
            steps_per_generation=args.updates,
            num_generations=8,
            max_completion_length=args.length,
            learning_rate=args.learning_rate,
            beta=args.beta,
            max_steps=args.max_steps,
            reward_weights=[1.0, 0.2],
            save_steps=args.save_steps,
            logging_steps=1,
            seed=args.seed,
        ),
        reward_funcs=[accuracy, form],
        train_dataset=Dataset.from_list(load(args.tasks)),
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    trainer.save_model(f"{args.output_dir}/model")


if __name__ == "__main__":
    main()
