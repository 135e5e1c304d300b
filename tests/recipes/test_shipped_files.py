"""Everything that ships is read as strictly as a user's own files."""

from pathlib import Path

import pytest

from chainforge.core.config import parse, read_yaml
from chainforge.data.collection.teacher import TeacherArgs
from chainforge.data.datasets import DataArgs
from chainforge.data.sampling.engine import SamplingArgs
from chainforge.data.sampling.gate import GateArgs
from chainforge.data.sampling.harvest import HarvestArgs, PoolArgs
from chainforge.data.selection.builder import BuildArgs
from chainforge.data.selection.filters import FilterArgs
from chainforge.data.selection.rejection import SelectionArgs
from chainforge.data.tasks import TaskArgs
from chainforge.pipeline.chain import load_chain
from chainforge.pipeline.plan import plan_chain
from chainforge.rewards.scoring import RewardArgs, check_overlong, load_rewards
from chainforge.training.checkpoints import check_save_steps
from chainforge.training.dynamic import DynamicArgs
from chainforge.training.health import HealthArgs
from chainforge.training.heldout import HeldoutArgs
from chainforge.training.methods import PolicyArgs
from chainforge.training.stage import RunArgs

ROOT = Path(__file__).parents[2]
CHAINS = sorted(ROOT.glob("recipes/*/chain.yaml"))


def dataclasses_of(recipe):
    from trl import DistillationConfig, GRPOConfig, ModelConfig, SFTConfig

    return {
        "collect": (RunArgs, TaskArgs, RewardArgs, TeacherArgs, SelectionArgs),
        "sft": (DataArgs, PolicyArgs, SFTConfig, ModelConfig),
        "grpo": (
            TaskArgs,
            RewardArgs,
            GateArgs,
            HarvestArgs,
            DynamicArgs,
            HeldoutArgs,
            HealthArgs,
            PolicyArgs,
            GRPOConfig,
            ModelConfig,
        ),
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


@pytest.mark.parametrize("file", CHAINS, ids=lambda file: file.parent.name)
def test_every_chain_plans_and_every_stage_parses(file, tmp_path):
    chain = load_chain(file)
    steps = plan_chain(chain, tmp_path)
    assert {step.state for step in steps} == {"to run"}
    for stage in chain.stages:
        if stage.recipe == "evaluate":
            continue  # its dataclass lives in the recipe, and tests/recipes/test_stages.py runs it
        parsed = parse(*dataclasses_of(stage.recipe), argv=["--config", str(stage.config)])
        for args in parsed:
            if isinstance(args, RewardArgs):
                load_rewards(args, {"answer", "verifier", "entry", "task", "id"})


PRESETS = {
    "r1-paper": {"learning_rate": 3e-6, "beta": 0.001, "epsilon": 10, "num_generations": 16},
    "modern": {"epsilon": 0.2, "epsilon_high": 0.28, "beta": 0, "loss_type": "dapo",
               "mask_truncated_completions": True},
    "dr-grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
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
