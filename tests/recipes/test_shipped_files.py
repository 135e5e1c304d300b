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
from chainforge.rewards.scoring import RewardArgs, load_rewards
from chainforge.training.stage import RunArgs

ROOT = Path(__file__).parents[2]
CHAINS = sorted(ROOT.glob("recipes/*/chain.yaml"))


def dataclasses_of(recipe):
    from trl import DistillationConfig, GRPOConfig, ModelConfig, SFTConfig

    return {
        "collect": (RunArgs, TaskArgs, RewardArgs, TeacherArgs, SelectionArgs),
        "sft": (DataArgs, SFTConfig, ModelConfig),
        "grpo": (TaskArgs, RewardArgs, GateArgs, HarvestArgs, GRPOConfig, ModelConfig),
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
        "distill": (TaskArgs, DistillationConfig, ModelConfig),
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
    assert names == {"cpu", "single_gpu", "ddp", "fsdp2", "zero2", "zero3", "multi_node"}
