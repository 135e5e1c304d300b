"""Estimate the memory of a training stage on each device, from its settings and `config.json`.

The estimate follows TRL 1.16 and transformers 5.23: weights in `dtype` (float32 unless set), mixed
precision by autocast, the fused head that never holds all logits, the key-value cache of
`generate`. The activations' coefficients are the bytes that autograd saves for each token in one
block, counted on real models (`benchmarks/memory.py`, which also measures whole stages).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chainforge.core.errors import InputError, hint
from chainforge.doctor.environment import Level
from chainforge.train.distributed import LESS_MEMORY, ZERO3, Layout

GIB = 1024**3
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Bytes saved for each token in one block, for each number of the hidden size, of the MLP's inner
# size, of all heads together, and of the sequence (the attention mask), by precision and by how
# many of the block's linear layers have an adapter.
SAVED = {
    ("float32", "none"): (24, 16, 16, 4),
    ("float32", "some"): (24, 12, 16, 4),
    ("float32", "all"): (48, 20, 24, 4),
    ("half", "none"): (16, 8, 8, 2),
    ("half", "some"): (24, 6, 8, 2),
    ("half", "all"): (48, 14, 16, 2),
    ("mixed", "none"): (26, 8, 8, 2),
    ("mixed", "some"): (20, 6, 8, 2),
    ("mixed", "all"): (38, 12, 14, 2),
}
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768  # of TRL's fused head, whatever the vocabulary
CPU_TILES = 7  # without Triton, each operation on a tile makes a copy
# Optimizers' state, in bytes for each trainable number; of others twice the number's own size.
STATES = {"sgd": 0.0, "adafactor": 0.0, "adamw_8bit": 2.0, "adamw_bnb_8bit": 2.0,
          "paged_adamw_8bit": 2.0, "lion_8bit": 1.0, "paged_lion_8bit": 1.0}  # fmt: skip
CUDA = 1 * GIB  # context, libraries' workspaces and NCCL's buffers
FRAGMENTS = 0.1  # of what comes and goes: the allocator cannot use every gap
INTERPRETER = GIB // 2  # Python and the libraries, in main memory
PROMPT_TOKENS = 256  # if the prompts were not counted
TIGHT = 0.9  # of the device: beyond this a longer prompt may be one too many


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes in parameters; `linears` are the inputs and outputs of a block's layers."""

    vocabulary: int
    layers: int
    parameters: int
    block: int
    linears: dict[str, tuple[int, int]]
    dtype: str

    @property
    def hidden(self) -> int:
        """Return the hidden size."""
        return self.linears["o_proj"][1]

    @property
    def block_linear(self) -> int:
        """Return weights of one block's linear layers, which is what 4-bit loading quantises."""
        return sum(inside * outside for inside, outside in self.linears.values())

    def adapter(self, rank: int, targets: str | list[str] | None) -> int:
        """Return the parameters of a LoRA adapter; `targets` as in `lora_target_modules`."""
        chosen = [targets] if isinstance(targets, str) else targets or ["q_proj", "v_proj"]
        found = [
            size
            for name, size in self.linears.items()
            if chosen == ["all-linear"] or any(f".{one}".endswith(f".{name}") for one in chosen)
        ]
        if not found:
            raise InputError(f"lora_target_modules: {chosen}: {hint(str(chosen[0]), self.linears)}")
        return self.layers * sum(rank * (inside + outside) for inside, outside in found)


def read_shape(config: Mapping[str, Any]) -> Shape:
    """Return the sizes of a `config.json`'s model, built with one block and without memory.

    Raises `InputError` for what is no plain decoder with a gated MLP, as Llama and Qwen are.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family = str(config.get("model_type"))
    unknown = InputError(f"sizes of models of the type {family!r} are not known")
    skipped = ("model_type", "layer_types", "num_hidden_layers")
    given = {key: value for key, value in config.items() if key not in skipped}
    try:
        with torch.device("meta"):
            full = AutoConfig.for_model(family, **given, num_hidden_layers=1)
            model = AutoModelForCausalLM.from_config(full)
        block, layers = model.model.layers[0], int(config["num_hidden_layers"])
    except Exception:  # an architecture may raise anything
        raise unknown from None
    linears = {
        name.rpartition(".")[2]: (layer.in_features, layer.out_features)
        for name, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if set(linears) != set(names):
        raise unknown
    size = sum(weight.numel() for weight in block.parameters())
    rest = sum(weight.numel() for weight in model.parameters()) - size
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return Shape(full.vocab_size, layers, rest + layers * size, size, linears, dtype)


@dataclass
class Estimate:
    """Bytes on each device: the resident part, and the transient part of each phase of a step."""

    resident: dict[str, int]
    phases: dict[str, dict[str, int]]
    assumed: list[str] = field(default_factory=list)

    @property
    def phase(self) -> str:
        """Return the phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Return the parts of the peak, largest first."""
        parts = self.resident | self.phases[self.phase]
        return {name: size for name, size in sorted(parts.items(), key=lambda x: -x[1]) if size}

    @property
    def peak(self) -> int:
        """Return the most that is in use at a time."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        """Return the peak with its largest parts."""
        large = [f"{name} {size / GIB:.1f}" for name, size in list(self.parts.items())[:4]]
        return f"{self.peak / GIB:.1f} GiB a device ({', '.join([*large, *self.assumed])})"


def estimate(
    recipe: str,
    settings: Mapping[str, Any],
    shape: Shape,
    layout: Layout,
    *,
    teacher: Shape | None = None,
    scorers: Sequence[Shape] = (),
    prompt_tokens: int | None = None,
    device_bytes: int | None = None,
) -> Estimate:
    """Estimate a training stage for one device of `layout`.

    `settings` are TRL's configurations of the stage and of the model as one mapping; `scorers` are
    reward models, which have one label in place of the head.
    """
    plan = _Plan(recipe, settings, shape, layout, prompt_tokens)
    found = Estimate(plan.resident(teacher), plan.training(), plan.assumed)
    if sizes := [(one.parameters, DTYPES.get(one.dtype, 4)) for one in scorers]:
        whole = sum(count * size for count, size in sizes)
        found.resident["reward models"] = whole // plan.weight_share
    if recipe not in ("sft", "dpo"):
        generation = plan.generation(device_bytes)
        if "vLLM" in generation and not settings["vllm_enable_sleep_mode"]:
            found.resident["vLLM"] = generation.pop("vLLM")
        found.phases["generation"] = generation
    if settings["use_cpu"]:
        found.resident["Python and libraries"] = INTERPRETER
    else:
        found.resident["CUDA context and buffers"] = CUDA
        for phase in found.phases.values():
            phase["fragmentation"] = int(FRAGMENTS * sum(phase.values()))
    return found


@dataclass
class _Plan:
    """The quantities that the parts of an estimate share."""

    recipe: str
    settings: Mapping[str, Any]
    shape: Shape
    layout: Layout
    prompt_tokens: int | None
    assumed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings, shape, layout = self.settings, self.shape, self.layout
        lora, quantised = settings["use_peft"], settings["load_in_4bit"] or settings["load_in_8bit"]
        self.method = "QLoRA" if quantised else "LoRA" if lora else "full"
        dtype = shape.dtype if settings["dtype"] == "auto" else settings["dtype"]
        self.size = DTYPES.get(str(dtype), 4)
        half = settings["bf16"] or settings["fp16"]
        self.precision = "half" if self.size == 2 else "mixed" if half else "float32"
        targets = settings["lora_target_modules"]
        self.adapted = shape.adapter(settings["lora_r"], targets) if lora else 0
        in_mlp = any(name in str(targets) for name in ("all-linear", "gate_", "up_", "down_"))
        self.adapters = "none" if not lora else "all" if in_mlp else "some"
        self.trained = self.adapted or shape.parameters
        self.trained_size = 4 if lora else self.size  # adapters are in float32
        # Two blocks and the head, which are whole while they are used.
        self.gathered = (2 * shape.block + shape.vocabulary * shape.hidden) * 2
        self.weight_share = layout.processes if layout.shards_weights else 1
        self.state_share = layout.processes if layout.shards_optimizer else 1
        self.batch = int(settings["per_device_train_batch_size"]) * (1 + (self.recipe == "dpo"))
        self.prompt = self.prompt_tokens or PROMPT_TOKENS
        if self.recipe in ("sft", "dpo"):  # the tokens of the longest row
            self.tokens = int(settings["max_length"] or 1024)
        else:
            self.tokens = self.prompt + int(settings["max_completion_length"] or 512)
            if self.prompt_tokens is None:
                self.assumed.append(f"prompts of {PROMPT_TOKENS} tokens")

    def weights(self) -> int:
        """Return the bytes of the weights on one device if none are sharded."""
        shape = self.shape
        if self.method != "QLoRA":
            return shape.parameters * self.size
        quantised = shape.layers * shape.block_linear
        packed = 1.0 if self.settings["load_in_8bit"] else 0.5
        # One scale for each 64 numbers, in float32, or as a byte with nested quantisation.
        scales = 1 / 64 if self.settings["use_bnb_nested_quant"] else 4 / 64
        return int(quantised * (packed + scales)) + (shape.parameters - quantised) * self.size

    def resident(self, teacher: Shape | None) -> dict[str, int]:
        """Return what stays in memory from the first step to the last."""
        optim = self.settings["optim"]
        held = STATES.get(str(getattr(optim, "value", optim)), 2 * self.trained_size)
        optimizer = self.trained * held / self.state_share
        weights = self.weights() / self.weight_share
        if self.layout.kind.startswith("zero") and self.method == "full":
            # DeepSpeed trains in half precision, with a float32 copy beside Adam's two.
            weights = self.shape.parameters * 2 / self.weight_share
            optimizer = self.trained * (4 + max(held, 2 * 4)) / self.state_share
        found = {
            "weights": 0 if self.layout.offload_parameters else int(weights),
            "adapter": self.adapted * self.trained_size // self.weight_share,
            "optimizer": 0 if self.layout.offload_optimizer else int(optimizer),
        }
        if self.recipe in ("grpo", "dpo") and self.settings["beta"] > 0:
            found["reference"] = self.trained * self.trained_size // self.weight_share
        if teacher is not None:
            size = DTYPES.get(teacher.dtype, 4)
            found["teacher"] = teacher.parameters * size // self.weight_share
        return found

    def training(self) -> dict[str, dict[str, int]]:
        """Return the transient memory of the loss, and of the backward pass through the blocks."""
        shape, tokens = self.shape, self.batch * self.tokens
        hidden, inner, heads, mask = SAVED[self.precision, self.adapters]
        block = tokens * (
            hidden * shape.hidden
            + inner * shape.linears["up_proj"][1]
            + heads * shape.linears["q_proj"][1]
            + mask * self.tokens
        )
        stored, copies = shape.layers * block, shape.layers * self._cast()
        if self.settings["gradient_checkpointing"]:
            stored = shape.layers * tokens * (2 if self.precision == "half" else 4) * shape.hidden
            # A cast weight is kept to the end of the forward pass only where it is trained itself.
            copies = copies if self.method == "full" else self._cast()
        gradients = self.trained * self.trained_size // self.state_share
        accumulated = self.settings["gradient_accumulation_steps"] > 1
        # From the batches before, and as DDP's buckets, which are copies.
        held = gradients * (accumulated + (self.layout.kind == "ddp"))
        common = {"gradients": held, "weights cast to half": copies // self.weight_share}
        if self.layout.shards_weights:
            common["gathered weights"] = self.gathered
        loss = {"activations": stored, "loss": self._head(tokens)}
        backward = {"activations": stored + block}
        if not accumulated:  # they come as activations go
            backward["new gradients"] = max(0, gradients - stored)
        return {"loss": common | loss, "backward": common | backward}

    def _cast(self) -> int:
        """Return the bytes of one block's weights in the precision of its products."""
        if self.method == "QLoRA":
            return max(a * b for a, b in self.shape.linears.values()) * self.size
        return 2 * self.shape.block_linear if self.precision == "mixed" else 0

    def _head(self, tokens: int) -> int:
        """Return the bytes of the fused head's tiles and of its weights' gradient in float32."""
        rows = min(tokens, TILE_TOKENS)
        number = 8 if self.recipe == "distill" else 4 if self.precision == "float32" else 2
        tiles = rows * TILE_VOCABULARY * number
        if self.settings["use_cpu"]:
            tiles += CPU_TILES * rows * min(self.shape.vocabulary, TILE_VOCABULARY) * 4
        trained = self.shape.vocabulary * self.shape.hidden * 4 if self.method == "full" else 0
        return tiles + trained + 2 * tokens * self.shape.hidden * 4

    def generation(self, device_bytes: int | None) -> dict[str, int]:
        """Return the transient memory of generation."""
        settings, shape, processes = self.settings, self.shape, self.layout.processes
        if settings["use_vllm"]:
            share = float(settings["vllm_gpu_memory_utilization"])
            colocated = settings["vllm_mode"] == "colocate"
            return {"vLLM": int(share * (device_bytes or 0))} if colocated else {}
        steps = settings.get("steps_per_generation") or settings["gradient_accumulation_steps"]
        given = settings.get("generation_batch_size")
        rows = math.ceil(int(given) / processes) if given else self.batch * int(steps)
        # Keys stay in the stream's precision after rotation, values are in the matrices'.
        number = {"half": 2 + 2, "float32": 4 + 4, "mixed": 4 + 2}[self.precision]
        cache = rows * self.tokens * shape.layers * shape.linears["k_proj"][1] * number
        inner = shape.linears["up_proj"][1]
        found = {
            "key-value cache": cache + cache // shape.layers,  # growing one block's copies it
            "sampling": rows * shape.vocabulary * 4 * 3,  # logits, and what a softmax makes of them
            "prefill": rows * self.prompt * (2 * inner + 4 * shape.hidden) * 4,
        }
        if self.layout.kind == ZERO3:
            found["gathered weights"] = shape.parameters * 2  # ds3_gather_for_generation
        elif self.layout.shards_weights:
            found["gathered weights"] = self.gathered
        return found


def compare(needed: Estimate, device_bytes: int | None) -> tuple[Level, str, str]:
    """Return the finding of an estimate against a device's memory: level, check and text."""
    if device_bytes is None:
        return "ok", "memory", f"{needed}; no GPU here to compare it with"
    text = f"{needed}, of {device_bytes / GIB:.1f} GiB"
    if needed.peak <= TIGHT * device_bytes:
        return "ok", "memory", text
    level: Level = "error" if needed.peak > device_bytes else "warning"
    return level, "memory", f"{text}: {LESS_MEMORY}; or use a smaller model or larger GPUs"
