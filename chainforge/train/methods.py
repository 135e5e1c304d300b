"""Return what a stage starts from and how it trains, and see that the settings make sense together.

`model_name_or_path` is a plain model (a Hub id, a directory, a stage's `model/`) or a LoRA adapter
(a directory, a stage's `adapter/`, a Hub id). `adapter:` says what becomes of an adapter:

    adapter:   on a plain model            on an adapter                 leaves as adapter/
    merge      all weights train, or       its base, the adapter         the fresh one, on what the
               a fresh adapter on them     merged in; then the same      stage started from
    continue   refused: there is none      the adapter trains on; LoRA   the one given, trained on,
                                           or QLoRA only                 on its own base
    new        a fresh adapter trains;     its base, the adapter         both in one, of the rank of
               LoRA or QLoRA only          merged in, a fresh adapter;   both, on the base of the
                                           LoRA or QLoRA only            one given

The KL reference is the policy that the stage starts from, always: without an adapter the same
directory opened again; under a fresh adapter the model below it; with `continue` a frozen copy of
the adapter, which TRL calls `ref`. Merging is done in the base's own precision, never in quantised
weights, and goes through a directory, because TRL opens a reference by the path of its policy.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chainforge.core.config import given
from chainforge.core.errors import InputError
from chainforge.core.options import truth
from chainforge.train.saving import KEPT
from chainforge.train.sources import REMADE_INITS, Source, find_source
from chainforge.train.trackers import asked_for, check_trackers


@dataclass
class PolicyArgs:
    """What becomes of adapters, and what a training stage keeps."""

    adapter: Literal["merge", "continue", "new"] = field(
        default="merge",
        metadata={
            "help": "Of an adapter that the stage is given. merge: it is merged into its base "
            "first. continue: it trains on. new: merged, and a fresh one trains on top."
        },
    )
    save: list[str] = field(
        default_factory=lambda: list(KEPT),
        metadata={"help": "What stays of `model`, `adapter` and `checkpoints`; all if left out."},
    )


@dataclass(frozen=True)
class Start:
    """How a stage's policy is opened; checked, and nothing loaded yet."""

    source: Source
    adapter: str
    save: tuple[str, ...]
    options: dict[str, Any]  # of `from_pretrained`
    quantization: Any = None
    lora: Any = None

    @property
    def reference(self) -> str:
        """The model as the user named it."""
        return self.source.reference

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer is."""
        return self.source.tokenizer

    @property
    def continues(self) -> bool:
        """Whether the given adapter itself trains on."""
        return self.adapter == "continue"

    @property
    def opened_here(self) -> bool:
        """Whether the model is opened before TRL gets it, and not by TRL."""
        return self.continues or self.quantization is not None

    @property
    def joins(self) -> bool:
        """Whether the given adapter and the fresh one are left as one."""
        return self.adapter == "new" and self.source.adapter is not None

    @property
    def lora_dropout(self) -> float:
        """The dropout of the adapter that trains."""
        if self.continues:
            return float(self.source.lora.get("lora_dropout") or 0)
        return float(self.lora.lora_dropout) if self.lora else 0.0

    @property
    def peft_config(self) -> Any:
        """The fresh adapter's configuration for TRL; None when none is to be made."""
        return None if self.continues else self.lora


def check_policy(args: PolicyArgs, training_args: Any, model_args: Any) -> Start:
    """See that a stage's model, its `adapter` and its method fit together, before anything loads.

    Turns dropout off where a KL reference is used. Raises `InputError`.
    """
    from trl.trainer.utils import get_peft_config, get_quantization_config

    asked = given(sys.argv[1:])
    check_trackers(asked_for(training_args.report_to))
    _check_method(args, model_args, asked)
    trust = bool(training_args.trust_remote_code)
    source = find_source(model_args.model_name_or_path, model_args.model_revision, trust)
    start = Start(
        source=source,
        adapter=args.adapter,
        save=tuple(args.save),
        options=model_options(model_args, training_args) | {"revision": source.revision},
        quantization=get_quantization_config(model_args),
        lora=get_peft_config(model_args),
    )
    if "quantization_config" in source.config:
        raise InputError(
            f"{source.model} is quantised already, and what is trained on it could not be merged; "
            "give the model it was made from, with load_in_4bit: true"
        )
    if start.continues:
        _check_continues(source, asked)
        _check_copied(source.lora, training_args, start.quantization)
    if start.joins:
        _check_joins(source.lora, start.lora)
    _check_head(source.lora if start.continues else start.lora and start.lora.to_dict())
    _settle_dropout(training_args, start.lora_dropout, source.config | start.options, asked)
    return start


def model_options(model_args: Any, training_args: Any) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained` that the recipe's settings ask for."""
    check_options("model_init_kwargs", training_args.model_init_kwargs)
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": training_args.trust_remote_code,
        "use_safetensors": True,
        **(training_args.model_init_kwargs or {}),
    }


def check_options(name: str, options: dict[str, Any] | None) -> None:
    """Raise `InputError` for options of `from_pretrained` that read other weights than checked."""
    for key in ("use_safetensors", "subfolder", "gguf_file", "transformers_weights"):
        if (options or {}).get(key) not in (None, True):
            raise InputError(
                f"{name}: {key} would open other weights than the model's own safetensors, which "
                "are the ones that were checked; leave it out"
            )


def _check_method(args: Any, model_args: Any, asked: dict[str, Any]) -> None:
    """Raise `InputError` for settings of a method that is not used, and for an empty `keep`."""
    quantised = model_args.load_in_4bit or model_args.load_in_8bit
    if quantised and not model_args.use_peft:
        raise InputError(
            "load_in_4bit: quantised weights cannot train; set use_peft: true (QLoRA), or leave "
            "the quantisation out"
        )
    if args.adapter != "merge" and not model_args.use_peft:
        raise InputError(
            f"adapter: {args.adapter} trains an adapter; set use_peft: true, or adapter: merge to "
            "train all weights"
        )
    idle = [key for key in asked if key.startswith("lora_") or key in ("use_dora", "use_rslora")]
    if idle and "use_peft" not in asked:
        raise InputError(f"{idle[0]} is given, but not use_peft: say use_peft: true, or false")
    targets = model_args.lora_target_modules or ()
    if listed := [name for name in (targets if isinstance(targets, list | tuple) else [targets])
                  if re.fullmatch(r"[\w.-]+(?:,\s*[\w.-]+)+", name)]:  # fmt: skip
        raise InputError(
            f"lora_target_modules: {listed[0]}: separate the names by blanks, in a YAML as a list: "
            f"[{', '.join(listed[0].replace(',', ' ').split())}]"
        )
    if odd := [name for name in args.save if name not in KEPT]:
        raise InputError(f"save: {odd[0]!r} is not one of: {', '.join(KEPT)}")
    left = {"model", "adapter"} if model_args.use_peft else {"model"}
    if not left & set(args.save):
        names = " or ".join(sorted(left))
        raise InputError(f"save: nothing of what is trained would stay; save {names}")


def _check_continues(source: Source, asked: dict[str, Any]) -> None:
    """Raise `InputError` unless there is an adapter, and settings leave it as it is."""
    if source.adapter is None:
        beside = Path(source.model).with_name("adapter")
        hint = f"give {beside}" if beside.is_dir() else "use adapter: merge"
        raise InputError(f"adapter: continue: {source.reference} is a plain model; {hint}")
    names = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
             "use_rslora": "use_rslora", "use_dora": "use_dora"}  # fmt: skip
    for key, name in names.items():
        if key in asked and asked[key] != source.lora.get(name):
            raise InputError(
                f"{key}: {asked[key]} is given, but the adapter that trains on has "
                f"{source.lora.get(name)}; leave {key} out"
            )


def _check_joins(given_one: dict[str, Any], fresh: Any) -> None:
    """Raise `InputError` for adapters that are more than two low-rank products to be joined."""
    for lora, whose in ((given_one, "the given"), (fresh.to_dict(), "the fresh")):
        odd = [name for name in ("use_dora", "modules_to_save", "trainable_token_indices",
                                 "target_parameters", "lora_bias") if lora.get(name)]  # fmt: skip
        odd += ["bias"] if lora.get("bias", "none") != "none" else []
        odd += ["init_lora_weights"] if lora.get("init_lora_weights") in REMADE_INITS else []
        if odd:
            raise InputError(
                f"adapter: new leaves both adapters as one, which {odd[0]} of {whose} one does "
                "not allow; use adapter: merge"
            )


def _check_copied(lora: dict[str, Any], training_args: Any, quantization: Any) -> None:
    """Raise `InputError` when an adapter cannot train on, or not beside its frozen copy."""
    beta = getattr(training_args, "beta", 0) if hasattr(training_args, "num_generations") else 0
    init = lora.get("init_lora_weights")
    if lora.get("trainable_token_indices"):
        raise InputError(
            "adapter: continue: TRL's trainers cannot train an adapter that has "
            "trainable_token_indices; use adapter: merge"
        )
    if init in REMADE_INITS and quantization is not None:
        raise InputError(
            f"adapter: continue: init_lora_weights {init} of the given adapter changes the base, "
            "which cannot be done to quantised weights; use adapter: merge"
        )
    odd = {"bias": lora.get("bias", "none") != "none", "init_lora_weights": init in REMADE_INITS}
    if beta and any(odd.values()):
        name = next(key for key, value in odd.items() if value)
        raise InputError(
            f"adapter: continue with beta {beta}: the KL reference would be a copy of the adapter, "
            f"and {name}: {lora[name]} changes the base below both; use adapter: merge, or beta: 0"
        )


def _check_head(lora: dict[str, Any] | None) -> None:
    """Raise `InputError` when the adapter that trains is on the head, as TRL's losses skip it."""
    for name in ("target_modules", "modules_to_save"):
        places = (lora or {}).get(name) or []
        if isinstance(places, str):
            found = bool(re.fullmatch(places, "lm_head"))  # as PEFT reads it
        else:
            found = any(place.rpartition(".")[2] == "lm_head" for place in places)
        if found:
            raise InputError(
                f"lora_{name}: lm_head: TRL computes its losses from the head's own weights, so an "
                "adapter on it would never train; leave lm_head out, or use adapter: merge for an "
                "adapter that has it"
            )


def _settle_dropout(
    training_args: Any, lora_dropout: float, config: dict[str, Any], asked: dict[str, Any]
) -> None:
    """Turn dropout off where there is a KL reference, or refuse it.

    With dropout a policy differs from its own copy, so that the KL would not measure the training.
    `config` is the model's, as it is opened.
    """
    from trl.trainer.grpo_config import GRPOConfig

    if not isinstance(training_args, GRPOConfig) or not training_args.beta:
        return
    if truth(asked.get("disable_dropout")) is False and lora_dropout:
        raise InputError(
            f"disable_dropout: false with lora_dropout {lora_dropout} and beta "
            f"{training_args.beta}: the KL would be one of dropout; leave disable_dropout out"
        )
    training_args.disable_dropout = True
    # Attention's own dropout is no module, so disable_dropout does not reach it.
    if rate := config.get("attention_dropout"):
        raise InputError(
            f"config.json: attention_dropout is {rate}, and with beta the KL would be one of "
            "dropout; set model_init_kwargs: {attention_dropout: 0.0}"
        )
