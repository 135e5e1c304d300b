"""What a model weighs, from its `config.json` alone: no weights, no torch.

Known are the plain decoders whose layers are attention with grouped keys and a gated MLP. A test
holds the counts to models that transformers builds from the same configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainforge.core import artifacts
from chainforge.core.errors import InputError, hint

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Family:
    """What sets one family's layers apart from Llama's."""

    qkv_bias: bool = False
    qk_norm: bool = False  # a norm of one head's size on queries and on keys
    default_tied: bool = False
    lora: tuple[str, ...] = ("q_proj", "v_proj")  # peft's own choice for the family


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
}


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; the counts are in parameters."""

    family: str
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
    qk_norm: bool = False
    dtype: str = "float32"

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Each linear layer of one block: how many numbers go in and come out."""
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
        """Weights of one block's linear layers, which is what 4-bit loading quantises."""
        return sum(inside * outside for inside, outside in self.linears.values())

    @property
    def block(self) -> int:
        """All parameters of one block."""
        small = 2 * self.hidden + (2 * self.head_size if self.qk_norm else 0)
        for name, (_, outside) in self.linears.items():
            biased = (
                self.qkv_bias if name[0] in "qkv" else
                self.out_bias if name[0] == "o" else self.mlp_bias
            )  # fmt: skip
            small += outside if biased else 0
        return self.block_linear + small

    @property
    def embeddings(self) -> int:
        """The embeddings, and the head where it has weights of its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.embeddings + self.layers * self.block + self.hidden

    def adapter(self, rank: int, targets: str | list[str] | None) -> int:
        """Return the parameters of a LoRA adapter; `targets` as in `lora_target_modules`."""
        if isinstance(targets, list) and targets == ["all-linear"]:
            targets = "all-linear"
        chosen = list(FAMILIES[self.family].lora) if targets is None else targets
        if isinstance(chosen, str):
            chosen = list(self.linears) if chosen == "all-linear" else [chosen]
        found = [size for name, size in self.linears.items() if _named(name, chosen)]
        if not found:
            raise InputError(f"lora_target_modules: {chosen}: {hint(str(chosen[0]), self.linears)}")
        return self.layers * sum(rank * (inside + outside) for inside, outside in found)


def read_shape(config: Mapping[str, Any]) -> Shape:
    """Read a `config.json`; raise `InputError` for an architecture that is not known."""
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"model_type {family!r}: sizes are known for {known} only")
    if config.get("num_experts") or config.get("num_local_experts"):
        raise InputError("a mixture of experts: sizes are known for dense models only")
    kind = FAMILIES[family]
    heads = int(config["num_attention_heads"])
    attention_bias = bool(config.get("attention_bias", False)) and family != "qwen2"
    return Shape(
        family=family,
        vocabulary=int(config["vocab_size"]),
        hidden=int(config["hidden_size"]),
        inner=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        key_heads=int(config.get("num_key_value_heads") or heads),
        head_size=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        tied=bool(config.get("tie_word_embeddings", kind.default_tied)),
        qkv_bias=kind.qkv_bias or attention_bias,
        out_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=kind.qk_norm,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )


def shape_of(reference: str) -> Shape | None:
    """Return the shape of a model's directory, or of a Hub id whose config is on this machine.

    None when nothing is here to read: the Hub is not asked.
    """
    path = Path(reference) / "config.json"
    if not path.is_file():
        found = cached(reference)
        if found is None:
            return None
        path = Path(found)
    return read_shape(artifacts.read_json(path))


def cached(reference: str) -> str | None:
    """Return the `config.json` of a Hub id in the cache of this machine; None without one."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(reference, "config.json")
    except HFValidationError:  # a path that is not there yet
        return None
    return found if isinstance(found, str) else None


def _named(name: str, chosen: list[str]) -> bool:
    return any(name == one or one.endswith(f".{name}") for one in chosen)
