"""The settings of `recipes/grpo.py` that TRL does not have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from chainforge.generate.rollouts import GateArgs


@dataclass
class RLArgs(GateArgs):
    """Which prompts RL trains on, what it saves and measures, and when it stops."""

    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "A .jinja file, or a tokenizer's directory or Hub id, whose chat template is "
            "used instead of the model's own."
        },
    )
    log_rollouts: bool = field(
        default=True,
        metadata={"help": "Save every completion with its rewards in rollouts.jsonl."},
    )
    max_zero_advantage_steps: int = field(
        default=30,
        metadata={
            "help": "End the stage after this many steps in a row without a learning signal: in "
            "every group all completions have the same reward, or every completion reaches "
            "max_completion_length. The stage fails, unless the reward is as high as before: then "
            "nothing is left to learn, and the stage is done. 0: never."
        },
    )
    health: Literal["warn", "stop", "off"] = field(
        default="warn", metadata={"help": "Action when a health rule fires."}
    )
    health_rules: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "An action or a limit for a rule, such as {truncated: stop, kl_growth: 1.0}. "
            "Rules: truncated, zero_advantage, entropy_collapse, kl_growth."
        },
    )
    heldout_size: int = field(
        default=0,
        metadata={
            "help": "Number of rows of the tasks' validation split on which accuracy is measured "
            "during training; 0: none. With 100 rows a difference of ten points is visible."
        },
    )
    heldout_steps: int | None = field(
        default=None,
        metadata={"help": "Measure after this many steps, and at the end; default: save_steps."},
    )
    keep_best: bool = field(
        default=False,
        metadata={
            "help": "Make the checkpoint with the best held-out accuracy the stage's model instead "
            "of the last one; of equal ones the earlier."
        },
    )
