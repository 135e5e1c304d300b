"""Pretrain the quickstart's two base models on generated text of a small world.

A model that knows nothing memorises its cold start and gives RL nothing to choose from. So the base
must know the world before it meets the chain: sums step by step, brackets, how many legs a crab
has. It reads plain text only: equations, and questions in the data sets' own wording with answers
of differing care. It never sees a chat template or a tag: the cold start teaches the *form*. And
it never sees a held-out question: membership is decided by the question's content (`split_of`).

    python recipes/quickstart/make_base.py      # both models, some twenty minutes on two cores
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import reasoning_gym
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from chainforge.core.transcript import tags_of
from chainforge.data.sources import split_of
from chainforge.generate.offline import solve

HERE = Path(__file__).parent
WORLD = {  # how the share of worked problems falls, and each data set's own configuration
    "chain_sum": (0.4, {"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 1}),
    "basic_arithmetic": (
        0.3,
        {
            "min_terms": 2,
            "max_terms": 3,
            "min_digits": 1,
            "max_digits": 1,
            "operators": ["+", "-"],
            "format_style": "simple",
        },
    ),
    "leg_counting": (0.3, {"min_animals": 1, "max_animals": 3, "max_instances": 3}),
}
FRAMES = (
    "{q}\n{r}\nAnswer: {a}",
    "Question: {q}\nSolution: {r}\nAnswer: {a}",
    "{q}\n{r} The answer is {a}.",
)
HASTY_FRAMES = ("{q}\n{r}", "Question: {q}\nSolution: {r}", "{q}\n{r} The answer is {a}.")
TAGS = (*tags_of("r1-cold-start").all, *tags_of("think").all)
# Qwen2.5's own splitting: one digit at a time, words with their leading space.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2.5's ChatML, without its default system turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {
    "base": {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 384},
    "student_base": {"num_hidden_layers": 3, "hidden_size": 96, "intermediate_size": 256},
}
READS = {"base": 1.0, "student_base": 0.5}  # the share of the corpus that each model reads


def equations(rng: random.Random) -> str:
    """Write a chain of equations, each starting from the last result, or scattered single ones."""
    kind = rng.random()
    if kind < 0.5:  # a running sum that wanders as those of chain_sum do
        lines, total = [], rng.randint(0, 9) if rng.random() < 0.7 else rng.randint(-30, 45)
        for _ in range(rng.randint(2, 6)):
            lines.append(_equation(total, rng.choice("+-"), rng.randint(0, 9)))
            total = int(lines[-1].split("=")[1])
    elif kind < 0.8:  # signed numbers, as brackets leave them behind
        lines = [
            _equation(rng.randint(-20, 20), rng.choice("+-"), rng.randint(-20, 20))
            for _ in range(rng.randint(2, 6))
        ]
    else:  # legs: small products and their sums
        legs = [count * per for count in (1, 2, 3) for per in (0, 2, 4, 5, 6, 8, 10, 14)]
        lines, total = [], rng.choice(legs)
        for _ in range(rng.randint(1, 4)):
            add = rng.choice(legs)
            lines.append(_equation(total, "+", add))
            total = add if total + add > 70 else total + add
        lines.append(_equation(rng.randint(1, 3), "*", rng.choice((0, 2, 4, 5, 6, 8, 10, 14))))
    return rng.choice(("\n", ", ", ", then ")).join(lines)


def _equation(left: int, operator: str, right: int) -> str:
    value = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return f"{left}{operator}{right}={value}"


def problems(rng: random.Random, careful: float) -> Iterator[str]:
    """Yield worked problems for ever: real questions of the train split, plain answers."""
    streams = {name: _entries(name, config, rng) for name, (_, config) in WORLD.items()}
    names, shares = list(WORLD), [share for share, _ in WORLD.values()]
    while True:
        name = rng.choices(names, shares)[0]
        style = "careful" if rng.random() < careful else "hasty"
        entry = next(streams[name])
        worked = solve(name, entry, style, rng)
        if worked is not None:
            frame = rng.choice(FRAMES if style == "careful" else HASTY_FRAMES)
            yield frame.format(q=entry["question"].strip(), r=worked[0], a=worked[1])


def _entries(name: str, config: dict, rng: random.Random) -> Iterator[dict]:
    for seed in itertools.count(rng.randrange(10**6) * 1000):
        data = reasoning_gym.create_dataset(name, size=1, seed=seed, **config)
        if split_of(data[0]["question"]) == "train":
            yield data[0]


def corpus(documents: int, problem_share: float, careful: float, seed: int) -> list[str]:
    """Mix equations and worked problems."""
    rng = random.Random(seed)
    worked = problems(rng, careful)
    return [
        next(worked) if rng.random() < problem_share else equations(rng) for _ in range(documents)
    ]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE; the tags are ordinary tokens, so that decoding never drops them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(TAGS),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *["user\nassistant\nsystem\n"] * 100], trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> torch.Tensor:
    """Join documents with <|endoftext|> and cut rows of equal length: (rows, length)."""
    end = tokenizer.pad_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    flat = list(itertools.chain.from_iterable([*item.ids, end] for item in encoded))
    rows = len(flat) // length
    return torch.tensor(flat[: rows * length], dtype=torch.long).view(rows, length)


def new_model(name: str, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Build an untrained model; its generation settings are plain sampling, nothing hidden."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES[name],
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        # A turn's end, and the end of a document, which is all that the corpus has.
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def pretrain(
    model: Qwen2ForCausalLM, rows: torch.Tensor, args: argparse.Namespace, folder: Path
) -> None:
    """Train on next tokens, in many small steps: 9,000 tokens a step learnt almost nothing."""
    steps = len(rows) // args.batch_size
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 200, max(0.01, 1 - step / steps))
    )
    started, mean = time.time(), 0.0
    for step, batch in enumerate(rows[: steps * args.batch_size].split(args.batch_size), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean += (loss.item() - mean) * max(0.01, 1 / step)
        if step % 500 == 0:
            seconds = time.time() - started
            print(f"{folder.name} {step}/{steps} loss {mean:.4f} {seconds:.0f} s", flush=True)
        if step % 2000 == 0 or step == steps:
            save(model, folder)


def save(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Save the weights rounded to bfloat16, as float32: stages save in their base's precision."""
    weights = {name: value.bfloat16().float() for name, value in model.state_dict().items()}
    copy = Qwen2ForCausalLM(model.config)
    copy.load_state_dict(weights)
    copy.tie_weights()
    copy.generation_config = model.generation_config
    copy.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=HERE)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--documents", type=int, default=400_000)
    parser.add_argument("--problem_share", type=float, default=0.5)
    parser.add_argument("--careful", type=float, default=0.65, help="share worked step by step")
    parser.add_argument("--vocab_size", type=int, default=640)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.time()
    texts = corpus(args.documents, args.problem_share, args.careful, args.seed)
    tokenizer = train_tokenizer(texts[:20_000], args.vocab_size)
    rows = pack(tokenizer, texts, args.length)
    seconds = time.time() - started
    print(f"{rows.numel():,} tokens, {len(texts):,} documents, {seconds:.0f} s", flush=True)
    for name in args.models:
        torch.manual_seed(args.seed)
        folder = args.output_dir / name
        model = new_model(name, tokenizer)
        print(f"{name}: {model.num_parameters():,} parameters", flush=True)
        tokenizer.save_pretrained(folder)
        pretrain(model, rows[: int(len(rows) * READS[name])], args, folder)


if __name__ == "__main__":
    main()
