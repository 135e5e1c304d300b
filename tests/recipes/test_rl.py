"""GRPO with held-out rows, on a model that is half right.

The tiny writer answers every question in the right format with a random 0 or 1, so the rewards of a
group differ nearly always where the answer is one of these, and never where it is 7.
"""

import json
import re
import shutil

import pytest
import torch
from small import CPU

from chainforge.core.artifacts import read_manifest, sha256
from chainforge.core.jsonl import read_rows, write_rows
from chainforge.core.transcript import write

ROWS = [
    {"question": f"{n}?", "answer": "7" if n % 3 == 0 else str(n % 2), "verifier": "exact"}
    for n in range(100, 400)
]
RUN = CPU | {
    "system_prompt": "",
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "max_completion_length": 12,
    "max_steps": 4,
    "save_steps": 2,
}


@pytest.fixture(scope="module")
def writer(tiny_model, tokenizer, tmp_path_factory):
    """A model that writes the transcript's form, with an answer of 0 or 1."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    texts = [
        f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"
        f"{write('a', digit)}<|im_end|>"
        for row in ROWS[::12]
        for digit in "01"
    ]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(50):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("models") / "writer"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def rl(stage, writer, tmp_path):
    """Run a GRPO stage; return its exit code and its messages."""

    def run(name, *flags, **settings):
        write_rows(tmp_path / "rows.jsonl", ROWS)
        task = {"fn": "jsonl", "params": {"path": str(tmp_path / "rows.jsonl")}, "split": "train"}
        settings = RUN | {"tasks": [task]} | settings
        return stage("grpo", name, settings, "--model_name_or_path", writer, *flags)

    return run


def weights(folder):
    return sha256(folder / "model.safetensors")


def accuracies(stage):
    """Return what was measured on the held-out rows, by step."""
    logs = read_rows(stage / "metrics.jsonl")
    return {log["step"]: log["eval_accuracy"] for log in logs if "eval_accuracy" in log}


def test_held_out_rows_change_nothing_and_the_best_is_kept(rl, tmp_path, caplog):
    held_out = {"heldout_size": 8, "eval_steps": 2}
    assert rl("plain")[0] == 0
    assert rl("watched", **held_out)[0] == 0
    trained = weights(tmp_path / "plain/model")
    assert weights(tmp_path / "watched/model") == trained
    rows = read_rows(tmp_path / "watched/rollouts.jsonl")
    assert len(rows) == 4 * 16  # an evaluation's completions are no rollouts
    measured = accuracies(tmp_path / "watched")
    assert list(measured) == [0, 2, 4]
    assert all(0 <= accuracy <= 1 for accuracy in measured.values())
    # As a kill after the checkpoint of step 2 leaves it.
    shutil.copytree(tmp_path / "watched", tmp_path / "cut")
    (tmp_path / "cut/manifest.json").unlink()
    for name in ("model", "checkpoints/checkpoint-4"):
        shutil.rmtree(tmp_path / "cut" / name)
    assert rl("cut", **held_out)[0] == 0
    assert weights(tmp_path / "cut/model") == trained
    assert accuracies(tmp_path / "cut") == measured
    assert rl("best", **held_out, keep_best=True, learning_rate=0.1)[0] == 0
    notes = read_manifest(tmp_path / "best").notes
    by_step = accuracies(tmp_path / "best")
    best = max((2, 4), key=by_step.get)
    assert (notes["model_step"], notes["best_accuracy"]) == (best, by_step[best])
    assert notes["start_accuracy"] == by_step[0]
    assert ("no checkpoint (best" in caplog.text) == (by_step[best] <= by_step[0])
    assert read_manifest(tmp_path / "watched").notes["model_step"] == 4
    saved = tmp_path / f"best/checkpoints/checkpoint-{best}"
    assert weights(saved) == weights(tmp_path / "best/model")


ALL = {"heldout_size": 4, "tasks": [{"fn": "jsonl", "split": "all"}]}
CONFLICTS = [
    ({"keep_best": True}, "needs heldout_size"),
    ({"heldout_size": 8, "eval_steps": 3, "keep_best": True}, "multiple of save_steps .2"),
    ({"heldout_size": 500}, "heldout_size: .*lower `size`"),
    (ALL, "tasks.0. trains on split"),
    ({"preset": "modern", "save_steps": 16}, "max_completion_len is 20480, but max_completion"),
]


@pytest.mark.parametrize(("settings", "words"), CONFLICTS)
def test_settings_that_conflict_are_refused_before_a_model_is_loaded(rl, tmp_path, settings, words):
    for task in settings.get("tasks", ()):
        task["params"] = {"path": str(tmp_path / "rows.jsonl")}
    code, error = rl("wrong", **settings)
    assert code == 2, error
    assert re.search(words, error), error
    assert not (tmp_path / "wrong").exists()


def test_a_rollout_that_ends_at_one_of_several_tokens_has_ended(stage, rl, writer, tmp_path):
    """Gemma's tokenizer names one end token, its generation config that of a turn as well."""
    from transformers import AutoTokenizer

    model = shutil.copytree(writer, tmp_path / "writer")
    tokenizer = AutoTokenizer.from_pretrained(model)
    turn, tokenizer.eos_token = tokenizer.eos_token_id, "<|endoftext|>"
    tokenizer.save_pretrained(model)
    ends = {"eos_token_id": [tokenizer.eos_token_id, turn]}
    (model / "generation_config.json").write_text(json.dumps(ends))
    assert rl("several", "--model_name_or_path", model, max_steps=1)[0] == 0
    rows = read_rows(tmp_path / "several/rollouts.jsonl")
    ended = [row["finish_reason"] == "stop" for row in rows]
    assert all(end for end, row in zip(ended, rows, strict=True) if row["formatted"])
    assert sum(ended) > len(rows) / 2
    assert (
        stage("reject", "picks", {"min_reasoning_chars": 0}, "--pool", tmp_path / "several")[0] == 0
    )
    assert json.loads((tmp_path / "picks/funnel.json").read_text())["kept"] > 0
