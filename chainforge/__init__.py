"""ChainForge: the whole DeepSeek-R1 recipe from one YAML file, on TRL."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["load_samples", "plan", "report", "results", "run"]


def __getattr__(name: str) -> Any:
    """Import the functions for Python only when asked: the command line must answer at once."""
    if name not in __all__:
        raise AttributeError(f"module 'chainforge' has no attribute {name!r}")
    module = import_module("chainforge.report" if name == "report" else "chainforge.api")
    return module if name == "report" else getattr(module, name)
