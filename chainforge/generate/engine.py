"""How to sample from a policy: the parameters, what is drawn, and who draws it.

Every sample has a seed of its own, made of the run's seed, the prompt and the sample's number. So
what is drawn does not depend on what it is drawn beside: a run that was cut, or that several
processes share, draws the same as one that was not, up to the rounding of another batch shape.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row
from chainforge.generate.endpoint import check_extra_body, read_address

# The settings by the fields of a request that they set.
SETTINGS = {"model": "served_model", "max_tokens": "max_new_tokens", "n": "num_samples",
            "temperature": "temperature", "top_p": "top_p", "seed": "seed"}  # fmt: skip


@dataclass
class TemplateArgs:
    """How messages become text."""

    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "A .jinja file, or a tokenizer's directory or Hub id, whose chat template is "
            "used instead of the model's own."
        },
    )


@dataclass
class SamplingArgs(TemplateArgs):
    """How to sample. Nothing is inherited from the model's own generation config."""

    engine: Literal["transformers", "vllm", "api"] = field(
        default="transformers",
        metadata={
            "help": "transformers: here, in batches that are refilled. vllm: here, if installed. "
            "api: OpenAI-compatible servers, see base_url."
        },
    )
    num_samples: int = field(default=8, metadata={"help": "Completions of each prompt."})
    max_samples: int | None = field(
        default=None,
        metadata={
            "help": "Sample in rounds, until a prompt has `max_per_prompt` accepted completions or "
            "so many in all; `num_samples` is not used then."
        },
    )
    round_size: int = field(
        default=4, metadata={"help": "Completions of a prompt in one round, with max_samples."}
    )
    max_failed_samples: int | None = field(
        default=None,
        metadata={
            "help": "Leave a prompt alone after so many completions without an accepted one, with "
            "max_samples. Saves tokens; what it costs are rows of the hardest prompts."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "0 takes the likeliest token."})
    top_p: float = field(default=1.0, metadata={"help": "Share of the probability kept; 1: all."})
    top_k: int = field(default=0, metadata={"help": "Number of likeliest tokens kept; 0: all."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest completion, in tokens."})
    generation_batch_size: int = field(
        default=64, metadata={"help": "Completions that are generated at once."}
    )
    engine_options: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "vllm: further arguments of `vllm.LLM`, such as tensor_parallel_size."},
    )
    base_url: list[str] | str = field(
        default_factory=list,
        metadata={"help": "api: address of the server, or of each of several that share the work."},
    )
    served_model: str | None = field(
        default=None,
        metadata={"help": "api: the policy's name at the server; model_name_or_path if left out."},
    )
    extra_body: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "api: further fields of a request. Left out: min_p 0, repetition_penalty 1 and "
            "top_k, so that vLLM and SGLang take nothing from the model's generation config; "
            "{} for a server that does not know these."
        },
    )
    max_concurrency: int = field(
        default=256, metadata={"help": "api: most requests at a time; the number is found below."}
    )
    timeout: float = field(default=1800.0, metadata={"help": "api: seconds for one request."})
    max_retries: int = field(default=8, metadata={"help": "api: retries of a passing error."})
    retry_wait: float = field(
        default=1.0, metadata={"help": "api: seconds before the first retry, doubled each time."}
    )
    outage_timeout: float = field(
        default=600.0,
        metadata={"help": "api: seconds without any answer before the servers count as gone."},
    )

    @property
    def adaptive(self) -> bool:
        """Whether prompts are sampled in rounds until they have enough."""
        return self.max_samples is not None

    @property
    def most(self) -> int:
        """The most samples of one prompt."""
        return self.num_samples if self.max_samples is None else self.max_samples

    def parameters(self) -> Row:
        """Return what a completion was sampled with, for its row."""
        names = ("temperature", "top_p", "top_k", "max_new_tokens")
        return {"engine": self.engine} | {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """Raise `InputError` for values that nothing can be sampled with."""
        least = {"num_samples": 1, "max_new_tokens": 1, "generation_batch_size": 1, "round_size": 1,
                 "max_samples": 1, "max_failed_samples": 1, "max_concurrency": 1,
                 "max_retries": 0}  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise InputError(f"{name}: expected {bound} or more, found {value}")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature: expected 0 or more, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: expected above 0 and at most 1, found {self.top_p}")
        if self.top_k < 0:
            raise InputError(f"top_k: expected 0 (all) or more, found {self.top_k}")
        if self.temperature == 0 and self.most > 1:
            name = "max_samples" if self.adaptive else "num_samples"
            raise InputError(
                f"temperature: 0 would give the same completion {self.most} times; "
                f"set `{name}: 1` or a temperature above 0"
            )
        if self.max_failed_samples is not None and self.max_samples is None:
            raise InputError("max_failed_samples: goes with max_samples, which is not set")
        if self.engine == "api" and self.chat_template_path:
            raise InputError("chat_template_path: with `engine: api` the server has the template")
        if (self.engine == "api") != bool(self.base_url):
            raise InputError("base_url: goes with `engine: api`, and `engine: api` needs one")
        for url in [self.base_url] if isinstance(self.base_url, str) else self.base_url:
            read_address(url)
        check_extra_body(self.extra_body, SETTINGS)


@dataclass(frozen=True)
class Draw:
    """One completion to sample: the `sample`-th of a row's prompt, with its own seed."""

    row: Row
    sample: int
    seed: int


# A draw, with `completion` (text without the end token), `tokens` (generated ones, the end token
# included), `finish_reason` (`stop`, `length`, or why there is no completion), and what more the
# engine knows of it.
Drawn = tuple[Draw, Row]
Take = Callable[[list[Drawn]], None]


class Engine(Protocol):
    """Who samples."""

    tokenizer: Any  # None where the policy's tokenizer is not here

    def sample(self, draws: Sequence[Draw], take: Take) -> None:
        """Sample every draw once, and hand them over as they are done, in any order.

        `take` is called from one thread at a time, not always this one, and what it was given is
        safe once it returns. Raises `InputError` for a prompt that cannot be sampled from, and
        when not every draw was made.
        """
        ...


def seed_of(seed: int, identity: str, sample: int) -> int:
    """Derive a sample's seed, the same in every process and Python."""
    content = f"{seed}/{identity}/{sample}"
    return int(hashlib.sha256(content.encode()).hexdigest()[:15], 16) % 2**31


def open_engine(
    args: SamplingArgs,
    policy: str,
    tokenizer: Any,
    *,
    dtype: str = "auto",
    directory: Path | None = None,
) -> Engine:
    """Open the engine that `engine` names on a policy; `directory` is for its accounts.

    Only that engine's libraries are imported.
    """
    args.check()
    if args.engine == "vllm":
        from chainforge.generate.vllm_engine import VllmEngine

        return VllmEngine(args, policy, tokenizer, dtype)
    if args.engine == "api":
        from chainforge.generate.api_engine import ApiEngine

        return ApiEngine(args, policy, tokenizer, directory or Path())
    from chainforge.generate.local_engine import LocalEngine, open_policy

    return LocalEngine(open_policy(policy, dtype=dtype), tokenizer, args)


def ends_of(reference: str, **options: Any) -> set[int]:
    """Return the ids at which a model's own generation config ends; none when it has none."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(reference, **options).eos_token_id
    except OSError:
        return set()
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}
