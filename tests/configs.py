"""The recipes as modules, and TRL's configurations of a stage as one mapping."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"

NAMES = {
    "sft": "SFTConfig",
    "dpo": "DPOConfig",
    "grpo": "GRPOConfig",
    "distill": "DistillationConfig",
}


def settings_of(recipe, given):
    """Return TRL's settings with its defaults, built for the CPU, then with `given` in force."""
    import trl

    model = {field.name for field in dataclasses.fields(trl.ModelConfig)}
    mine = {key: value for key, value in given.items() if key in model}
    rest = {key: value for key, value in given.items() if key not in model | {"use_cpu"}}
    training = getattr(trl, NAMES[recipe])(output_dir="out", use_cpu=True, **rest)
    settings = vars(training) | vars(trl.ModelConfig())
    return settings | {"use_cpu": given.get("use_cpu", False)} | mine


def recipe(name):
    """Return a recipe as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
