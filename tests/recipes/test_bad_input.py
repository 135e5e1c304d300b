"""Wrong input gives one clear message, exit code 2, no traceback, and nothing that looks done."""

import re

import pytest
import yaml
from small import CPU, TASK

from chainforge.core.artifacts import read_manifest

FILES = {
    "rows.jsonl": '{"prompt": [{"role": "user", "content": "1 + 1 ="}], "completion": "2"}\n',
    "empty.jsonl": "",
    "broken.py": "def fn(completion): return 1.0\n1 / 0\n",
    "needs.py": "def needs(completion, colour): return 1.0\n",
}
FILES["torn.jsonl"] = FILES["rows.jsonl"] + '{"prompt": \n' + FILES["rows.jsonl"]
FILES["half.jsonl"] = FILES["rows.jsonl"] + '{"prompt": [{"role": "user", "content": "1"}]}\n'
TRAIN = CPU | {"max_steps": 1, "per_device_train_batch_size": 8}
SETTINGS = {
    "collect": {"tasks": [TASK]},
    "sft": TRAIN | {"data": ["rows.jsonl"]},
    "grpo": TRAIN | {"tasks": [TASK], "num_generations": 4},
    "reject": {"tasks": [TASK]},
    "evaluate": {"tasks": [TASK]},
}


def of_file(path):
    return {"fn": "jsonl", "params": {"path": path}, "split": "all"}


CASES = [
    ("grpo", {"learning_rat": 1e-6}, "did you mean 'learning_rate'"),
    ("grpo", {"max_steps": "ten"}, "max_steps: expected int"),
    ("grpo", {"tasks": []}, "tasks: none given"),
    ("grpo", {"tasks": [TASK | {"params": {"dataset": "chain_sun"}}]}, "chain_sum"),
    ("grpo", {"tasks": [TASK | {"splitt": "test"}]}, "'split'"),
    ("grpo", {"tasks": [TASK | {"size": 1}]}, "fewer than the 2 prompts of one generation batch"),
    ("grpo", {"tasks": [of_file("rows.jsonl")], "rewards": [{"fn": "accuracy_reward"}]}, "answer"),
    ("grpo", {"rewards": [{"fn": "acuracy_reward"}]}, "did you mean 'accuracy_reward'"),
    ("grpo", {"rewards": [{"fn": "needs.py:needs"}]}, "needs 'colour'"),
    ("grpo", {"rewards": [{"fn": "broken.py:fn"}]}, "be imported: line 2: ZeroDivisionError"),
    ("grpo", {"num_generations": 3}, "divisible by num_generations"),
    ("grpo", {"num_iterations": 2, "save_steps": 3}, "save_steps: 3 falls inside a generation"),
    ("grpo", {"model_name_or_path": "./nowhere"}, "no such model"),
    ("grpo", {"model_name_or_path": "."}, "no config.json"),
    ("reject", {"model_name_or_path": None}, "name a model"),
    ("reject", {"top_p": 2.0}, "top_p: expected"),
    ("sft", {"data": ["gone"]}, "gone: no such file or directory"),
    ("sft", {"data": []}, "data: none given"),
    ("sft", {"data": ["empty.jsonl"]}, "empty.jsonl: no rows"),
    ("sft", {"data": ["torn.jsonl"]}, "torn.jsonl.*line 2"),
    ("sft", {"data": ["half.jsonl"]}, "line 2: completion"),
    ("sft", {"max_length": 4}, "have more than 4 tokens"),
    ("collect", {"tasks": [of_file("empty.jsonl")]}, "empty.jsonl"),
    ("collect", {"teacher": "deepseek"}, "DEEPSEEK_API_KEY is not set"),
    ("collect", {"teacher": "sage"}, "teacher: expected"),
    ("collect", {"extra_body": {"max_tokens": 9}}, "extra_body: .*max_new_tokens"),
    ("collect", {"num_samples": 0}, "expected"),
    ("collect", None, "c.yaml: not YAML"),
    ("evaluate", {}, "models:"),
    ("evaluate", {"models": ["base"]}, "models:"),
    ("evaluate", {"models": ["a=MODEL", "a=MODEL"]}, "models:"),
    ("evaluate", {"engine": "api", "extra_body": {"n": 8}}, "extra_body: 'n' .*num_samples"),
    ("evaluate", {"engine": "api", "served_model": "m"}, "served_model: names one model"),
]


@pytest.mark.parametrize(("name", "changes", "words"), CASES)
def test_one_clear_message(name, changes, words, tmp_path, tiny_model, recipe, monkeypatch):
    for file, text in FILES.items():
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    model = {} if name in ("collect", "evaluate") else {"model_name_or_path": tiny_model}
    if "engine" in (changes or {}):
        model = {"models": ["a=MODEL", "b=MODEL"], "base_url": "http://127.0.0.1:9/v1"}
    text = "a: [" if changes is None else yaml.safe_dump(SETTINGS[name] | model | changes)
    (tmp_path / "c.yaml").write_text(text.replace("MODEL", tiny_model))
    code, error = recipe(name, "--config", "c.yaml", "--output_dir", "out")
    assert code == 2, error
    message = error[error.rindex("error: ") :]
    assert re.search(words, message, re.DOTALL), message
    assert "Traceback" not in error
    assert read_manifest("out") is None
    assert not (tmp_path / "out/model").exists()
