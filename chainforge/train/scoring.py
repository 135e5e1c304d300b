"""Sample GRPO's completions, and compute their log-probabilities without needless work.

GRPOTrainer pads every row to the longest prompt and the longest completion of a whole rollout,
computes gradients that are zero, and runs the policy once more over completions whose
log-probabilities were known when they were sampled. What is computed here has the same values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chainforge.core.jsonl import Message
from chainforge.generate.local import RolloutSampler
from chainforge.train import trl_internals

# Parts into which the rows of one pass are split by length, and the fewest tokens of each.
PARTS = 8
LEAST = {"cpu": 512, "cuda": 8192}
# Log-probabilities, entropies, and the loss of a mixture's experts.
Scores = tuple[Tensor, Tensor | None, Tensor | None]


class OwnRollouts(RolloutSampler):
    """A `rollout_func` that takes over how its trainer computes log-probabilities."""

    def __init__(self) -> None:
        self._trainer: Any = None
        self._theirs: Any = None  # TRL's own methods
        self._sampled: list[list[float]] | None = None
        self._trains: Tensor | None = None  # the rows of a micro-batch that have a gradient

    def __call__(self, prompts: list[list[Message]], trainer: Any) -> dict[str, list[Any]]:
        """Sample a completion for each prompt; keep its scores where TRL is about to ask for them.

        TRL asks when the policy changes before all of a rollout is used. In types of 16 bits its
        pass over whole rows rounds otherwise than sampling did, and the ratio would not be 1.
        """
        if self._trainer is None:
            self._trainer, self._theirs = trainer, trl_internals.score_with(trainer, self)
        made = super().__call__(prompts, trainer)
        args, dtype = trainer.args, next(trainer.model.parameters()).dtype
        rollout = args.steps_per_generation * args.num_iterations
        exact = dtype == torch.float32 and not (args.bf16 or args.fp16)
        asks = args.gradient_accumulation_steps % rollout != 0
        self._sampled = made["logprobs"] if asks and exact else None
        return made

    def loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss; an advantage of 0 gives a row no gradient but that of other terms."""
        of = self._trainer.args
        others = of.beta or of.entropy_coef or of.use_adaptive_entropy
        # DDP's processes would not meet: after a pass without gradients it skips a broadcast.
        if not others and self._trainer.accelerator.num_processes == 1:
            self._trains = inputs["advantages"] != 0
        try:
            return self._theirs[1](model, inputs, *args, **kwargs)
        finally:
            self._trains = None

    def scores(
        self,
        model: Any,
        ids: Tensor,
        mask: Tensor,
        keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> Scores:
        """Return the log-probabilities and entropies of the last `keep` tokens, (rows, keep).

        `ids` and `mask` are (rows, tokens): prompts padded on the left, completions on the right.
        Both are 0 where the completion is masked. Images and losses of experts are left to TRL.
        """
        sampled, self._sampled = self._sampled, None
        if any(one is not None and one is not False for one in others.values()):
            given = {"compute_entropy": compute_entropy, **others}
            left: Scores = self._theirs[0](model, ids, mask, keep, batch_size, **given)
            return left
        if sampled is not None and len(sampled) == len(ids):
            known = [torch.tensor(row + [0.0] * (keep - len(row))) for row in sampled]
            return torch.stack(known).to(ids.device), None, None
        lengths = mask.sum(1)
        trains = torch.ones_like(lengths) if self._trains is None else self._trains.long()
        order = (lengths + trains * ids.shape[1]).argsort(stable=True)
        parts = order.split(self._rows_of_a_part(batch_size or len(ids), ids.device.type))
        found = []
        for number, rows in enumerate(parts, 1):
            # A loss without any gradient has no backward pass.
            needed = number == len(parts) or bool(trains[rows].any())
            with torch.set_grad_enabled(torch.is_grad_enabled() and needed):
                found.append(self._part(model, ids[rows], mask[rows], keep, compute_entropy))
        scored, *entropy = (torch.cat(one)[order.argsort()] for one in zip(*found))
        return scored, entropy[0] if entropy else None, None

    def _rows_of_a_part(self, rows: int, device: str) -> int:
        """Return how many rows to compute together: of settings that all processes share."""
        tokens: int = rows * self._trainer.args.max_completion_length
        parts = max(1, min(PARTS, rows, tokens // LEAST.get(device, LEAST["cuda"])))
        return -(-rows // parts)

    def _part(
        self, model: Any, ids: Tensor, mask: Tensor, keep: int, entropy: bool
    ) -> list[Tensor]:
        """Compute some rows, each moved to the first column: scores, and entropies if asked for.

        Padding comes after a row only, where a causal model does not see it: no mask is needed.
        """
        first = mask.argmax(1, keepdim=True)
        width, before = int(mask.sum(1).max()), ids.shape[1] - keep - first  # a prompt's tokens
        columns = (first + torch.arange(width, device=ids.device)).clamp(max=ids.shape[1] - 1)
        moved, least = ids.gather(1, columns), int(before.min())
        left, whole = max(1, width - least), torch.ones_like(moved)
        computed = self._theirs[0](model, moved, whole, left, compute_entropy=entropy)[:2]
        place = (before - least + torch.arange(keep, device=ids.device)).clamp(max=left - 1)
        hidden = mask[:, -keep:] == 0
        return [one.gather(1, place).masked_fill(hidden, 0) for one in computed if one is not None]
