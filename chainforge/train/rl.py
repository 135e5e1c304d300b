"""What `grpo.py` takes beside TRL's own options, as one class to parse."""

from __future__ import annotations

from dataclasses import dataclass

from chainforge.generate.engine import TemplateArgs
from chainforge.generate.gate import GateArgs
from chainforge.generate.harvest import HarvestArgs
from chainforge.train.dynamic import DynamicArgs
from chainforge.train.guards import GuardArgs
from chainforge.train.health import HealthArgs
from chainforge.train.heldout import HeldoutArgs


@dataclass
class RLArgs(GuardArgs, HealthArgs, HeldoutArgs, DynamicArgs, HarvestArgs, GateArgs,
             TemplateArgs):  # fmt: skip
    """Which prompts RL trains on, what it keeps and measures meanwhile, and when it stops."""
