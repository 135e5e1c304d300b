"""Sample with vLLM in this process, where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.transcript import special_ids
from chainforge.core.weights import check_weights
from chainforge.generate.local import drawn, encode
from chainforge.generate.settings import Draw, SamplingArgs, Take, ends_of
from chainforge.generate.shards import world_size

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
