"""An evaluation as one writes it by hand: batches of `generate`, accuracy of each model.

python benchmarks/raw/evaluate.py --models base cold/model --tasks tasks.json --output out.json
"""

import argparse
import json
from pathlib import Path

import torch
from questions import correct, formatted, load
from reject import generate
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    rows = load(args.tasks)
    scores = {}
    for name in args.models:
        torch.manual_seed(args.seed)
        model = AutoModelForCausalLM.from_pretrained(name).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
        right, form, count = 0, 0, 0
        for row, texts in generate(model, tokenizer, rows, args.samples, args.batch):
            right += sum(correct(text, row["answer"]) for text in texts)
            form += sum(map(formatted, texts))
            count += len(texts)
        scores[name] = {"accuracy": right / count, "format": form / count, "samples": count}
        print(name, scores[name], flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
