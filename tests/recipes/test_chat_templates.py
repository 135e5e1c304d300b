"""Each recipe takes any chat template, also none, or refuses it before a model is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import trl
from small import TASK, TRAIN

from chainforge.core.artifacts import read_manifest
from chainforge.core.jsonl import read_rows
from chainforge.core.transcript import read, write
from chainforge.train.templates import CHATML

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
    for name in ("gemma", "idefics3", "qwen3", "qwen3_6"):
        shutil.copy(Path(trl.__file__).parent / f"chat_templates/{name}.jinja", ".")
    Path("fails.jinja").write_text("{% for m in messages %}{{ m.content + 1 }}{% endfor %}")
    Path("rows.jsonl").write_text(f"{json.dumps({'messages': TURNS})}\n" * 8)

    def call(name, output="out", **settings):
        model = {} if name == "evaluate" else {"model_name_or_path": "bare"}
        return stage(name, output, model | RECIPES[name] | settings)

    return call


@pytest.mark.parametrize("name", RECIPES)
def test_a_template_can_be_given_to_a_model_without_one(run, name):
    code, error = run(name, "refused")
    assert code == 2
    assert "bare: the tokenizer has no chat template; set `chat_template_path: chatml`" in error
    lora = {"use_peft": True} if name == "sft" else {}
    code, error = run(name, chat_template_path="chatml", **lora)
    assert code == (name == "distill"), error  # that teacher has nothing to teach
    assert "chat template" not in error
    assert (read_manifest("out") is None) == bool(code)
    if name == "sft":
        for part in ("model", "adapter"):
            assert Path(f"out/{part}/chat_template.jinja").read_text() == CHATML


WRONG = {
    "gemma.jinja": 'System role not supported; set `system_prompt: ""`',
    "idefics3.jinja": "leaves it out; set `chat_template_path: chatml`",
    "fails.jinja": "fails.jinja: the chat template fails after system and user: can only",
    "none.jinja": "chat_template_path: none.jinja: No such file",
    "qwen3.jinja": "chat_template_kwargs: qwen3.jinja has no 'enable_thinkin'",
}


@pytest.mark.parametrize("name", RECIPES)
def test_prompts_that_the_template_refuses_are_found_before_a_model_is_loaded(run, name):
    for file, words in WRONG.items():
        settings = {"chat_template_path": file}
        if file == "qwen3.jinja":
            settings["chat_template_kwargs"] = {"enable_thinkin": False}
        code, error = run(name, file.partition(".")[0], **settings)
        assert code == 2, error
        assert words in error
        assert "Traceback" not in error
        assert "Loading weights" not in error


@pytest.mark.parametrize("name", ["reject", "evaluate"])
def test_a_server_whose_template_begins_the_answer_is_refused(run, name):
    shutil.copy("qwen3_6.jinja", "bare/chat_template.jinja")
    server = {"engine": "api", "base_url": "http://127.0.0.1:9/v1", "transcript": "think"}
    code, error = run(name, **server)
    assert (code, "so would the server; use `engine: transformers`" in error) == (2, True), error


@pytest.mark.parametrize(
    ("template", "form", "options", "ending"),
    [
        ("qwen3", "r1-cold-start", {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        ("qwen3", "think", {}, "assistant\n"),
        ("qwen3_6", "think", {}, "assistant\n"),
    ],
)
def test_a_transcript_is_the_same_from_the_labels_of_sft_to_the_rewards_of_grpo(
    run, tokenizer, monkeypatch, template, form, options, ending
):
    """Qwen3 inserts and drops reasoning, Qwen3.6 opens it in the prompt."""
    text, sets = write("1 + 1 is 2.", "2", form), []
    turns = [*TURNS[:2], {"role": "assistant", "content": "2", "reasoning_content": "1 + 1 is 2."}]
    Path("rows.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 8)
    Path("sums.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")

    class Spy(trl.SFTTrainer):
        def train(self, *args, **kwargs):
            sets.append(self.train_dataset)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(trl, "SFTTrainer", Spy)
    given = {"transcript": form, "chat_template_kwargs": options or None}
    file = {"chat_template_path": f"{template}.jinja"}
    code, error = run("sft", "cold", **file, **given, max_steps=40)
    assert code == 0, error
    row = sets[0][0]
    learnt = [one for one in row["labels"] if one != -100]
    prompt = tokenizer.decode(row["input_ids"][: -len(learnt)])
    assert tokenizer.decode(learnt) == f"{text}<|im_end|>\n"
    assert prompt.endswith(ending)
    saved = type(tokenizer).from_pretrained("cold/model")  # as a user's inference does
    asked = saved.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert asked == prompt
    code, error = run(
        "grpo",
        "rl",
        model_name_or_path="cold/model",
        transcript=form,
        system_prompt=turns[0]["content"],
        tasks=[{"fn": "jsonl", "params": {"path": "sums.jsonl"}, "split": "all"}],
        temperature=0.2,
        max_completion_length=80,
        num_generations=8,
        random_rewards=False,
    )
    # Where all are right nothing is left to learn, which is a failure of that stage.
    assert not code or "all completions of every group have the same reward" in error
    rollouts = read_rows(Path("rl/rollouts.jsonl"))
    right = [row for row in rollouts if read(row["completion"], form) == read(text, form)]
    assert len(right) >= 4
    for row in right:
        assert row["rewards"] == {"accuracy_reward": 1, "format_reward": 1}
        assert row["finish_reason"] == "stop"
