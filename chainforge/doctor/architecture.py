"""Count a model's parameters from its `config.json` alone: no weights, no torch.

Supported are plain decoders with grouped-query attention and a gated MLP. A test compares the
counts with models that transformers builds from the same configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chainforge.core.errors import InputError, hint

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LORA_TARGETS = ("q_proj", "v_proj")  # peft's own choice for all of them


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; the counts are in parameters."""

    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    tied: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # a norm of one head's size on queries and on keys
    dtype: str = "float32"

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the input and output size of each linear layer of one block."""
        queries, keys = self.heads * self.head_size, self.key_heads * self.head_size
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    @property
    def block_linear(self) -> int:
        """Return weights of one block's linear layers, which is what 4-bit loading quantises."""
        return sum(inside * outside for inside, outside in self.linears.values())

    @property
    def block(self) -> int:
        """Return all parameters of one block."""
        small = 2 * self.hidden + (2 * self.head_size if self.qk_norm else 0)
        for name, (_, outside) in self.linears.items():
            bias = self.qkv_bias if name[0] in "qkv" else self.mlp_bias
            small += outside if (self.out_bias if name[0] == "o" else bias) else 0
        return self.block_linear + small

    @property
    def parameters(self) -> int:
        """Return all parameters; the head counts where it is not tied to the embeddings."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * self.block + self.hidden

    def adapter(self, rank: int, targets: str | list[str] | None) -> int:
        """Return the parameters of a LoRA adapter; `targets` as in `lora_target_modules`."""
        chosen = list(LORA_TARGETS) if targets is None else targets
        chosen = [chosen] if isinstance(chosen, str) else chosen
        found = [
            size
            for name, size in self.linears.items()
            if chosen == ["all-linear"] or any(f".{one}".endswith(f".{name}") for one in chosen)
        ]
        if not found:
            raise InputError(f"lora_target_modules: {chosen}: {hint(str(chosen[0]), self.linears)}")
        return self.layers * sum(rank * (inside + outside) for inside, outside in found)


def read_shape(config: Mapping[str, Any]) -> Shape:
    """Read a `config.json`; raise `InputError` for an unknown architecture."""
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise InputError(f"model_type {family!r}: sizes are known for {', '.join(FAMILIES)} only")
    if config.get("num_experts") or config.get("num_local_experts"):
        raise InputError("a mixture of experts: sizes are known for dense models only")
    heads = int(config["num_attention_heads"])
    attention_bias = bool(config.get("attention_bias", False)) and family != "qwen2"
    return Shape(
        vocabulary=int(config["vocab_size"]),
        hidden=int(config["hidden_size"]),
        inner=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        key_heads=int(config.get("num_key_value_heads") or heads),
        head_size=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )
