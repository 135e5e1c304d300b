"""Everything that ships is read as strictly as a user's own files."""

import dataclasses
import re
from pathlib import Path

import configs
import pytest
import yaml

from chainforge.chain.plan import plan_chain
from chainforge.chain.spec import load_chain
from chainforge.core.config import parse, read_yaml
from chainforge.core.transcript import DEFAULT, tags_of
from chainforge.data.sources import PRESETS as QUESTIONS
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.report.gates import METRICS, read_gates
from chainforge.rewards.reward import RewardArgs, check_overlong, load_rewards
from chainforge.train.checkpoints import check_saving

ROOT = Path(__file__).parents[2]
CHAINS = sorted(ROOT.glob("recipes/*/chain.yaml"))
OTHERS = ("control", "distillation", "dpo", "general")
CHAINS += [ROOT / f"recipes/quickstart/{name}.yaml" for name in OTHERS]
CHAINS.append(ROOT / "docs/original/chain.yaml")
OURS = [file for file in CHAINS if file.parent.name.startswith(("custom", "qwen", "smollm"))]
MIXED = re.compile(r"add to `set`:\n((?:    #.*\n)+)")
EVALS = sorted(ROOT.glob("recipes/evals/*.yaml"))


def checked(recipe, words):
    """Parse settings as a recipe does, and check what needs no model."""
    on_cpu = ["--use_cpu", "true", "--bf16", "false"]
    trains = recipe in ("sft", "dpo", "grpo", "distill")
    parsed = parse(*configs.recipe(recipe).CONFIGS, argv=[*words, *(on_cpu if trains else [])])
    by_type = {type(args).__name__: args for args in parsed}
    for task in by_type["TaskArgs"].tasks if "TaskArgs" in by_type else ():
        assert task["fn"] != "hub" or task["params"]["dataset"] in QUESTIONS
    if "RewardArgs" in by_type:
        rewards = load_rewards(by_type["RewardArgs"], {"answer", "verifier", "entry", "task", "id"})
    if "GRPOConfig" in by_type:
        check_overlong(rewards, by_type["GRPOConfig"].max_completion_length)
        check_saving(by_type["GRPOConfig"])
    for name in ("SamplingArgs", "TeacherArgs"):
        if name in by_type:
            by_type[name].check()
    return by_type


@pytest.mark.parametrize("file", sorted(ROOT.glob("recipes/qwen*/chain.yaml")), ids=str)
def test_the_commented_switch_to_prompts_without_answers_works(file, monkeypatch, tmp_path):
    (block,) = MIXED.findall(file.read_text())
    given = yaml.safe_load(re.sub(r"(?m)^ *#", "", block))
    (tmp_path / "prompts.txt").write_text("Why?\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPSEEK_API_KEY", "sk-of-a-test-0123456789abcdef")
    (_, prompts), rewards = given["tasks"], given["rewards"]
    rows = load_examples(TaskArgs([prompts | {"split": "all"}]))
    rules = load_rewards(RewardArgs(rewards=rewards[:-1]), set().union(*rows))
    assert [rule.applies(rows[0]) for rule in rules] == [False, True, True]
    assert set(rewards[-1]) == {"model", "weight", "task"}


@pytest.mark.parametrize("file", CHAINS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_chain_plans_and_every_stage_parses_as_planned(file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    steps = plan_chain(load_chain(file), tmp_path)
    assert {step.state for step in steps} == {"pending"}
    for step in steps:
        script = next(i for i, word in enumerate(step.command) if word.endswith(".py"))
        checked(step.stage.recipe, step.command[script + 1 :])
        if file in OURS:  # its settings differ from the defaults
            given = read_yaml(step.stage.config)
            for kind in configs.recipe(step.stage.recipe).CONFIGS if "preset" not in given else ():
                for one in dataclasses.fields(kind):
                    made = one.default_factory is not dataclasses.MISSING
                    default = one.default_factory() if made else one.default
                    assert given.get(one.name, ...) != default, f"{step.stage.config}: {one.name}"


OWN_WORDS = re.compile(r"^(?!tasks|pairs|rewards|stages|set|models|name|base|seed|launch)(\w+):")


@pytest.mark.parametrize("file", CHAINS[:-1], ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_recipe_folder_and_its_settings_are_explained(file):
    readme = (file.parent / "README.md").read_text()
    assert readme.startswith("# ")
    if file.parent.name.startswith(("qwen", "smollm")):
        for word in ("memory", "hours", "estimated", f"chainforge plan {file.parent.name}"):
            assert word in readme, word
    for one in file.parent.glob("*.yaml") if file in OURS else ():
        lines = one.read_text().splitlines()
        assert lines[0].startswith("# ")
        for line in lines:
            assert not OWN_WORDS.match(line) or "#" in line, f"no reason: {line}"


PRESETS = {
    "r1-paper": {"learning_rate": 3e-6, "beta": 0.001, "epsilon": 10, "num_generations": 16},
    "modern": {"epsilon_high": 0.28, "beta": 0, "mask_truncated_completions": True},
    "dr-grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "vllm-colocate": {"vllm_mode": "colocate", "vllm_enable_sleep_mode": True},
    "vllm-server": {"use_vllm": True, "vllm_mode": "server"},
}


@pytest.mark.parametrize("file", sorted(ROOT.glob("recipes/presets/*")), ids=lambda file: file.stem)
def test_every_preset_is_one_of_grpo_and_explained(file):
    training = checked("grpo", ["--preset", file.stem])["GRPOConfig"]
    values = {key: getattr(training, key) for key in PRESETS[file.stem]}
    assert values == PRESETS[file.stem]
    for line in file.read_text().splitlines():
        assert "#" in line or line[0] == " " or line == "rewards:", f"no reason: {line}"


def test_every_launch_file_is_one_of_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    for file in ROOT.glob("accelerate_configs/*.yaml"):
        assert load_config_from_file(str(file)).num_processes >= 1


def test_every_evaluation_asks_all_test_rows_of_a_benchmark():
    readme = (ROOT / "recipes/evals/README.md").read_text()
    benchmarks = set()
    for file in EVALS:
        for task in checked("evaluate", ["--config", str(file)])["TaskArgs"].tasks:
            benchmarks.add(task["params"]["dataset"])
            assert task["split"] == "test"
            assert "size" not in task
        assert f"`{file.name}`" in readme
    assert benchmarks == {"gsm8k", "math-500", "aime24", "aime25"}
    assert readme.count(tags_of(DEFAULT).system_prompt) == 2  # once for each harness
    stage = yaml.safe_load(readme.split("```yaml")[1].split("```")[0])[0]
    gates = read_gates(stage["gate"], stage["models"])
    assert [gate.model for gate in gates] == ["cold_start", "cold_start"]
    named = readme.split("Metrics: ")[1].split("with `min`")[0]
    assert {metric for metric in METRICS if f"`{metric}`" in named} == METRICS.keys() - {"strict"}


def test_no_text_installs_the_other_project_of_our_name():
    assert 'name = "chainforge-r1"' in (ROOT / "pyproject.toml").read_text()
    kinds = ("*.md", "*.py", "*.yaml", "*.sh", "*.ipynb", "Makefile")
    folders = ("chainforge", "recipes", "docs", "benchmarks", "accelerate_configs")
    files = [file for kind in kinds for name in folders for file in (ROOT / name).rglob(kind)]
    wrong = re.compile(r"pip install\b[^\n]*?[\s'\"]chainforge(?!-r1|/)")
    assert len(files) > 100
    assert [file for file in [ROOT / "README.md", *files] if wrong.search(file.read_text())] == []
