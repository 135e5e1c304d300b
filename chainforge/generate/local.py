"""Sample in this process: with vLLM, or with transformers in a batch that is refilled.

The samples of one prompt share one pass over it, prompts of similar length are batched, lines that
ended leave, and new ones take their places. `model.generate` pays for every line up to the batch's
longest, and takes what its arguments leave open from the model's own generation config.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

from chainforge.core.errors import InputError, first_line
from chainforge.core.jsonl import Message, Row
from chainforge.core.transcript import special_ids
from chainforge.core.weights import check_weights
from chainforge.generate.settings import Draw, SamplingArgs, Take, config_of, ends_of
from chainforge.generate.shards import world_size

# Columns by which a cache grows. transformers' own copies all of it for every token.
BLOCK = 64
# Share of unfinished lines at which the finished ones leave and new ones come: moving costs too.
SHRINK = 0.75
# Batches that may wait for their scores; more would only cost memory.
BEHIND = 4
# Completions handed to vLLM at once: many, so that its scheduler is never idle, and not all, so
# that a kill costs little.
AT_ONCE = 4096


def open_policy(reference: str, **options: Any) -> Any:
    """Load a policy for inference, on the GPU of this process where there is one."""
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


def context_of(model: Any) -> int | None:
    """Return the most tokens that a model knows positions for; None without a limit."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Turn dropout and gradient checkpointing off meanwhile."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class LocalEngine:
    """A model in this process."""

    def __init__(self, model: Any, tokenizer: Any, args: SamplingArgs) -> None:
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.context = context_of(model)
        self.ends = end_tokens(model, tokenizer)
        self.special = special_ids(tokenizer)

    def sample(self, draws: Sequence[Draw], take: Take) -> None:
        """Sample every draw; a thread scores completions while the next tokens are computed."""
        rows = {draw.row["id"]: draw.row for draw in draws}
        prompts = dict(zip(rows, encode(self.tokenizer, [*rows.values()], self.context)))
        # Longest first: what does not fit into memory fails at once, and the last lines are short.
        place = {name: number for number, name in enumerate(rows)}
        order = sorted(
            draws, key=lambda d: (-len(prompts[d.row["id"]]), place[d.row["id"]], d.sample)
        )
        lines = [Line(draw, prompts[draw.row["id"]], draw.seed) for draw in order]
        handed: deque[Future[None]] = deque()
        with evaluating(self.model), ThreadPoolExecutor(1) as scorer:
            for done in generate(self.model, lines, self.args, self.ends, self.context):
                # In this context a judge finds the stage that keeps its verdicts.
                handed.append(scorer.submit(copy_context().run, self._hand_over, done, take))
                while len(handed) > BEHIND or (handed and handed[0].done()):
                    handed.popleft().result()
            while handed:
                handed.popleft().result()

    def _hand_over(self, done: list[Line], take: Take) -> None:
        """Decode completions, each cut at its end token; the tags are no special tokens."""
        ends = ["stop" if line.ids[-1] in self.ends else "length" for line in done]
        cut = [line.ids[:-1] if end == "stop" else line.ids for line, end in zip(done, ends)]
        texts = self.tokenizer.batch_decode(
            cut, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        made = zip(done, texts, ends, strict=True)
        take([(one.key, drawn(self.special, text, one.ids, end)) for one, text, end in made])


class VllmEngine:
    """A policy that vLLM runs in this process."""

    def __init__(self, args: SamplingArgs, policy: str, tokenizer: Any, dtype: str) -> None:
        try:
            import vllm
        except ImportError:
            raise InputError(
                "engine vllm: vLLM is not installed here; `pip install vllm` on a machine with a "
                "GPU, or use `engine: transformers`, or `engine: api` with a server elsewhere"
            ) from None
        if world_size() > 1:
            raise InputError(
                "engine vllm: vLLM spreads over GPUs itself; leave `launch` out and give "
                "engine_options: {tensor_parallel_size: N} (or data_parallel_size)"
            )
        check_weights(policy)
        self.args, self.tokenizer, self._vllm = args, tokenizer, vllm
        self.special = special_ids(tokenizer)
        self._ends = sorted(ends_of(policy))
        if dtype == "auto":  # as saved; vLLM's own "auto" makes float32 a type of 16 bits
            config = config_of(policy)
            dtype = config.get("dtype") or config.get("torch_dtype") or dtype
        options: dict[str, Any] = {
            "generation_config": "vllm",  # nothing comes from the model's own
            "enable_prefix_caching": True,
            "dtype": dtype,
            "load_format": "safetensors",
        }
        if vllm.platforms.current_platform.is_cpu():
            # After each part but a prompt's last it sets seeds back, which fails on the CPU.
            options["enable_chunked_prefill"] = False
        self.model = vllm.LLM(model=policy, **(options | (args.engine_options or {})))

    def sample(self, draws: Sequence[Draw], take: Take) -> None:
        """Sample every draw."""
        rows = {draw.row["id"]: draw.row for draw in draws}
        prompts = dict(zip(rows, encode(self.tokenizer, [*rows.values()])))
        for start in range(0, len(draws), AT_ONCE):
            part = draws[start : start + AT_ONCE]
            outputs = self.model.generate(
                [{"prompt_token_ids": prompts[draw.row["id"]]} for draw in part],
                [self._parameters(draw) for draw in part],
                use_tqdm=False,
            )
            said = [output.outputs[0] for output in outputs]  # in the order of the prompts
            made = [drawn(self.special, o.text, o.token_ids, o.finish_reason) for o in said]
            take(list(zip(part, made, strict=True)))

    def _parameters(self, draw: Draw) -> Any:
        args = self.args
        return self._vllm.SamplingParams(
            n=1,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k or -1,
            min_p=0.0,
            repetition_penalty=1.0,
            max_tokens=args.max_new_tokens,
            seed=draw.seed,
            stop_token_ids=self._ends,
            skip_special_tokens=True,
        )


def drawn(special: dict[int, str], text: str, ids: Sequence[int], end: str) -> Row:
    """Return a completion's columns.

    `chat_token` names a special token within the completion: the decoded text leaves it out. A
    template may end a turn with several.
    """
    inner = list(ids)
    while end == "stop" and inner and (len(inner) == len(ids) or inner[-1] in special):
        inner.pop()
    found = next((special[one] for one in inner if one in special), None)
    columns: Row = {"completion": text, "tokens": len(ids), "finish_reason": end}
    return columns | ({} if found is None else {"chat_token": found})


def encode(
    tokenizer: Any, rows: list[Row], context: int | None = None, **options: Any
) -> list[list[int]]:
    """Return the token ids of each row's prompt, as the chat template writes it for an answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template, so prompts cannot be written")
    if not rows:
        raise InputError("no prompts to sample from")
    prompts: list[list[int]] = tokenizer.apply_chat_template(
        [row["prompt"] for row in rows], add_generation_prompt=True, return_dict=True, **options
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


@dataclass(eq=False)
class Line:
    """A completion that is being generated: whose it is, its prompt, and its tokens so far."""

    key: Any
    prompt: list[int]
    seed: int
    ids: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # log-probability of each, where asked for
    going: bool = True
    most: int = 0  # tokens
    uniforms: Any = None  # a random number in [0, 1) for each of them

    def start(self, args: SamplingArgs, context: int | None) -> None:
        """Draw the random numbers, from this line's own seed."""
        room = args.max_new_tokens if context is None else context - len(self.prompt)
        self.most = min(args.max_new_tokens, room)
        generator = torch.Generator().manual_seed(self.seed)
        self.uniforms = torch.rand(args.max_new_tokens, generator=generator).numpy()


@torch.no_grad()
def generate(
    model: Any,
    lines: Sequence[Line],
    args: SamplingArgs,
    ends: Sequence[int],
    context: int | None,
    scored: bool = False,
) -> Iterator[list[Line]]:
    """Generate lines, begun in this order; yield those that ended, some at a time.

    A completion may have `max_new_tokens`, or as many as the `context` leaves. With `scored` each
    token has the log-probability that the model gives it at this temperature.
    """
    waiting, size = deque(lines), args.generation_batch_size
    batch: Batch | None = None
    while waiting or batch is not None:
        if waiting and (batch is None or (batch.joinable and len(batch.lines) <= SHRINK * size)):
            room = size - (len(batch.lines) if batch else 0)
            fresh = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            for line in fresh:
                line.start(args, context)
            new = prefill(model, fresh)
            batch = new if batch is None else batch.join(new)
        assert batch is not None
        tokens = choose(batch.logits, batch.uniform(), args)
        if scored:
            batch.score(tokens, args.temperature)
        batch.write(tokens, ends)
        if sum(line.going for line in batch.lines) <= SHRINK * len(batch.lines):
            yield [line for line in batch.lines if not line.going]
            batch = batch.left()
        if batch is not None:
            batch.forward(model, context)


@dataclass(eq=False)
class Batch:
    """Lines that are generated together. The first dimension of every tensor is the line.

    `mask` has a column for each column of the cache; prompts are padded on the left, so that all
    lines grow together, each with its own positions. `logits` are those of the next token, `latest`
    are the tokens that the model has not seen yet.
    """

    lines: list[Line]
    cache: Any
    mask: Tensor
    logits: Tensor
    latest: Any = None

    @property
    def joinable(self) -> bool:
        """Return whether another batch can join these lines: the cache holds all their tokens."""
        return all(isinstance(one, Columns) and one.is_initialized for one in self.cache.layers)

    def uniform(self) -> Tensor:
        """Return each line's random number for its next token, shape (lines, 1)."""
        last = len(self.lines[0].uniforms) - 1
        numbers = [line.uniforms[min(len(line.ids), last)] for line in self.lines]
        return torch.from_numpy(np.array(numbers)).to(self.logits.device)[:, None]

    def score(self, tokens: Tensor, temperature: float) -> None:
        """Note the log-probability of each unfinished line's next token.

        Raises `FloatingPointError` when the model gives none.
        """
        logits = self.logits.float() / (temperature or 1.0)
        whole = logits.logsumexp(-1)
        if not whole.isfinite().all():
            raise FloatingPointError("the model's logits are not finite")
        scores = logits.gather(1, tokens[:, None])[:, 0] - whole
        for line, value in zip(self.lines, scores.tolist(), strict=True):
            if line.going:
                line.scores.append(value)

    def write(self, tokens: Tensor, ends: Sequence[int]) -> None:
        """Append a token to each unfinished line."""
        self.latest = tokens[:, None]
        for line, token in zip(self.lines, tokens.tolist(), strict=True):
            if line.going:
                line.ids.append(token)
                line.going = token not in ends and len(line.ids) < line.most

    def forward(self, model: Any, context: int | None) -> None:
        """Run the latest tokens through the model."""
        self.mask = pad(self.mask, (0, 1), value=1)
        # Lines that ended may be beyond the last position that the model knows.
        positions = (self.mask.sum(1, keepdim=True) - 1).clamp(max=(context or 2**31) - 1)
        self.logits = _logits(model, self.latest, self.mask, positions, self.cache)

    def left(self) -> Batch | None:
        """Take out the lines that ended; return None if none is left."""
        stay = [place for place, line in enumerate(self.lines) if line.going]
        if not stay:
            return None
        index = torch.tensor(stay, device=self.mask.device)
        self.lines = [self.lines[place] for place in stay]
        self.mask, self.latest = self.mask[index], self.latest[index]
        self.cache.reorder_cache(index)
        if self.joinable and (unused := int(self.mask.argmax(1).min())):
            self.mask = self.mask[:, unused:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]
        return self

    def join(self, other: Batch) -> Batch:
        """Put another batch's lines, which are about to get their first token, beside these."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        new = [width - batch.mask.shape[1] for batch in (self, other)]  # columns before the first
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            for name in ("keys", "values"):
                both = (getattr(layer, name) for layer in (mine, theirs))
                wide = [pad(states, (0, 0, columns, 0)) for states, columns in zip(both, new)]
                setattr(mine, name, torch.cat(wide))
        masks = (pad(one.mask, (columns, 0)) for one, columns in zip((self, other), new))
        self.mask = torch.cat([*masks])
        self.logits = torch.cat([self.logits, other.logits])
        self.lines = self.lines + other.lines
        return self


class Columns(DynamicLayer):
    """A layer of the cache that has room for further tokens."""

    keys: Tensor
    values: Tensor
    view: Tensor | None = None
    whole: list[Tensor]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens; return those of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        old, new = self.keys.shape[-2], key_states.shape[-2]
        # Lines that left or came have made other tensors of these.
        if self.view is not self.keys or old + new > self.whole[0].shape[-2]:
            more = (0, 0, 0, new + BLOCK)
            self.whole = [pad(states, more) for states in (self.keys, self.values)]
        for whole, states in zip(self.whole, (key_states, value_states), strict=True):
            whole[:, :, old : old + new] = states
        self.keys, self.values = (whole[:, :, : old + new] for whole in self.whole)
        self.view = self.keys
        return self.keys, self.values


def prefill(model: Any, lines: list[Line]) -> Batch:
    """Run the prompts of some lines through the model, each prompt once."""
    places: dict[tuple[int, ...], int] = {}  # of the different prompts
    of_line = [places.setdefault(tuple(line.prompt), len(places)) for line in lines]
    width = max(map(len, places))
    ids = torch.zeros((len(places), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for prompt, place in places.items():
        ids[place, width - len(prompt) :] = torch.tensor(prompt)
        mask[place, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache: Any = DynamicCache(config=model.config)
    cache.layers = [Columns() if type(one) is DynamicLayer else one for one in cache.layers]
    logits = _logits(model, ids, mask, positions, cache)
    if len(places) < len(lines):
        index = torch.tensor(of_line, device=model.device)
        cache.reorder_cache(index)
        mask, logits = mask[index], logits[index]
    return Batch(lines, cache, mask, logits)


def _logits(model: Any, ids: Any, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Run tokens through the model; return the logits after each line's last."""
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return logits[:, -1]


def choose(logits: Tensor, uniform: Tensor, args: SamplingArgs) -> Tensor:
    """Return the next token of each line: where its random number falls in the distribution.

    `logits` have shape (lines, vocabulary), `uniform` (lines, 1). One number decides a token, so
    that a sample depends on its own seed alone, whatever is sampled beside it.
    """
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    if args.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / args.temperature
    if args.top_k:
        logits = TopKLogitsWarper(args.top_k)(None, logits)
    if args.top_p < 1:
        logits = TopPLogitsWarper(args.top_p)(None, logits)
    heights = logits.softmax(-1).cumsum(-1)
    top = heights[:, -1:]
    # Rounding may lift the product to the top itself, which is beyond the last token.
    aim = torch.minimum(uniform * top, torch.nextafter(top, torch.zeros_like(top)))
    return torch.searchsorted(heights, aim, right=True)[:, 0]


class RolloutSampler:
    """Sample completions from the policy as it is now: a `rollout_func` for GRPOTrainer.

    Each completion has a seed of its own, drawn from torch's generator, whose state is in every
    checkpoint: a resumed run samples the same.
    """

    def __call__(self, prompts: list[list[Message]], trainer: Any) -> dict[str, list[Any]]:
        """Return `prompt_ids`, `completion_ids` and `logprobs`, an entry for each prompt."""
        args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
        context = context_of(model)
        keys = [json.dumps(prompt) for prompt in prompts]
        rows = {key: {"id": key, "prompt": one} for key, one in zip(keys, prompts, strict=True)}
        texts = encode(
            trainer.processing_class, [*rows.values()], context, **trainer.chat_template_kwargs
        )
        ids = dict(zip(rows, texts, strict=True))
        seeds = torch.randint(2**31, (len(prompts),)).tolist()
        lines = [Line(n, ids[key], seed) for n, (key, seed) in enumerate(zip(keys, seeds))]
        settings = SamplingArgs(
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k or 0,
            max_new_tokens=args.max_completion_length,
            generation_batch_size=len(lines),
        )
        with evaluating(model):
            for _ in generate(model, lines, settings, trainer.eos_token_ids, context, scored=True):
                pass  # the lines themselves are the result
        return {
            "prompt_ids": [line.prompt for line in lines],
            "completion_ids": [line.ids for line in lines],
            "logprobs": [line.scores for line in lines],
        }
