"""Rejection sampling as one writes it by hand: batches of `generate`, right answers are kept.

    python benchmarks/raw/reject.py --model raw-reason/model --tasks tasks.json --samples 2 \
        --output_dir raw-picks

Leaves `train.parquet`: one right answer of each prompt that has one.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from questions import correct, load
from transformers import AutoModelForCausalLM, AutoTokenizer


def generate(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], samples: int, batch: int
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yield each row with its completions; `batch` is the number of completions at a time."""
    size = max(1, batch // samples)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        texts = [
            tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            for row in part
        ]
        given = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left",
                          add_special_tokens=False)  # fmt: skip
        with torch.inference_mode():
            made = model.generate(
                **given, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=72,
                num_return_sequences=samples, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        done = tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :],
                                      skip_special_tokens=True)  # fmt: skip
        for number, row in enumerate(part):
            yield row, done[number * samples : (number + 1) * samples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    kept = []
    for row, texts in generate(model, tokenizer, load(args.tasks), args.samples, args.batch):
        right = [text for text in texts if correct(text, row["answer"])]
        if right:
            turn = {"role": "assistant", "content": right[0]}
            kept.append({"prompt": row["prompt"], "completion": [turn]})
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(kept).to_parquet(str(folder / "train.parquet"))
    print(f"{len(kept)} kept")


if __name__ == "__main__":
    main()
