"""One rule for paths: in a YAML from its folder, on the command line from the current folder."""

import os
from pathlib import Path

import pytest

from chainforge.chain.plan import plan_chain
from chainforge.chain.spec import load_chain
from chainforge.core.artifacts import fingerprint
from chainforge.core.errors import InputError
from chainforge.core.paths import anchored, paths_in, shipped, unplaced, written_for
from chainforge.train.model_source import check_model


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder `project` with files, and `here` beside it as the current folder."""
    for name in ("project/data/rows.jsonl", "project/train/x", "project/modern/x", "project/r.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "project/base").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here/mine.jsonl").touch()
    (tmp_path / "here/org").mkdir()
    (tmp_path / "here/org/name").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "project"


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"tasks": [{"params": {"path": "data/rows.jsonl"}}]}, "data/rows.jsonl"),
        ({"tasks": [{"params": {"path": "missing.jsonl"}}]}, "missing.jsonl"),
        ({"tasks": [{"params": {"path": "base"}}]}, "base"),
        ({"rewards": [{"fn": "r.py:good"}]}, "r.py:good"),
        ({"rewards": [{"fn": "none.py:good"}]}, "none.py:good"),
        ({"data": ["data"]}, "data"),
        ({"data": ["./not/there"]}, "not/there"),
        ({"output_dir": "mine.jsonl"}, "mine.jsonl"),
        ({"model_name_or_path": "base"}, "base"),
        ({"models": ["one=base"]}, "base"),
        ({"decontaminate": ["data/rows.jsonl"]}, "data/rows.jsonl"),
        ({"deepspeed": "../project/r.py"}, "r.py"),
        ({"teacher_model_name_or_path": "./base"}, "base"),
        ({"engine_options": {"template": "./base"}}, "base"),
    ],
)
def test_what_is_a_path(project, settings, wanted):
    found = anchored(settings, project)
    while not isinstance(found, str):
        found = next(iter(found.values() if isinstance(found, dict) else found))
    assert found.removeprefix("one=") == str(project / wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_name_or_path": "Qwen/Qwen2.5-0.5B"},
        {"tasks": [{"fn": "hub", "params": {"dataset": "openai/gsm8k", "path": "openai/gsm8k"}}]},
        {"tasks": [{"fn": "jsonl", "split": "train"}]},
        {"preset": "modern"},
        {"rewards": [{"fn": "math:sqrt", "weight": 0.5}]},
        {"system_prompt": "Think.\nThen write ./answer"},
        {"base_url": "http://localhost:8000/v1"},
        {"output_dir": "/absolute/a"},
        {"lora_target_modules": ["q_proj", r".*\.v_proj"]},
        {"tasks": [{"params": {"operators": ["+", "/", "//"]}}]},
    ],
)
def test_what_is_none_stays_as_it_is(project, settings):
    assert anchored(settings, project) == settings
    assert not list(paths_in(settings))
    assert unplaced(settings) == settings


def test_what_a_stage_leaves_reads_back_as_it_was(project):
    settings = {"output_dir": "runs/x", "data": ["mine.jsonl"], "n": 1, "models": ["a=org/name"]}
    folder = Path("runs/x")
    assert written_for(settings, folder)["data"] == ["../../mine.jsonl"]
    assert anchored(written_for(settings, folder), folder) == settings


@pytest.mark.parametrize("place", ["elsewhere", "recipes/custom"])
def test_the_custom_recipe_is_the_same_from_every_folder(place, tmp_path, monkeypatch):
    recipes = shipped("recipes").resolve()
    chain = recipes / "custom/chain.yaml"
    monkeypatch.chdir(recipes.parent)
    here = plan_chain(load_chain(chain), tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" if place == "elsewhere" else recipes.parent / place)
    there = plan_chain(load_chain(os.path.relpath(chain)), tmp_path)
    assert [step.fingerprint for step in there] == [step.fingerprint for step in here]
    for step in there:
        for word in step.command:
            path = word.removeprefix("base=")
            assert "/" not in path or str(tmp_path) in path or Path(path).exists(), word


def test_a_model_that_is_not_there_is_not_sought_on_the_hub(project):
    for name in ("./nowhere", "./org/nowhere"):
        for key, prefix in (("model_name_or_path", ""), ("models", "one=")):
            found = anchored({key: prefix + name}, Path())
            assert found == {key: prefix + name}
    with pytest.raises(InputError, match="org/nowhere: no such model directory"):
        check_model(found["models"].removeprefix("one="))


def test_files_count_by_content_and_order_and_not_by_place(tmp_path, monkeypatch):
    for name in ("one/a.jsonl", "two/a.jsonl", "copy/one/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name.removeprefix("copy/"))

    def mark(*names):
        tasks = [{"fn": "jsonl", "params": {"path": str(tmp_path / name)}} for name in names]
        return fingerprint("grpo", {"tasks": tasks}, {})

    assert mark("one/a.jsonl") == mark("copy/one/a.jsonl") != mark("two/a.jsonl")
    assert mark("one/a.jsonl", "two/a.jsonl") != mark("two/a.jsonl", "one/a.jsonl")
