"""Sample with transformers, in a batch that is refilled: hardly a line is padded or idle.

The samples of one prompt share one pass over it, prompts of like length stand together, lines
that ended leave, and new ones take their places. `model.generate` pays for every line up to the
batch's longest, and fills what its arguments leave open from the model's own generation config.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from chainforge.core.errors import InputError, first_line
from chainforge.core.jsonl import Row
from chainforge.core.transcript import special_ids
from chainforge.core.weights import check_weights
from chainforge.generate.decoding import Batch, choose, prefill
from chainforge.generate.engine import Draw, SamplingArgs, Take

# Share of unfinished lines at which the finished ones leave and new ones come: moving costs too.
SHRINK = 0.75
# Batches that may wait for their verdicts; more would only cost memory.
BEHIND = 4


def open_policy(reference: str, **options: Any) -> Any:
    """Load a policy for inference, on the GPU of this process where there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        check_weights(reference)
        model = AutoModelForCausalLM.from_pretrained(
            reference, use_safetensors=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError) as error:
        why = first_line(error)
        raise InputError(f"{reference}: no model could be loaded: {why}") from None
    device: Any = "cpu"
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return model.to(device).eval()


class LocalEngine:
    """A model in this process."""

    def __init__(self, model: Any, tokenizer: Any, args: SamplingArgs) -> None:
        self.model, self.tokenizer, self.args = model, tokenizer, args
        length = getattr(model.config, "max_position_embeddings", None)
        self.context = length if isinstance(length, int) else None
        self.ends = end_tokens(model, tokenizer)
        self.special = special_ids(tokenizer)

    def sample(self, draws: Sequence[Draw], take: Take) -> None:
        """Sample every draw; verdicts are made in a thread while the next tokens are."""
        import torch

        rows = {draw.row["id"]: draw.row for draw in draws}
        prompts = dict(zip(rows, encode(self.tokenizer, [*rows.values()], self.context)))
        # The longest first: what does not fit into memory fails at once, and short ones end it.
        place = {identity: number for number, identity in enumerate(rows)}
        order = sorted(
            draws, key=lambda d: (-len(prompts[d.row["id"]]), place[d.row["id"]], d.sample)
        )
        training = self.model.training
        self.model.eval()
        try:
            with ThreadPoolExecutor(1) as judge, torch.inference_mode():
                self._run(deque(order), prompts, take, judge)
        finally:
            self.model.train(training)

    def _run(
        self,
        waiting: deque[Draw],
        prompts: dict[str, list[int]],
        take: Take,
        judge: ThreadPoolExecutor,
    ) -> None:
        handed: deque[Future[None]] = deque()
        size = self.args.generation_batch_size
        batch: Batch | None = None
        while waiting or batch is not None:
            if waiting and (batch is None or (batch.joinable and len(batch) <= SHRINK * size)):
                room = size - (len(batch) if batch else 0)
                fresh = [waiting.popleft() for _ in range(min(room, len(waiting)))]
                limits = [self._limit(prompts[draw.row["id"]]) for draw in fresh]
                new = prefill(self.model, fresh, prompts, limits, self.args)
                batch = new if batch is None else batch.join(new)
            assert batch is not None
            token = choose(batch.logits, batch.uniform(), self.args)
            left = batch.write(token, self.ends)
            if left <= SHRINK * len(batch):
                done, batch = batch.leave()
                handed.append(judge.submit(self._hand_over, done, take))
                while len(handed) > BEHIND or (handed and handed[0].done()):
                    handed.popleft().result()
            if batch is not None:
                batch.forward(self.model)
        while handed:
            handed.popleft().result()

    def _limit(self, prompt: list[int]) -> int:
        """Return the most tokens of a completion: the context may leave fewer than asked for."""
        room = 2**31 if self.context is None else self.context - len(prompt)
        return min(self.args.max_new_tokens, room)

    def _hand_over(self, done: list[tuple[Draw, list[int]]], take: Take) -> None:
        """Decode completions, each cut at its end token; the tags are no special tokens."""
        stopped = [ids[-1] in self.ends for _, ids in done]
        cut = [ids[:-1] if end else ids for (_, ids), end in zip(done, stopped, strict=True)]
        texts = self.tokenizer.batch_decode(
            cut, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        take(
            [
                (
                    draw,
                    {
                        "completion": text,
                        "tokens": len(ids),
                        "finish_reason": "stop" if end else "length",
                    }
                    | stray(self.special, ids[:-1] if end else ids),
                )
                for (draw, ids), text, end in zip(done, texts, stopped, strict=True)
            ]
        )


def stray(special: dict[int, str], ids: Sequence[int]) -> Row:
    """Return the column that names a special token within a completion: its text leaves it out."""
    found = next((special[one] for one in ids if one in special), None)
    return {} if found is None else {"chat_token": found}


def encode(tokenizer: Any, rows: list[Row], context: int | None = None) -> list[list[int]]:
    """Return the token ids of each row's prompt, as the chat template writes it for an answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template, so prompts cannot be written")
    if not rows:
        raise InputError("no prompts to sample from")
    prompts: list[list[int]] = tokenizer.apply_chat_template(
        [row["prompt"] for row in rows], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    for row, prompt in zip(rows, prompts, strict=True):
        if context is not None and len(prompt) >= context:
            raise InputError(
                f"row {row['id']}: its prompt has {len(prompt)} tokens, the model's context is "
                f"{context}; leave the row out or take a model with a longer context"
            )
    return prompts


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a completion, the tokenizer's own first.

    A model may name others too: a base model that was pretrained on documents ends with the token
    that ended those, whatever ends a turn in its tokenizer's chat template.
    """
    own = model.generation_config.eos_token_id
    named = own if isinstance(own, list) else [own]
    tokens = [tokenizer.eos_token_id, *named]
    return list(dict.fromkeys(token for token in tokens if token is not None))
