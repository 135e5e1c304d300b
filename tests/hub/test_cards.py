"""Cards: their contents, and that nothing hostile or private gets out through them."""

import getpass
import json
import re
import shutil
import socket
from pathlib import Path

import finished as runs
import pytest
import yaml

from chainforge.core.errors import InputError
from chainforge.hub.export import pack

HOSTILE = "x`](javascript:alert(1)) | <img src=x onerror=alert(1)>\n---\nlicense: mit\n```\n# Gone"


def card_of(*args, **options):
    package = pack(*args, **options)
    text = package.files["README.md"].decode()
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1]
    return text, yaml.safe_load(head), package


def test_the_card_of_a_model_shows_its_origin_results_and_terms(made):
    text, head, _ = card_of(made / "final", "model", title="me/final")
    assert head["license"] == "apache-2.0"  # as in the base's own card
    assert head["library_name"] == "transformers"
    assert "base_model" not in head  # it is on no Hub
    assert "lessons" not in text
    for words in (
        *(f"| `{stage}` |" for stage in ("traces", "cold", "reason", "picks", "mixed", "final")),
        "| `mixed` | supervised fine-tuning | model: `begin`; data: `picks`, `traces` |",
        "3 steps, mean loss 0.5, 90 s on cpu (2 cores)", "| `wrong` | 3 | 7 |",
        "## Where the samples of `picks` went", "| **`final`** | 50.0 (45.0 to 55.0) |",
        "beta: 0.01", "Versions: chainforge", "DeepSeek's Open Platform Terms",
        'AutoModelForCausalLM.from_pretrained("me/final"',
        '{"role": "system", "content": "Think first."}',
    ):  # fmt: skip
        assert words in text


def test_the_card_of_a_student_names_its_base_and_its_teachers(made, tmp_path):
    text, head, package = card_of(made / "student", "model")
    # Without its old path, and what is for training only.
    assert json.loads(package.files["config.json"]) == {"model_type": "qwen2"}
    assert head["base_model"] == "Qwen/Qwen2.5-0.5B"
    assert head["base_model_relation"] == "finetune"
    assert "[Qwen/Qwen2.5-0.5B](https://huggingface.co/Qwen/Qwen2.5-0.5B)" in text
    assert "| `lessons` | rejection sampling | model: `final` |" in text
    assert "by models that began as `begin`" in text
    assert "| `final` |" in text.partition("## Results")[2]
    runs.stage(tmp_path / "pupil", "distill", model="me/small", teacher="Qwen/Qwen2.5-7B")
    text, head, _ = card_of(tmp_path / "pupil", "model")
    assert head["base_model"] == "me/small"
    assert "teacher: [Qwen/Qwen2.5-7B]" in text
    assert "began as [Qwen/Qwen2.5-7B]" in text


def test_the_card_of_rows_names_their_authors(made):
    text, head, package = card_of(made / "lessons", "dataset")
    assert (head["license"], text.count("# Rows")) == ("other", 1)
    assert "by models that began as `begin`" in text
    assert set(package.files) == {"README.md", "train.parquet"}
    _, head, _ = card_of(made / "lessons", "dataset", licence="cc-by-4.0")
    assert head["license"] == "cc-by-4.0"


def test_nothing_of_this_machine_is_sent(tmp_path):
    """Settings, bases and teachers by absolute paths, an adapter on such a base, a login's name."""
    home = str(Path.home())
    private = tmp_path / "a-users-name"
    begin = runs.base(private / "models/begin")
    given = {
        "tasks": [{"fn": "jsonl", "params": {"path": f"{private}/problems.jsonl"}}],
        "rewards": [{"fn": f"{private}/mine.py:good", "params": {"api_key": "sk-0", "k": 1}}],
        "deepspeed": "../../a-users-name/zero.json",
        "vllm_server_base_url": "http://a-users-name:pass@gpu:8000/v1",
        "wandb_token": "t0ken",
        "eos_token": "<|im_end|>",
        "loss_type": f"{home}/x y",
    }
    runs.stage(private / "cold", "sft", model=begin, given=given, parts=("model", "adapter"),
               adapter_config={"base_model_name_or_path": begin})  # fmt: skip
    runs.stage(private / "pupil", "distill", model=begin, teacher=private / "cold/model")
    text, _, package = card_of(private / "cold", "adapter", title="out")
    config = json.loads(package.files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "begin"
    assert 'from_pretrained("begin"' in text
    assert 'PeftModel.from_pretrained(base, "out")' in text
    for wanted in ("path: problems.jsonl", "mine.py:good", "k: 1", "<|im_end|>", "zero.json"):
        assert wanted in text
    whole = text + card_of(private / "pupil", "model")[0]
    whole += "".join(c.decode() for c in package.files.values() if isinstance(c, bytes))
    words = ["a-users-name", str(tmp_path), f"{home}/", "sk-0", "t0ken", socket.gethostname()]
    words += [getpass.getuser()] if len(getpass.getuser()) > 4 else []
    assert not [word for word in words if word in whole]


def test_hostile_names_and_settings_are_escaped(tmp_path):
    given = {"tasks": [{"fn": "hub", "params": {"dataset": HOSTILE}}], "system_prompt": HOSTILE,
             "run_name": HOSTILE, "teacher": "openai", "model": HOSTILE, "base_url": HOSTILE}  # fmt: skip
    traces = runs.stage(tmp_path / "traces", "collect", given=given)
    del given["teacher"], given["model"], given["base_url"]
    folder = tmp_path / "runs `x` | [y](z)"
    runs.stage(folder, "grpo", model=HOSTILE, data=[traces], given=given)
    text, head, _ = card_of(folder, "model", title="a`b <b> [c](d) #e\n---\n# f")
    assert "license" not in head
    assert head["tags"] == ["chainforge", "trl", "reasoning"]
    outside = re.sub(r"```\w+\n.*?\n```\n", "", text, flags=re.DOTALL)  # what is no code block
    outside = re.sub(r"^    .*\n", "", outside, flags=re.MULTILINE)
    lines = outside.splitlines()
    titles = [line for line in lines if line.startswith("#")]
    assert [title.strip("# ") for title in titles][1:] == [
        "Use", "Results", "How it was made", "Where the samples of `traces` went",
        f"Settings of `{folder.name.replace('`', chr(39)).replace('|', '/')}`",
        "Licence and terms", "Limits",
    ]  # fmt: skip
    assert titles[0] == "# `a'b <b> [c](d) #e --- # f`"
    plain = re.sub(r"`[^`\n]*`", "", outside.partition("## Use")[2])  # what is no code span
    assert "javascript" not in plain
    assert "<img" not in plain
    rows = [line for line in lines if line.startswith("| `")]
    assert rows
    assert all(line.count("|") in (4, 5) for line in rows)


def test_a_stage_that_is_not_finished_is_refused_with_all_its_parts(made, tmp_path):
    cold = shutil.copytree(made / "cold", tmp_path / "cold")
    (cold / "stage.json").write_text("{}")
    (cold / "manifest.json").unlink()
    checkpoint = shutil.copytree(cold / "model", cold / "checkpoints/checkpoint-9")
    for path in (cold, cold / "model", checkpoint):
        with pytest.raises(InputError, match=rf"{cold}: this stage is not finished"):
            pack(path)


def test_pairs_go_out_with_the_rows_and_hidden_files_do_not(tmp_path):
    for name in ("train.parquet", "pairs/train.parquet", ".hidden.parquet"):
        runs.rows(tmp_path / "rows" / name)
    (tmp_path / "rows/README.md").write_text("---\nlicense: [broken\n---\n\n# Mine\n")
    text = pack(tmp_path / "rows").files["README.md"].decode()
    assert "# Mine" in text
    package = pack(tmp_path / "rows", licence="mit")
    assert set(package.files) == {"README.md", "train.parquet", "pairs/train.parquet"}
    assert package.left_out == [".hidden.parquet"]
    assert package.files["README.md"].decode() == "---\nlicense: mit\n---\n\n# Mine\n"
