"""Make what `general.yaml` needs: prompts without answers, their traces, and a reward model.

The prompts ask for small kindnesses: a greeting, thanks, an invitation, a wish. No rule can check
what a good one is. The traces for the cold start are of differing care, as those of the sums are:
half of them are kind and to the point, the others curt. The reward model, a Qwen2 of 0.14 million
parameters with one label, learns from pairs which of two texts is the kinder one that does what was
asked (Bradley and Terry's loss). It never sees a prompt of the test split.

    python recipes/quickstart/make_general.py      # half a minute on two cores
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

from chainforge.core.jsonl import write_rows
from chainforge.core.transcript import write
from chainforge.data.sources import split_of

HERE = Path(__file__).parent
NAMES = [
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jonas", "Karin",
    "Leo", "Maria", "Nils", "Olga", "Paul", "Rosa", "Sam", "Tina", "Uwe", "Vera", "Walter",
    "Yara", "Zoe",
]  # fmt: skip
# What is asked, of which things, a kind answer, and a curt one.
KINDS = (
    ("Greet {n} in the {x}.", "morning afternoon evening", "Good day! How are you?", "Hi."),
    ("Thank {n} for the {x}.", "book cake tea letter", "Thank you so much!", "Thanks."),
    ("Invite {n} to the {x}.", "party dinner game", "Please do come!", "Come."),
    ("Wish {n} a good {x}.", "trip start week", "Have a good time!", "Bye."),
)
KIND_THOUGHTS, CURT_THOUGHTS = "I take my time to be kind.", "One word will do."
PER_PROMPT = 4  # traces of each training prompt
SHARE_KIND = 0.4


def requests() -> list[dict[str, str]]:
    """Return every request: its prompt, a kind answer and a curt one."""
    return [
        {"prompt": asked.format(n=name, x=thing), "kind": kind, "curt": curt}
        for asked, things, kind, curt in KINDS
        for thing in things.split()
        for name in NAMES
    ]


def traces(rng: random.Random, asked: list[dict[str, str]]) -> list[dict]:
    """Return worked answers of differing care, ready for SFT."""
    rows = []
    for one in asked * PER_PROMPT:
        style = "kind" if rng.random() < SHARE_KIND else "curt"
        thoughts = KIND_THOUGHTS if style == "kind" else CURT_THOUGHTS
        rows.append({
            "prompt": [{"role": "user", "content": one["prompt"]}],
            "completion": write(thoughts, one[style]),
            "task": "general",
        })  # fmt: skip
    rng.shuffle(rows)
    return rows


def pair(rng: random.Random, asked: list[dict[str, str]]) -> tuple[str, str, str]:
    """Return a prompt with a better and a worse answer."""
    one, other = rng.choice(asked), rng.choice(asked)
    kind, curt = one["kind"], one["curt"]
    noise = rng.choice(["", str(rng.randint(-9, 60)), kind[: len(kind) // 2], f"{kind} {kind}"])
    pairs = [(kind, curt), (kind, noise), (kind, curt * 3), (curt, noise)]
    if other["kind"] != kind:
        pairs += [(kind, other["kind"]), (curt, other["curt"]), (other["kind"], other["curt"])]
    return one["prompt"], *rng.choice(pairs)


def train(rng: random.Random, asked: list[dict[str, str]], steps: int) -> tuple[object, object]:
    """Train a reward model on pairs; return it with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "base")
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, num_labels=1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen2ForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    right = 0.0
    for step in range(1, steps + 1):
        pairs = [pair(rng, asked) for _ in range(32)]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}],
                tokenize=False,
            )
            for prompt, *both in pairs
            for text in both
        ]
        rows = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        scores = model(**rows).logits.view(-1, 2)
        loss = -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1]).mean()
        loss += 0.01 * scores.square().mean()  # around 0, so that scores stay small
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        right += ((scores[:, 0] > scores[:, 1]).float().mean().item() - right) * max(0.02, 1 / step)
        if step % 100 == 0:
            print(f"{step}/{steps} loss {loss.item():.3f}, right {right:.3f}", flush=True)
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=HERE)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    everything = requests()
    rng.shuffle(everything)
    known = [one for one in everything if split_of(one["prompt"]) == "train"]
    write_rows(args.output_dir / "general.jsonl", [
        {"prompt": one["prompt"], "good": one["kind"], "bad": one["curt"]} for one in everything
    ])  # fmt: skip
    write_rows(args.output_dir / "general_traces.jsonl", traces(rng, known))
    model, tokenizer = train(rng, known, args.steps)
    model.save_pretrained(args.output_dir / "reward_model")
    tokenizer.save_pretrained(args.output_dir / "reward_model")


if __name__ == "__main__":
    main()
