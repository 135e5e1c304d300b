"""TRL's configurations of a training stage as one mapping, as the checks read them."""

import dataclasses

NAMES = {"sft": "SFTConfig", "grpo": "GRPOConfig", "distill": "DistillationConfig"}


def settings_of(recipe, given):
    """Return TRL's settings with its defaults, built for the CPU, then with `given` in force."""
    import trl

    model = {field.name for field in dataclasses.fields(trl.ModelConfig)}
    mine = {key: value for key, value in given.items() if key in model}
    rest = {key: value for key, value in given.items() if key not in model | {"use_cpu"}}
    training = getattr(trl, NAMES[recipe])(output_dir="out", use_cpu=True, **rest)
    settings = vars(training) | vars(trl.ModelConfig())
    return settings | {"use_cpu": given.get("use_cpu", False)} | mine
