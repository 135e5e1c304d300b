"""Each recipe takes `chat_template_path`, and refuses a chat template that its prompts do not fit."""

import json
import shutil
from pathlib import Path

import pytest
import trl
from small import TASK, TRAIN

from chainforge.core.artifacts import read_manifest
from chainforge.core.transcript import write

ASKED = TRAIN | {"tasks": [TASK], "max_completion_length": 8, "max_steps": 1}
SAMPLED = {"tasks": [TASK | {"size": 8}], "num_samples": 1, "max_new_tokens": 8}
LOOSE = {"require_correct": False, "require_format": False}
LOOSE |= {"max_repetition": None, "min_language": None}
RECIPES = {
    "sft": TRAIN | {"data": ["rows.jsonl"], "max_steps": 1},
    "grpo": ASKED | {"num_generations": 2, "random_rewards": True},
    "distill": ASKED | {"teacher_model_name_or_path": "bare"},
    "reject": SAMPLED | LOOSE,
    "evaluate": SAMPLED | {"models": ["one=bare"]},
}
TURNS = [
    {"role": "system", "content": "Reason, then answer."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": write("1 + 1 is 2.", "2")},
]


@pytest.fixture
def run(tmp_path, tiny_model, tokenizer, stage, monkeypatch):
    """Run a recipe on a model without a chat template, and templates beside it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "bare")
    Path("bare/chat_template.jinja").unlink()
    Path("chatml.jinja").write_text(tokenizer.chat_template)
    for name in ("gemma", "qwen3"):
        shutil.copy(Path(trl.__file__).parent / f"chat_templates/{name}.jinja", ".")
    Path("fails.jinja").write_text("{% for m in messages %}{{ m.content + 1 }}{% endfor %}")
    Path("rows.jsonl").write_text(f"{json.dumps({'messages': TURNS})}\n" * 8)

    def call(name, output="out", **settings):
        model = {} if name == "evaluate" else {"model_name_or_path": "bare"}
        return stage(name, output, model | RECIPES[name] | settings)

    return call


@pytest.mark.parametrize("name", RECIPES)
def test_a_template_can_be_given_to_a_model_without_one(run, tokenizer, name):
    code, error = run(name, "refused")
    assert code == 2
    assert "bare: the tokenizer has no chat template; set chat_template_path" in error
    code, error = run(name, chat_template_path="chatml.jinja")
    assert code == (name == "distill"), error  # that teacher has nothing to teach
    assert "chat template" not in error
    assert (read_manifest("out") is None) == bool(code)
    if name == "sft":
        assert Path("out/model/chat_template.jinja").read_text() == tokenizer.chat_template


WRONG = {
    "gemma.jinja": 'System role not supported; set `system_prompt: ""`',
    "qwen3.jinja": "set `transcript: think`",
    "fails.jinja": "fails.jinja: the chat template fails after system and user: can only",
    "none.jinja": "chat_template_path: none.jinja: [Errno 2] No such file",
}


@pytest.mark.parametrize("name", RECIPES)
def test_prompts_that_the_template_refuses_are_found_before_a_model_is_loaded(run, name):
    for file, words in WRONG.items():
        code, error = run(name, file.partition(".")[0], chat_template_path=file)
        assert code == 2, error
        assert words in error
        assert "Traceback" not in error
        assert "Loading weights" not in error
