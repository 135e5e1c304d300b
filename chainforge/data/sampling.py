"""Sample completions from a policy, in batches that waste little.

Prompts are sorted by length, so that a batch is hardly padded, and every batch has a seed of its
own, so that a run that was cut gives the same rest. The same command gives the same rows; another
batch size does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chainforge.core.errors import InputError
from chainforge.core.records import Row

if TYPE_CHECKING:
    from torch import Tensor

Job = tuple[int, int]  # (index of the row, number of the sample)

# Share of unfinished lines at which the finished ones leave a batch: moving the cache costs too.
SHRINK = 0.75


@dataclass
class SamplingArgs:
    """How to sample. Nothing is inherited from the model's own generation config."""

    num_samples: int = field(default=8, metadata={"help": "Completions of each prompt."})
    temperature: float = field(default=1.0, metadata={"help": "0 takes the likeliest token."})
    top_p: float = field(default=1.0, metadata={"help": "Share of the probability kept; 1: all."})
    top_k: int = field(default=0, metadata={"help": "Number of likeliest tokens kept; 0: all."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest completion, in tokens."})
    generation_batch_size: int = field(
        default=64, metadata={"help": "Completions that are generated at once."}
    )

    def check(self) -> None:
        """Raise `InputError` for values that nothing can be sampled with."""
        for name in ("num_samples", "max_new_tokens", "generation_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected 1 or more, found {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature: expected 0 or more, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: expected above 0 and at most 1, found {self.top_p}")
        if self.top_k < 0:
            raise InputError(f"top_k: expected 0 (all) or more, found {self.top_k}")
        if self.temperature == 0 and self.num_samples > 1:
            raise InputError(
                f"temperature: 0 would give the same completion {self.num_samples} times; "
                "set `num_samples: 1` or a temperature above 0"
            )


def generate(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    args: SamplingArgs,
    seed: int,
    done: Collection[tuple[str, int]] = (),
) -> Iterator[list[Row]]:
    """Yield the completions of each batch as it is done.

    A record holds `index` (of the row), `sample`, `completion` (text without the end token),
    `tokens` (generated ones, the end token included), `finish_reason` (`stop` or `length`) and
    `seed` (of its batch). `done` holds (row id, sample) of completions that are there already:
    they are not yielded again, and a batch of which all are there is not generated again.
    Raises `InputError` for wrong parameters, a tokenizer without chat template and a prompt that
    does not fit the model's context.
    """
    args.check()
    prompts = encode(tokenizer, rows, _context(model))
    jobs = [(index, sample) for index in range(len(rows)) for sample in range(args.num_samples)]
    jobs.sort(key=lambda job: (len(prompts[job[0]]), job))
    size = args.generation_batch_size
    for number, start in enumerate(range(0, len(jobs), size)):
        batch = jobs[start : start + size]
        wanted = [(rows[index]["id"], sample) not in done for index, sample in batch]
        if not any(wanted):
            continue
        made = _generate_batch(model, tokenizer, prompts, batch, args, _batch_seed(seed, number))
        yield [record for record, want in zip(made, wanted, strict=True) if want]


def encode(tokenizer: Any, rows: list[Row], context: int | None = None) -> list[list[int]]:
    """Return the token ids of each row's prompt, as the chat template writes it for an answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template, so prompts cannot be written")
    if not rows:
        raise InputError("no prompts to sample from")
    texts = [
        tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    prompts: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for row, prompt in zip(rows, prompts, strict=True):
        if context is not None and len(prompt) >= context:
            raise InputError(
                f"row {row['id']}: its prompt has {len(prompt)} tokens, the model's context is "
                f"{context}; leave the row out or take a model with a longer context"
            )
    return prompts


def _context(model: Any) -> int | None:
    length = getattr(model.config, "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def _batch_seed(seed: int, number: int) -> int:
    """Derive a batch's seed, the same in every process and Python."""
    return int(hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()[:15], 16) % 2**31


def _generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    batch: list[Job],
    args: SamplingArgs,
    seed: int,
) -> list[Row]:
    """Generate one completion for each job; global random state and model mode are kept."""
    import torch

    chosen = [prompts[index] for index, _ in batch]
    width = max(map(len, chosen))
    limit = min(args.max_new_tokens, (_context(model) or 2**31) - width)
    ids = torch.full((len(batch), width), tokenizer.eos_token_id)
    mask = torch.zeros_like(ids)
    for line, prompt in enumerate(chosen):
        ids[line, width - len(prompt) :] = torch.tensor(prompt)
        mask[line, width - len(prompt) :] = 1
    devices = [model.device] if model.device.type == "cuda" else []
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            ids, mask = ids.to(model.device), mask.to(model.device)
            ends = end_tokens(model, tokenizer)
            generated = _decode(model, ids, mask, args, ends, limit)
    finally:
        model.train(training)
    return _records(tokenizer, generated.tolist(), ends, batch, seed)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a completion, the tokenizer's own first.

    A model may name others too: a base model that was pretrained on documents ends with the token
    that ended those, whatever ends a turn in its tokenizer's chat template.
    """
    own = model.generation_config.eos_token_id
    named = own if isinstance(own, list) else [own]
    tokens = [tokenizer.eos_token_id, *named]
    return list(dict.fromkeys(token for token in tokens if token is not None))


def _decode(
    model: Any, ids: Tensor, mask: Tensor, args: SamplingArgs, ends: list[int], limit: int
) -> Tensor:
    """Return up to `limit` new tokens of each line, shape (lines, tokens), ends after the end.

    Lines that ended leave the batch when they are a quarter of it. `model.generate` keeps them to
    the last, and fills what its arguments leave open from the model's own generation config.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    generated = torch.full((len(ids), limit), ends[0], device=ids.device)
    last = torch.tensor(ends, device=ids.device)
    lines = torch.arange(len(ids), device=ids.device)
    going = torch.ones_like(lines, dtype=torch.bool)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for step in range(limit):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        token = _choose(ids, logits.float(), args).masked_fill(~going, ends[0])
        generated[lines, step] = token
        going &= ~torch.isin(token, last)
        left = int(going.sum())
        if not left:
            break
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if left <= SHRINK * len(lines):
            stay = going.nonzero()[:, 0]
            cache.batch_select_indices(stay)
            lines, going = lines[stay], going[stay]
            ids, mask, positions = ids[stay], mask[stay], positions[stay]
    return generated


def _choose(ids: Tensor, logits: Tensor, args: SamplingArgs) -> Tensor:
    """Return the next token of each line."""
    import torch
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    if args.temperature == 0:
        return logits.argmax(-1)
    logits = logits / args.temperature
    if args.top_k:
        logits = TopKLogitsWarper(args.top_k)(ids, logits)
    if args.top_p < 1:
        logits = TopPLogitsWarper(args.top_p)(ids, logits)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def _records(
    tokenizer: Any, generated: list[list[int]], ends: list[int], batch: list[Job], seed: int
) -> list[Row]:
    """Cut each completion at its end token and decode it; the tags are no special tokens."""
    lengths = [
        next((place for place, token in enumerate(ids) if token in ends), len(ids))
        for ids in generated
    ]
    cut = [ids[:length] for ids, length in zip(generated, lengths, strict=True)]
    texts = tokenizer.batch_decode(
        cut, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [
        {
            "index": index,
            "sample": sample,
            "completion": text,
            "tokens": length + (length < len(ids)),
            "finish_reason": "stop" if length < len(ids) else "length",
            "seed": seed,
        }
        for (index, sample), ids, length, text in zip(batch, generated, lengths, texts, strict=True)
    ]
