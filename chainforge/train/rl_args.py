"""The settings of `recipes/grpo.py` that TRL does not have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from chainforge.generate.rollouts import GateArgs
from chainforge.generate.settings import TemplateArgs


@dataclass
class RLArgs(GateArgs, TemplateArgs):
    """Which prompts RL trains on, what it saves and measures, and when it stops."""

    log_rollouts: bool = field(
        default=True,
        metadata={"help": "Save every completion with its rewards in rollouts.jsonl."},
    )
    max_zero_advantage_steps: int = field(
        default=30,
        metadata={
            "help": "End the stage after this many steps in a row in which all completions of "
            "every group have the same reward. The stage fails, unless the reward is as high as "
            "before: then nothing is left to learn, and the stage is done. 0: never."
        },
    )
    health: Literal["warn", "stop", "off"] = field(
        default="warn", metadata={"help": "Action when a health rule fires."}
    )
    heldout_size: int = field(
        default=0,
        metadata={
            "help": "Number of rows of the tasks' validation split on which accuracy is measured "
            "during training, every eval_steps (default: save_steps); 0: none. With 100 rows a "
            "difference of ten points is visible."
        },
    )
    keep_best: bool = field(
        default=False,
        metadata={
            "help": "Make the checkpoint with the best held-out accuracy the stage's model instead "
            "of the last one; of equal ones the earlier."
        },
    )
