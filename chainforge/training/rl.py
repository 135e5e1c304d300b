"""What `grpo.py` takes beside TRL's own options, as one class to parse."""

from __future__ import annotations

from dataclasses import dataclass

from chainforge.data.sampling.engine import TemplateArgs
from chainforge.data.sampling.gate import GateArgs
from chainforge.data.sampling.harvest import HarvestArgs
from chainforge.training.dynamic import DynamicArgs
from chainforge.training.guards import GuardArgs
from chainforge.training.health import HealthArgs
from chainforge.training.heldout import HeldoutArgs


@dataclass
class RLArgs(GuardArgs, HealthArgs, HeldoutArgs, DynamicArgs, HarvestArgs, GateArgs,
             TemplateArgs):  # fmt: skip
    """Which prompts RL trains on, what it keeps and measures meanwhile, and when it stops."""
