"""Wrong input gives one clear message, exit code 2, no traceback, and nothing that looks done."""

import re
import shutil

import pytest
import yaml
from small import CPU, TASK

from chainforge.core.artifacts import lock, read_manifest

TRAIN = CPU | {"max_steps": 1}
GRPO = TRAIN | {"tasks": [TASK], "per_device_train_batch_size": 8, "num_generations": 4}
COLLECT = {"tasks": [TASK]}
SFT = TRAIN | {"data": ["rows.jsonl"]}
REJECT = {"tasks": [TASK]}
PAIR = '{"prompt": [{"role": "user", "content": "1 + 1 ="}], "completion": "2"}\n'
JSONL = {"fn": "jsonl", "params": {"path": "rows.jsonl"}, "split": "all"}

CASES = {
    "misspelt key": ("grpo", GRPO | {"learning_rat": 1e-6}, "did you mean 'learning_rate'"),
    "wrong type": ("grpo", GRPO | {"max_steps": "ten"}, "max_steps: expected int"),
    "wrong choice": ("collect", COLLECT | {"teacher": "sage"}, "teacher: expected"),
    "no task": ("grpo", GRPO | {"tasks": []}, "tasks: none given"),
    "unknown data set": (
        "grpo",
        GRPO | {"tasks": [TASK | {"params": {"dataset": "chain_sun"}}]},
        "chain_sum",
    ),
    "misspelt task key": ("grpo", GRPO | {"tasks": [TASK | {"splitt": "test"}]}, "'split'"),
    "unknown reward": (
        "grpo",
        GRPO | {"rewards": [{"fn": "acuracy_reward"}]},
        "did you mean 'accuracy_reward'",
    ),
    "a reward that needs a column that is not there": (
        "grpo",
        GRPO | {"rewards": [{"fn": "needs.py:needs"}]},
        "needs 'colour'",
    ),
    "a reward file that does not import": (
        "grpo",
        GRPO | {"rewards": [{"fn": "broken.py:fn"}]},
        "broken.py does not import: line 2: ZeroDivisionError",
    ),
    "batch that num_generations does not divide": (
        "grpo",
        GRPO | {"num_generations": 3},
        "divisible by num_generations",
    ),
    "fewer rows than one generation batch": (
        "grpo",
        GRPO | {"tasks": [TASK | {"size": 1}]},
        "fewer than the 2 prompts of one generation batch",
    ),
    "saves inside a generation window": (
        "grpo",
        GRPO | {"num_iterations": 2, "save_steps": 3},
        "save_steps: 3 falls inside a generation window",
    ),
    "no such model": ("grpo", GRPO | {"model_name_or_path": "./nowhere"}, "no such model"),
    "a folder that is no model": ("grpo", GRPO | {"model_name_or_path": "."}, "no config.json"),
    "no model": ("reject", REJECT | {"model_name_or_path": None}, "name a model"),
    "no such data": ("sft", SFT | {"data": ["gone"]}, "gone: no such file or directory"),
    "no data": ("sft", SFT | {"data": []}, "data: none given"),
    "empty data file": ("sft", SFT | {"data": ["empty.jsonl"]}, "empty.jsonl: no rows"),
    "malformed data file": ("sft", SFT | {"data": ["torn.jsonl"]}, "torn.jsonl.*line 2"),
    "a row without completion": ("sft", SFT | {"data": ["half.jsonl"]}, "line 2: completion"),
    "rows that do not fit": ("sft", SFT | {"max_length": 4}, "have more than 4 tokens"),
    "an empty task file": (
        "collect",
        COLLECT | {"tasks": [JSONL | {"params": {"path": "empty.jsonl"}}]},
        "empty.jsonl",
    ),
    "a task row without answer": (
        "grpo",
        GRPO | {"tasks": [JSONL], "rewards": [{"fn": "accuracy_reward"}]},
        "answer",
    ),
    "no key": ("collect", COLLECT | {"teacher": "deepseek"}, "DEEPSEEK_API_KEY is not set"),
    "a sampling value out of range": ("reject", REJECT | {"top_p": 2.0}, "top_p: expected"),
    "not YAML": ("collect", None, "c.yaml: not YAML"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    files = {
        "rows.jsonl": PAIR,
        "empty.jsonl": "",
        "torn.jsonl": PAIR + '{"prompt": \n' + PAIR,
        "half.jsonl": PAIR + '{"prompt": [{"role": "user", "content": "1"}]}\n',
        "broken.py": "def fn(completion): return 1.0\n1 / 0\n",
        "needs.py": "def needs(completion, colour): return 1.0\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_one_clear_message(case, folder, tiny_model, recipe):
    name, settings, words = CASES[case]
    takes_model = name != "collect"
    if settings is None:
        (folder / "c.yaml").write_text("a: [")
    else:
        model = {"model_name_or_path": tiny_model} if takes_model else {}
        (folder / "c.yaml").write_text(yaml.safe_dump(model | settings))
    code, error = recipe(name, "--config", "c.yaml", "--output_dir", "out")
    assert code == 2, error
    message = error[error.rindex("error: ") :]
    assert re.search(words, message, re.DOTALL), message
    assert "Traceback" not in error
    assert read_manifest("out") is None
    assert not (folder / "out/model").exists()


def test_an_output_directory_in_use(folder, tiny_model, recipe):
    (folder / "c.yaml").write_text(yaml.safe_dump(COLLECT))
    with lock("out"):
        code, error = recipe("collect", "--config", "c.yaml", "--output_dir", "out")
    assert code == 2
    assert "out is in use by process" in error


def test_an_adapter_is_no_model(folder, tiny_model, recipe):
    shutil.copytree(tiny_model, "adapter")
    (folder / "adapter/config.json").unlink()
    (folder / "adapter/adapter_config.json").write_text("{}")
    (folder / "c.yaml").write_text(yaml.safe_dump(REJECT | {"model_name_or_path": "adapter"}))
    code, error = recipe("reject", "--config", "c.yaml", "--output_dir", "out")
    assert code == 2
    assert "is a LoRA adapter" in error


@pytest.mark.parametrize("models", [[], ["base"], ["a=x", "a=y"]])
def test_models_are_named_once_each(folder, tiny_model, recipe, models):
    (folder / "c.yaml").write_text(yaml.safe_dump({"tasks": [TASK]}))
    pairs = [word.replace("x", tiny_model).replace("=y", f"={tiny_model}") for word in models]
    flags = ["--models", *pairs] if pairs else []
    code, error = recipe("evaluate", "--config", "c.yaml", "--output_dir", "out", *flags)
    assert code == 2
    assert "models:" in error
