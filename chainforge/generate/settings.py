"""The settings of stage 0: whom to ask, for what, how hard, and what it may cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from chainforge.core.errors import InputError
from chainforge.generate.endpoint import address_of, check_extra_body
from chainforge.generate.validation import ValidationArgs, check_settings


@dataclass
class TeacherArgs(ValidationArgs):
    """Whom to ask, and how. Keys come from the environment: DEEPSEEK_API_KEY, OPENAI_API_KEY."""

    teacher: Literal["offline", "deepseek", "openai"] = field(
        default="offline",
        metadata={
            "help": "offline: worked solutions from the data set's own metadata. deepseek: the "
            "DeepSeek API. openai: any OpenAI-compatible server, see base_url."
        },
    )
    model: str | None = field(
        default=None, metadata={"help": "Model to ask for; deepseek-flash when left out."}
    )
    base_url: str | None = field(
        default=None, metadata={"help": "Address of the server, such as http://localhost:8000/v1."}
    )
    samples_per_prompt: int = field(default=1, metadata={"help": "Answers to each prompt."})
    until_correct: int | None = field(
        default=None,
        metadata={"help": "Stop asking for a prompt once so many of its answers are right."},
    )
    instruction: str = field(
        default="Think step by step. Then reply with the final answer only.",
        metadata={
            "help": "System turn that an API teacher gets in place of the prompt's own, which "
            "asks for tags that are ours to write. An empty string: none."
        },
    )
    max_tokens: int = field(
        default=32_768,
        metadata={
            "help": "Limit of one answer, its reasoning included; an answer that it cuts off is "
            "asked for once more with twice as many."
        },
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Sent only when given; DeepSeek's thinking ignores it."}
    )
    extra_body: dict[str, Any] | None = field(
        default=None, metadata={"help": "Further fields of the request, as the server wants them."}
    )
    fallback: Literal["none", "offline"] = field(
        default="none",
        metadata={
            "help": "What stands in for a request that failed: nothing, or a worked solution "
            "labelled offline-fallback, which SFT refuses unless allow_offline_rows."
        },
    )
    styles: dict[str, float] = field(
        default_factory=lambda: {"careful": 0.5, "hasty": 0.5},
        metadata={"help": "Share of each style among the offline teacher's solutions."},
    )
    # What follows changes how and at what cost answers are fetched, not what they are: it may
    # be changed between runs (`chainforge.core.artifacts.FREE_KEYS`).
    max_usd: float | None = field(
        default=None,
        metadata={"help": "Stop, to be resumed, before spending more; all runs count together."},
    )
    max_tokens_total: int | None = field(
        default=None, metadata={"help": "The same for tokens, of prompts and answers."}
    )
    max_requests: int | None = field(
        default=None, metadata={"help": "The same for requests, those that failed included."}
    )
    prices: str | None = field(
        default=None,
        metadata={"help": "A price table of your own; its form: chainforge/generate/prices.yaml"},
    )
    expected_tokens: int = field(
        default=6000,  # DeepSeek-R1, table 5: 6,094 on average for mathematics
        metadata={"help": "Tokens of an answer, for the estimate of dry_run."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print what it would cost, ask nothing, leave nothing."}
    )
    max_concurrency: int | None = field(
        default=None,
        metadata={
            "help": "Most requests at a time; below it the number is found by trying. When left "
            "out, 500 at DeepSeek and 64 elsewhere."
        },
    )
    timeout: float = field(default=1800.0, metadata={"help": "Seconds for one request in all."})
    max_retries: int = field(default=8, metadata={"help": "Times that a passing error is retried."})
    retry_wait: float = field(
        default=1.0, metadata={"help": "Seconds before the first retry, doubled for each further."}
    )
    max_retry_after: float = field(
        default=600.0, metadata={"help": "Most seconds that a server's Retry-After is obeyed."}
    )
    outage_timeout: float = field(
        default=600.0,
        metadata={"help": "Seconds that nothing at all may work before the server counts as gone."},
    )
    shutdown_timeout: float = field(
        default=120.0,
        metadata={"help": "Seconds that Ctrl-C waits for answers under way; a second one, none."},
    )

    def ceiling(self) -> int:
        """Return the most requests at a time."""
        return self.max_concurrency or (500 if self.teacher == "deepseek" else 64)


def check(args: TeacherArgs) -> None:
    """Raise `InputError` for settings that can mean nothing."""
    least = {"samples_per_prompt": 1, "until_correct": 1, "max_tokens": 1, "max_retries": 0,
             "max_concurrency": 1, "expected_tokens": 1, "retry_wait": 0, "max_retry_after": 0,
             "outage_timeout": 0, "shutdown_timeout": 0, "min_reasoning_chars": 1}  # fmt: skip
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not value >= bound:
            raise InputError(f"{name}: expected {bound} or more, found {value}")
    if not args.timeout > 0:
        raise InputError(f"timeout: expected more than 0 seconds, found {args.timeout}")
    if args.until_correct and args.until_correct > args.samples_per_prompt:
        raise InputError(
            f"until_correct ({args.until_correct}) can never be reached with samples_per_prompt "
            f"{args.samples_per_prompt}: raise that"
        )
    for name in ("model", "instruction"):
        try:
            (getattr(args, name) or "").encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name}: not valid text: {error.reason}") from None
    if args.teacher != "offline":
        address_of(args)
    check_extra_body(args.extra_body)
    check_settings(args)
