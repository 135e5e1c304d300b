"""Settings of all stages that sample, from a policy or from a teacher, and what one draw is."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from chainforge.core.config import check_ranges
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row

logger = logging.getLogger(__name__)

_LONGEST = 256  # prompts that are tokenised: the longest in characters
KEYS = {"deepseek": "DEEPSEEK_API_KEY", "openai": "OPENAI_API_KEY"}


@dataclass
class RunArgs:
    """Output, seed and model of a stage that does not train."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Directory of the stage; everything it writes is in it."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of all random numbers."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The policy: a directory or a Hub id."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Precision of the policy: auto (as saved), float32, bfloat16, float16."},
    )


@dataclass
class TemplateArgs:
    """How messages become text."""

    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "A .jinja file, or a tokenizer's directory or Hub id, whose chat template is "
            "used instead of the model's own; or chatml, for a model without one."
        },
    )


@dataclass
class RequestArgs:
    """How many completions each prompt gets, and how servers are asked for them."""

    num_samples: int = field(default=1, metadata={"help": "Completions of each prompt."})
    max_samples: int | None = field(
        default=None,
        metadata={"help": "Sample in rounds up to this, until max_per_prompt are accepted."},
    )
    round_size: int = field(default=4, metadata={"help": "Completions of a prompt in one round."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest completion, in tokens."})
    temperature: float | None = field(default=None, metadata={"help": "Sampling temperature."})
    base_url: list[str] | str = field(
        default_factory=list,
        metadata={"help": "Address of the server, or of several that share the work."},
    )
    extra_body: dict[str, Any] | None = field(
        default=None, metadata={"help": "Further fields of each request."}
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Arguments of the chat template, as enable_thinking; servers get them."},
    )
    # The settings below change how requests are sent, not what they are, and may change between
    # runs of a stage (`FREE_KEYS` in `chainforge.core.artifacts`).
    max_concurrency: int | None = field(
        default=None, metadata={"help": "Most requests at a time; the number adapts below."}
    )
    timeout: float = field(default=1800.0, metadata={"help": "Seconds for one request in all."})
    max_retries: int = field(default=8, metadata={"help": "Retries of a transient error."})
    outage_timeout: float = field(
        default=600.0, metadata={"help": "Seconds without any answer before the run stops."}
    )

    @property
    def adaptive(self) -> bool:
        """Return whether prompts are sampled in rounds until they have enough."""
        return self.max_samples is not None

    @property
    def most(self) -> int:
        """Return the most samples of one prompt."""
        return self.num_samples if self.max_samples is None else self.max_samples

    @property
    def urls(self) -> list[str]:
        """Return the addresses of the servers."""
        given = [self.base_url] if isinstance(self.base_url, str) else self.base_url
        return [read_address(url) for url in given]

    @property
    def template_fields(self) -> Row:
        """Return the field of a request with the arguments of the chat template, if any."""
        given = self.chat_template_kwargs
        return {"chat_template_kwargs": given} if given else {}

    def check(self) -> None:
        """Raise `InputError` for values out of their bounds, and for what cannot be asked."""
        check_ranges(self)  # a judge's were not parsed
        for name in sorted(RESERVED.intersection(self.extra_body or ())):
            raise InputError(
                f"extra_body: {name!r} changes what is asked for or what it may cost; use "
                "ChainForge's own setting for it, such as max_new_tokens or num_samples"
            )
        _ = self.urls


# Fields of a request that a setting sets, or that make it cost more than is counted.
_RESERVED = (
    "model models messages prompt max_tokens max_completion_tokens n max_output_tokens best_of "
    "temperature seed stream stream_options tools web_search_options plugins service_tier"
)
RESERVED = frozenset(_RESERVED.split())


@dataclass
class SamplingArgs(TemplateArgs, RequestArgs):
    """How to sample from a policy. Nothing is inherited from the model's generation config."""

    engine: Literal["transformers", "vllm", "api"] = field(
        default="transformers",
        metadata={
            "help": "transformers or vllm, in this process; api: the OpenAI-compatible servers at "
            "base_url."
        },
    )
    num_samples: int = field(default=8, metadata={"help": "Completions of each prompt."})
    temperature: float = field(default=1.0, metadata={"help": "0 takes the likeliest token."})
    top_p: float = field(default=1.0, metadata={"help": "Share of the probability kept; 1: all."})
    top_k: int = field(default=0, metadata={"help": "Number of likeliest tokens kept; 0: all."})
    generation_batch_size: int = field(
        default=64, metadata={"help": "transformers: completions generated at once."}
    )
    engine_options: dict[str, Any] | None = field(
        default=None, metadata={"help": "vllm: further arguments of vllm.LLM."}
    )
    served_model: str | None = field(
        default=None, metadata={"help": "api: name at the server; default model_name_or_path."}
    )
    extra_body: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "api: further fields of a request; default: min_p, repetition_penalty and "
            "top_k, so that the model's generation config changes nothing; {}: none of them."
        },
    )

    def parameters(self) -> Row:
        """Return the sampling parameters that every row records."""
        names = ("temperature", "top_p", "top_k", "max_new_tokens")
        return {"engine": self.engine} | {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """Raise `InputError` for values that nothing can be sampled with."""
        super().check()
        if self.temperature == 0 and self.most > 1:
            name = "max_samples" if self.adaptive else "num_samples"
            raise InputError(
                f"temperature: 0 would give the same completion {self.most} times; "
                f"set `{name}: 1` or a temperature above 0"
            )
        if self.engine == "api" and self.chat_template_path:
            raise InputError("chat_template_path: with `engine: api` the server has the template")
        if (self.engine == "api") != bool(self.urls):
            raise InputError("base_url: goes with `engine: api`, and `engine: api` needs one")


@dataclass
class TeacherArgs(RequestArgs):
    """Which teacher to ask, and how. Keys: DEEPSEEK_API_KEY, OPENAI_API_KEY (environment only)."""

    teacher: Literal["offline", "deepseek", "openai"] = field(
        default="offline",
        metadata={
            "help": "offline: solutions made from the data set's own metadata. deepseek: its API. "
            "openai: any OpenAI-compatible server, see base_url."
        },
    )
    model: str | None = field(
        default=None, metadata={"help": "Model to ask for; deepseek-flash by default."}
    )
    instruction: str = field(
        default="Think step by step. Then reply with the final answer only.",
        metadata={
            "help": "System turn that an API teacher gets instead of the prompt's own, which asks "
            "for tags that ChainForge writes itself. An empty string: none."
        },
    )
    max_new_tokens: int = field(
        default=32_768, metadata={"help": "Limit of one answer, its reasoning included."}
    )
    fallback: Literal["none", "offline"] = field(
        default="none",
        metadata={
            "help": "offline: replace an answer whose request failed by a worked solution "
            "labelled offline-fallback, which SFT refuses unless allow_offline_rows."
        },
    )
    styles: dict[str, float] = field(
        default_factory=lambda: {"careful": 0.5, "hasty": 0.5},
        metadata={"help": "Share of each style among the offline teacher's solutions."},
    )
    max_usd: float | None = field(
        default=None, metadata={"help": "Stop before all runs together spend more; resumable."}
    )
    max_tokens_total: int | None = field(
        default=None, metadata={"help": "The same for tokens, prompts and answers."}
    )
    max_requests: int | None = field(
        default=None, metadata={"help": "The same for requests, failed ones included."}
    )
    prices: str | None = field(
        default=None, metadata={"help": "Your own price table, like generate/prices.yaml."}
    )
    # DeepSeek-R1, table 5: 6,094 on average for mathematics.
    expected_tokens: int = field(default=6000, metadata={"help": "dry_run: tokens of an answer."})
    dry_run: bool = field(
        default=False, metadata={"help": "Print the estimated cost, and send nothing."}
    )

    def check(self) -> None:
        """Raise `InputError` for values that no teacher can be asked with."""
        super().check()
        if self.teacher == "openai" and not self.model:
            raise InputError("teacher openai: set `model` to the model to ask for")


def read_address(text: str) -> str:
    """Return a `base_url` as requests need it; raise `InputError` for what is no address.

    An address that contains a password is refused, and not repeated.
    """
    address = text.strip().rstrip("/").removesuffix("/chat/completions")
    if any(sign in address for sign in "@?#"):
        raise InputError(
            "base_url: leave user, password and parameters out of the address; a key is read from "
            f"the environment ({' or '.join(KEYS.values())})"
        )
    try:
        url = urlsplit(address)
        good = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        good = False
    if not good or address != "".join(address.split()):
        raise InputError(
            f"base_url: expected an address such as http://localhost:8000/v1, found {address!r}"
        )
    return address


@dataclass(frozen=True)
class Draw:
    """One completion to sample: the `sample`-th of a row's prompt, with its own seed."""

    row: Row
    sample: int
    seed: int


# A draw with the columns that the engine knows: `completion` (text without the end token), `tokens`
# (generated ones, the end token included), `finish_reason` (`stop` or `length`) and others. Without
# an answer `completion` is None, and `class`, `message` and `rejected` (not to be asked again) say
# why.
Drawn = tuple[Draw, Row]
# Called from one thread at a time; what it was given is on disk once it returns.
Take = Callable[[list[Drawn]], None]


def digest(value: Any) -> str:
    """Return the hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def seed_of(seed: int, identity: str, sample: int) -> int:
    """Derive a sample's seed, the same in every process and Python.

    So a sample does not depend on the others in its batch, run or process, up to the rounding of
    another batch shape.
    """
    content = f"{seed}/{identity}/{sample}"
    return int(hashlib.sha256(content.encode()).hexdigest()[:15], 16) % 2**31


def ends_of(reference: str, **options: Any) -> set[int]:
    """Return the EOS ids of a model's own generation config; none when it has none."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(reference, **options).eos_token_id
    except OSError:
        return set()
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}


def config_of(model: str) -> dict[str, Any]:
    """Return the configuration of a local or cached model; empty if there is none here."""
    from transformers import PretrainedConfig

    try:
        return dict(PretrainedConfig.get_config_dict(model, local_files_only=True)[0])
    except (OSError, ValueError):
        return {}


def check_prompts(
    tokenizer: Any, rows: Sequence[Row], model: str, limit: int | None, key: str
) -> int:
    """Return the tokens of the longest prompt; raise `InputError` if it fills the model's context.

    `limit` is the longest completion, as the setting `key` has it. A completion that may not fit
    after the longest prompt is a warning.
    """
    prompts = sorted((row["prompt"] for row in rows), key=lambda turns: len(str(turns)))
    prompts = prompts[-_LONGEST:]
    made = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)
    tokens = max(len(ids) for ids in made["input_ids"])
    config = config_of(model)
    context = config.get("text_config", config).get("max_position_embeddings")
    if context and tokens >= context:
        raise InputError(
            f"prompts have up to {tokens} tokens, and the context of {model} is {context}: there "
            "is no room for a completion, and TRL cuts no prompt; leave them out"
        )
    if context and tokens + (limit or 0) > context:
        logger.warning("%s: %s tokens do not fit after the longest prompt (%d): write %s: %d",
                       key, limit, tokens, key, context - tokens)  # fmt: skip
    return tokens
