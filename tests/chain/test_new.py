"""`chainforge new`: a recipe folder copied out plans at once, and says nothing of where it was."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import chainforge
from chainforge.chain.new import make_project
from chainforge.chain.plan import plan_chain
from chainforge.chain.spec import load_chain
from chainforge.core.config import read_settings
from chainforge.core.errors import InputError
from chainforge.core.paths import shipped
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.rewards.reward import RewardArgs, load_rewards

RECIPES = sorted(file.parent.name for file in shipped("recipes").glob("*/chain.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_becomes_a_project_that_plans(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my-project").mkdir()  # empty: nothing to lose
    lines = make_project(Path("my-project"), recipe)
    assert lines[-1] == "  chainforge run my-project"
    chain = load_chain("my-project")
    assert chain.name == "my-project"
    steps = plan_chain(chain, "runs")
    configs = [word for step in steps for word in step.command if word.endswith(".yaml")]
    assert any(word.startswith("my-project/") for word in configs)
    for file in Path("my-project").rglob("*"):
        if file.suffix in (".yaml", ".md", ".py"):
            text = file.read_text()
            assert f"recipes/{recipe}/" not in text
            assert f"runs/{recipe}/" not in text
            assert f"chainforge run {recipe}" not in text
    assert not list(Path("my-project").rglob("__pycache__"))


@pytest.mark.parametrize("where", ["my-project", "elsewhere/my-project"])
def test_the_rewards_and_tasks_of_a_project_are_its_own(where, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = Path(where) if "/" not in where else tmp_path / where
    folder.parent.mkdir(exist_ok=True)
    make_project(folder, "custom")
    settings = read_settings(folder / "rl.yaml")
    assert str(folder) in settings["rewards"][-1]["fn"]
    (folder / "reward.py").write_text("def concise(completion, max_words):\n    return 7.0\n")
    rewards = load_rewards(RewardArgs(rewards=settings["rewards"]), {"answer", "verifier", "id"})
    assert rewards[-1](["?"], ["some answer"]) == [7.0]
    (folder / "problems.jsonl").write_text('{"question": "Who?", "answer": "I"}\n')
    settings["tasks"][0]["split"] = "all"
    (row,) = load_examples(TaskArgs(tasks=settings["tasks"], system_prompt=""))
    assert row["prompt"][-1]["content"] == "Who?"


@pytest.mark.parametrize(
    ("folder", "recipe", "words"),
    [
        ("full", "custom", "not empty"),
        ("full/file", "custom", "not empty"),
        ("my project", "custom", "cannot name a folder"),
        ("mine", "qwen2.5-0.5", "did you mean 'qwen2.5-0.5b'?"),
    ],
)
def test_what_is_there_is_not_written_over(tmp_path, monkeypatch, folder, recipe, words):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").touch()
    with pytest.raises(InputError) as error:
        make_project(Path(folder), recipe)
    assert words in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full"]


def test_an_installed_package_has_its_recipes_too(tmp_path):
    """As the wheel lays it out: recipes inside the package, no checkout anywhere."""
    package = Path(chainforge.__file__).parent
    site = tmp_path / "site"
    shutil.copytree(package, site / "chainforge", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("recipes", "accelerate_configs"):
        shutil.copytree(shipped(name), site / "chainforge" / name)
    code = (
        "import chainforge, sys; from chainforge import cli;"
        f"assert chainforge.__file__.startswith({str(site)!r});"
        "sys.argv = ['chainforge', *sys.argv[1:]]; cli.main()"
    )

    env = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}

    def run(*words):
        words = [sys.executable, "-c", code, *words]
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "chainforge run my-project" in run("new", "my-project", "--from", "custom")
    plan = run("plan", "my-project")
    assert "my-project: 3 stages in runs/my-project" in plan
    assert "site/chainforge/recipes/quickstart/base" in plan
