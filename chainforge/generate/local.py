"""Sample in this process: with vLLM, or with transformers in a batch that is refilled.

The samples of one prompt share one pass over it, prompts of similar length are batched, lines that
ended leave, and new ones take their places. `model.generate` pays for every line up to the batch's
longest, and takes what its arguments leave open from the model's own generation config.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicLayer

from chainforge.core.errors import InputError, first_line
from chainforge.core.jsonl import Row
from chainforge.core.transcript import special_ids
from chainforge.core.weights import check_weights
from chainforge.generate.settings import Draw, SamplingArgs, Take, ends_of
from chainforge.generate.shards import world_size

if TYPE_CHECKING:
    from torch import Tensor

# Columns by which a cache grows. transformers' own copies all of it for every token.
BLOCK = 64
# Share of unfinished lines at which the finished ones leave and new ones come: moving costs too.
SHRINK = 0.75
# Batches that may wait for their scores; more would only cost memory.
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
        """Sample every draw; a thread scores completions while the next tokens are computed."""
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
            with ThreadPoolExecutor(1) as scorer, torch.inference_mode():
                self._run(deque(order), prompts, take, scorer)
        finally:
            self.model.train(training)

    def _run(
        self,
        waiting: deque[Draw],
        prompts: dict[str, list[int]],
        take: Take,
        scorer: ThreadPoolExecutor,
    ) -> None:
        handed: deque[Future[None]] = deque()
        size = self.args.generation_batch_size
        batch: Batch | None = None
        while waiting or batch is not None:
            if waiting and (batch is None or (batch.joinable and len(batch) <= SHRINK * size)):
                room = size - (len(batch) if batch else 0)
                fresh = [waiting.popleft() for _ in range(min(room, len(waiting)))]
                new = prefill(self.model, fresh, prompts, self.args, self.context)
                batch = new if batch is None else batch.join(new)
            assert batch is not None
            token = choose(batch.logits, batch.uniform(), self.args)
            left = batch.write(token, self.ends)
            if left <= SHRINK * len(batch):
                done, batch = batch.leave()
                handed.append(scorer.submit(self._hand_over, done, take))
                while len(handed) > BEHIND or (handed and handed[0].done()):
                    handed.popleft().result()
            if batch is not None:
                batch.forward(self.model)
        while handed:
            handed.popleft().result()

    def _hand_over(self, done: list[tuple[Draw, list[int]]], take: Take) -> None:
        """Decode completions, each cut at its end token; the tags are no special tokens."""
        stopped = [ids[-1] in self.ends for _, ids in done]
        cut = [ids[:-1] if end else ids for (_, ids), end in zip(done, stopped, strict=True)]
        texts = self.tokenizer.batch_decode(
            cut, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        take(
            [
                (draw, drawn(self.special, text, ids, "stop" if end else "length"))
                for (draw, ids), text, end in zip(done, texts, stopped, strict=True)
            ]
        )


# Completions handed to vLLM at once: many, so that its scheduler is never idle, and not all, so
# that a kill costs little.
AT_ONCE = 4096


class VllmEngine:
    """A policy that vLLM serves to this process alone."""

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
        # `generation_config="vllm"`: nothing comes from the model's own generation config.
        options = {"generation_config": "vllm", "enable_prefix_caching": True, "dtype": dtype}
        options["load_format"] = "safetensors"
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
            # In the order of the prompts.
            said = [output.outputs[0] for output in outputs]
            take(
                [
                    (draw, drawn(self.special, one.text, one.token_ids, one.finish_reason))
                    for draw, one in zip(part, said, strict=True)
                ]
            )

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

    `chat_token` names a special token within the completion: the decoded text leaves it out.
    """
    inner = ids[:-1] if end == "stop" else ids
    found = next((special[one] for one in inner if one in special), None)
    columns: Row = {"completion": text, "tokens": len(ids), "finish_reason": end}
    return columns | ({} if found is None else {"chat_token": found})


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
            self.whole = [_with_room(states, new + BLOCK) for states in (self.keys, self.values)]
        for whole, states in zip(self.whole, (key_states, value_states), strict=True):
            whole[:, :, old : old + new] = states
        self.keys, self.values = (whole[:, :, : old + new] for whole in self.whole)
        self.view = self.keys
        return self.keys, self.values


def _with_room(states: Tensor, columns: int) -> Tensor:
    lines, heads, length, size = states.shape
    whole = states.new_empty(lines, heads, length + columns, size)
    whole[:, :, :length] = states
    return whole


@dataclass(eq=False)
class Batch:
    """Lines that are being generated. The first dimension of every tensor is the line.

    `mask` has a column for each column of the cache; prompts are padded on the left, so that all
    lines grow together, each with its own positions. `logits` are those of the next token.
    """

    draws: list[Draw]
    cache: Any
    mask: Tensor
    positions: Tensor
    logits: Tensor
    written: Tensor  # (lines, most tokens)
    uniforms: Tensor  # likewise: a random number for each token
    counts: Tensor
    limits: Tensor
    going: Tensor
    last: int  # the last position that the model knows

    def __len__(self) -> int:
        return len(self.draws)

    @property
    def joinable(self) -> bool:
        """Return whether another batch can join these lines: the cache holds all their tokens."""
        return all(isinstance(one, Columns) and one.is_initialized for one in self.cache.layers)

    def uniform(self) -> Tensor:
        """Return each line's random number for its next token."""
        return self.uniforms.gather(1, self._next())

    def _next(self) -> Tensor:
        return self.counts.clamp(max=self.written.shape[1] - 1)[:, None]

    def write(self, tokens: Tensor, ends: list[int]) -> int:
        """Append a token to each unfinished line; return how many are unfinished after it."""
        import torch

        old = self.written.gather(1, self._next())[:, 0]
        self.written.scatter_(1, self._next(), torch.where(self.going, tokens, old)[:, None])
        self.counts += self.going
        ended = torch.isin(tokens, tokens.new_tensor(ends)) | (self.counts >= self.limits)
        self.going &= ~ended
        return int(self.going.sum())

    def forward(self, model: Any) -> None:
        """Run the last tokens through the model."""
        import torch

        latest = self.written.gather(1, (self.counts - 1)[:, None])
        self.positions = (self.positions + 1).clamp(max=self.last)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self), 1)], dim=1)
        self.logits = _logits(model, latest, self.mask, self.positions, self.cache)

    def leave(self) -> tuple[list[tuple[Draw, list[int]]], Batch | None]:
        """Take out the lines that ended; return them with their tokens, and what is left."""
        going, counts = self.going.tolist(), self.counts.tolist()
        out = [line for line, goes in enumerate(going) if not goes]
        tokens = self.written[~self.going].tolist()
        done = [
            (self.draws[line], ids[: counts[line]]) for line, ids in zip(out, tokens, strict=True)
        ]
        if len(out) == len(self):
            return done, None
        stay = self.going.nonzero()[:, 0]
        self.draws = [draw for draw, goes in zip(self.draws, going, strict=True) if goes]
        for name in LINES[1:]:
            setattr(self, name, getattr(self, name)[stay])
        self.cache.batch_select_indices(stay)
        if self.joinable and (unused := int(self.mask.argmax(1).min())):
            self.mask = self.mask[:, unused:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]
        return done, self

    def join(self, other: Batch) -> Batch:
        """Put another batch's lines, which are about to get their first token, beside these."""
        import torch
        from torch.nn.functional import pad

        width = max(self.mask.shape[1], other.mask.shape[1])
        new = [width - batch.mask.shape[1] for batch in (self, other)]  # columns before the first
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            for name in ("keys", "values"):
                both = (getattr(layer, name) for layer in (mine, theirs))
                wide = [pad(states, (0, 0, columns, 0)) for states, columns in zip(both, new)]
                setattr(mine, name, torch.cat(wide))
        for batch, columns in zip((self, other), new):
            batch.mask = pad(batch.mask, (columns, 0))
        self.draws = self.draws + other.draws
        for name in LINES:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        return self


# The tensors of a batch, a line each; the logits are new with each token.
LINES = ("logits", "mask", "positions", "written", "uniforms", "counts", "limits", "going")


def _logits(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
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


def prefill(
    model: Any,
    draws: list[Draw],
    prompts: dict[str, list[int]],
    args: SamplingArgs,
    context: int | None,
) -> Batch:
    """Run the prompts of draws through the model, each prompt once.

    A completion may have `max_new_tokens`, or as many as the `context` leaves.
    """
    import torch
    from transformers import DynamicCache

    lines = {name: line for line, name in enumerate(dict.fromkeys(d.row["id"] for d in draws))}
    chosen = [prompts[name] for name in lines]
    width = max(map(len, chosen))
    ids = torch.zeros((len(chosen), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for line, prompt in enumerate(chosen):
        ids[line, width - len(prompt) :] = torch.tensor(prompt)
        mask[line, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    cache.layers = [Columns() if type(one) is DynamicLayer else one for one in cache.layers]
    logits = _logits(model, ids, mask, positions, cache)
    if len(lines) < len(draws):
        of_draw = torch.tensor([lines[draw.row["id"]] for draw in draws], device=model.device)
        cache.batch_select_indices(of_draw)
        mask, positions, logits = mask[of_draw], positions[of_draw], logits[of_draw]
    last = 2**31 if context is None else context - 1
    room = [last + 1 - len(prompts[draw.row["id"]]) for draw in draws]
    return Batch(
        draws=list(draws),
        cache=cache,
        mask=mask,
        positions=positions[:, -1:],
        logits=logits,
        written=torch.zeros((len(draws), args.max_new_tokens), dtype=torch.long, device=ids.device),
        uniforms=_uniforms(draws, args).to(ids.device),
        counts=torch.zeros(len(draws), dtype=torch.long, device=ids.device),
        limits=torch.tensor(room, device=ids.device).clamp(max=args.max_new_tokens),
        going=torch.ones(len(draws), dtype=torch.bool, device=ids.device),
        last=last,
    )


def _uniforms(draws: list[Draw], args: SamplingArgs) -> Tensor:
    """Return a random number in [0, 1) for every token, from each sample's own seed."""
    import torch

    if args.temperature == 0:
        return torch.zeros(len(draws), args.max_new_tokens)
    generator = torch.Generator()
    return torch.stack(
        [torch.rand(args.max_new_tokens, generator=generator.manual_seed(d.seed)) for d in draws]
    )


def choose(logits: Tensor, uniform: Tensor, args: SamplingArgs) -> Tensor:
    """Return the next token of each line: where its random number falls in the distribution.

    `logits` have shape (lines, vocabulary), `uniform` (lines, 1). One number decides a token, so
    that a sample depends on its own seed alone, whatever is sampled beside it.
    """
    import torch
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
