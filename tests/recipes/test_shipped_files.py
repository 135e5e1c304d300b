"""Everything that ships is read as strictly as a user's own files."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from chainforge.chain.plan import plan_chain
from chainforge.chain.spec import TRAINING, load_chain
from chainforge.core.config import parse, read_yaml
from chainforge.data import sources as hub
from chainforge.data.datasets import DataArgs
from chainforge.data.filters import FilterArgs, SelectionArgs
from chainforge.data.tasks import TaskArgs
from chainforge.generate.build import BuildArgs
from chainforge.generate.rollouts import PoolArgs
from chainforge.generate.settings import SamplingArgs, TeacherArgs
from chainforge.rewards.reward import RewardArgs, check_overlong, load_rewards
from chainforge.train.checkpoints import check_save_steps
from chainforge.train.policy import PolicyArgs
from chainforge.train.rl_args import RLArgs
from chainforge.train.stage import RunArgs

ROOT = Path(__file__).parents[2]
CHAINS = sorted(
    [
        *ROOT.glob("recipes/*/chain.yaml"),
        ROOT / "recipes/quickstart/control.yaml",
        ROOT / "recipes/quickstart/distillation.yaml",
    ]
)


def dataclasses_of(recipe):
    from trl import DistillationConfig, GRPOConfig, ModelConfig, SFTConfig

    return {
        "collect": (RunArgs, TaskArgs, RewardArgs, TeacherArgs, SelectionArgs, FilterArgs),
        "sft": (DataArgs, PolicyArgs, SFTConfig, ModelConfig),
        "grpo": (TaskArgs, RewardArgs, RLArgs, PolicyArgs, GRPOConfig, ModelConfig),
        "reject": (
            RunArgs,
            TaskArgs,
            RewardArgs,
            SamplingArgs,
            PoolArgs,
            SelectionArgs,
            FilterArgs,
            BuildArgs,
        ),
        "distill": (TaskArgs, PolicyArgs, DistillationConfig, ModelConfig),
    }[recipe]


def evaluate_args():
    """What evaluate.py alone takes; it lives in the recipe."""
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "recipes/evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EvaluateArgs


@pytest.mark.parametrize("file", CHAINS, ids=lambda file: file.parent.name)
def test_every_chain_plans_and_every_stage_parses_as_planned(file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    steps = plan_chain(load_chain(file), tmp_path)
    assert {step.state for step in steps} == {"pending"}
    for step in steps:
        recipe = step.stage.recipe
        script = next(i for i, word in enumerate(step.command) if word.endswith(".py"))
        words = step.command[script + 1 :]
        if step.stage.kinds[0] == TRAINING:
            words += ["--use_cpu", "true", "--bf16", "false"]  # as there is no GPU here
        if recipe == "evaluate":
            parsed = parse(RunArgs, TaskArgs, evaluate_args(), SamplingArgs, argv=words)
        else:
            parsed = parse(*dataclasses_of(recipe), argv=words)
        for args in parsed:
            check_settings(args, {type(args): args for args in parsed})


OURS = [file for file in CHAINS if file.parent.name.startswith(("custom", "qwen", "smollm"))]


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.parent.name)
def test_a_model_recipe_says_only_what_differs_from_the_defaults(file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for step in plan_chain(load_chain(file), tmp_path):
        given = read_yaml(step.stage.config)
        known = (RunArgs, TaskArgs, evaluate_args(), SamplingArgs)
        if step.stage.recipe != "evaluate":
            known = dataclasses_of(step.stage.recipe)
        for one in (field for kind in known for field in dataclasses.fields(kind)):
            if one.name in given and "preset" not in given:  # a preset has defaults of its own
                assert given[one.name] != default_of(one), f"{step.stage.config}: {one.name}"


def default_of(field):
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default


def check_settings(args, others):
    """See what a recipe would, before it loads a model."""
    if isinstance(args, RewardArgs):
        rewards = load_rewards(args, {"answer", "verifier", "entry", "task", "id"})
        for training in others.values():
            if hasattr(training, "max_completion_length"):
                check_overlong(rewards, training.max_completion_length)
                check_save_steps(training)
    elif isinstance(args, SamplingArgs | SelectionArgs | TeacherArgs | FilterArgs):
        args.check()
    elif isinstance(args, TaskArgs):
        for task in args.tasks:
            assert task["fn"] != "hub" or task["params"]["dataset"] in hub.PRESETS


OWN_WORDS = re.compile(r"^(?!tasks|pairs|rewards|stages|set|models|name|base|seed|launch)(\w+):")


@pytest.mark.parametrize(
    "file",
    [path for path in sorted(ROOT.glob("recipes/*/*.yaml"))
     if path.parent.name.startswith(("custom", "qwen", "smollm"))],
    ids=lambda file: f"{file.parent.name}/{file.stem}",
)  # fmt: skip
def test_every_setting_of_a_model_recipe_says_why(file):
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ")
    for line in lines:
        assert not OWN_WORDS.match(line) or "#" in line, f"no reason: {line}"


@pytest.mark.parametrize("file", CHAINS, ids=lambda file: file.parent.name)
def test_every_recipe_folder_says_what_it_is(file):
    readme = (file.parent / "README.md").read_text()
    assert readme.startswith("# ")
    if file.parent.name.startswith(("qwen", "smollm")):
        for word in ("memory", "hours", "estimated", f"chainforge plan {file.parent.name}"):
            assert word in readme, word


PRESETS = {
    "r1-paper": {"learning_rate": 3e-6, "beta": 0.001, "epsilon": 10, "num_generations": 16},
    "modern": {"epsilon": 0.2, "epsilon_high": 0.28, "beta": 0, "loss_type": "dapo",
               "mask_truncated_completions": True},
    "dr-grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "vllm-colocate": {"use_vllm": True, "vllm_mode": "colocate", "vllm_enable_sleep_mode": True},
    "vllm-server": {"use_vllm": True, "vllm_mode": "server"},
}  # fmt: skip


@pytest.mark.parametrize("file", sorted(ROOT.glob("recipes/presets/*")), ids=lambda file: file.stem)
def test_every_preset_is_one_of_grpo_and_says_why(file):
    words = ["--preset", file.stem, "--use_cpu", "--bf16", "false"]
    parsed = parse(*dataclasses_of("grpo"), argv=words)
    rewards, training = parsed[1], parsed[-2]
    values = {key: getattr(training, key) for key in PRESETS[file.stem]}
    assert values == PRESETS[file.stem]
    check_save_steps(training)
    bound = load_rewards(rewards, {"answer", "verifier", "entry", "task", "id"})
    check_overlong(bound, training.max_completion_length)
    for line in file.read_text().splitlines():
        assert "#" in line or line[0] == " " or line == "rewards:", f"no reason: {line}"


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("accelerate_configs/*.yaml")), ids=lambda f: f.stem
)
def test_every_launch_file_is_one_of_accelerate(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes >= 1
    assert read_yaml(file)["num_machines"] == (2 if file.stem == "multi_node" else 1)


def test_the_launch_files_that_the_design_names_are_there():
    names = {file.stem for file in ROOT.glob("accelerate_configs/*.yaml")}
    assert names == {
        "cpu", "cpu_ddp", "single_gpu", "ddp", "fsdp2", "zero2", "zero3", "multi_node"
    }  # fmt: skip
