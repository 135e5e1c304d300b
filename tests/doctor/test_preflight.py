"""Faults planted in a copy of the quickstart, each found by `chainforge doctor` in its stage.

No model is loaded: the copy's weights are not weights.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from chainforge import cli
from chainforge.chain.plan import override, plan_chain
from chainforge.chain.spec import load_chain
from chainforge.core.transcript import write
from chainforge.doctor.environment import Machine, this_machine
from chainforge.doctor.preflight import examine

ROOT = Path(__file__).parents[2]
DISTILL = {"name": "distill", "recipe": "distill", "config": "distill.yaml", "size": 12,
           "model": "student_base", "teacher_model": "rl_final"}  # fmt: skip


class Copy:
    """The quickstart in a folder of its own, with few rows, one more stage, and broken weights."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder / "quick", monkeypatch
        shutil.copytree(ROOT / "recipes/quickstart", self.folder)
        for weights in self.folder.glob("*/model.safetensors"):
            weights.write_bytes(b"no weights at all")
        for file in self.folder.glob("*.yaml"):
            settings = yaml.safe_load(file.read_text())
            for entry in [*settings.get("stages", []), *settings.get("tasks", [])]:
                if isinstance(entry, dict) and ("size" in entry or "fn" in entry):
                    entry["size"] = 12
            if "max_completion_length" in settings:
                settings["per_device_train_batch_size"] = 8
            file.write_text(yaml.safe_dump(settings))
        self.change("chain", stages=[*self.read("chain")["stages"], DISTILL])
        monkeypatch.chdir(folder)

    def examine(self, stage, machine=None, launch=None):
        """Return the doctor's findings of a stage and of those that it needs."""
        chain = load_chain(self.folder)
        steps = plan_chain(override(chain, launch=launch), self.folder / "runs")
        names = {stage}
        for step in reversed(steps):
            if step.stage.name in names:
                names |= {item.name for item in step.inputs.values()}
        kept = [step for step in steps if step.stage.name in names]
        return examine(machine or this_machine(), chain, kept)

    def read(self, name):
        return yaml.safe_load((self.folder / f"{name}.yaml").read_text())

    def change(self, name, **settings):
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(self.read(name) | settings))

    def stage(self, name, **keys):
        stages = self.read("chain")["stages"]
        self.change("chain", stages=[s | keys if s["name"] == name else s for s in stages])

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    def edit(self, name, **keys):
        """Change keys of a JSON file."""
        path = self.folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    def tokenizer(self, act, model="base"):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder / model)
        act(tokenizer)
        tokenizer.save_pretrained(self.folder / model)

    def template(self, old, new, times=-1):
        path = self.folder / "base/chat_template.jinja"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, times))

    def launch(self, stage, text):
        self.stage(stage, launch=self.write("launch.yaml", text))

    def on_gpu(self, memory):
        """Put a program on the path that answers as nvidia-smi does on a machine with a GPU."""
        program = Path(self.write("bin/nvidia-smi", f"#!/bin/sh\necho '{memory}, NVIDIA L4'\n"))
        program.chmod(0o755)
        self.monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    def package(self, name, version):
        """Make the environment one in which another version is installed."""
        self.write(f"site/{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}")
        self.monkeypatch.syspath_prepend(self.folder / "site")


FEW_SUMS = {"dataset": "chain_sum", "min_terms": 2, "max_terms": 2, "max_digits": 1}


def diagnose(capsys, monkeypatch, *words):
    """Call the command in this process; return its exit code, findings and stderr."""
    command = ["chainforge", "doctor", "quick", "--json", *words]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr()
    return left.value.code or 0, json.loads(said.out)["findings"] if said.out else [], said.err


@pytest.fixture
def copy(tmp_path, monkeypatch):
    for name in ("DEEPSEEK_API_KEY", "OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return Copy(tmp_path, monkeypatch)


def no_token(copy):
    from huggingface_hub import constants

    copy.monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(copy.folder / "no-token"))
    copy.change("sft2", push_to_hub=True, hub_model_id="me/mine")


def rows_with(copy, text):
    prompts = [[{"role": "user", "content": f"{n} + 1 ="}] for n in range(4)]
    rows = [{"prompt": prompt, "completion": text} for prompt in prompts]
    copy.write("own.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    copy.stage("cold_start", data="own.jsonl")


def tests_that_were_trained_on(copy):
    rows_with(copy, write("I add.", "2"))
    rows = [{"question": f"{n} + 1 =", "answer": str(n + 1)} for n in range(2, 8)]
    params = {"path": copy.write("open.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))}
    copy.change("eval", tasks=[{"fn": "jsonl", "params": params, "split": "all"}])


def golds_that_are_none(copy):
    rows = [{"question": f"Name {n} things.", "answer": "a thing"} for n in range(40)]
    copy.write("own.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    params = {"path": str(copy.folder / "own.jsonl"), "verifier": "numeric"}
    copy.change("rl", tasks=[{"fn": "jsonl", "params": params, "split": "all"}])


def rows_without_answers(copy):
    rows = [{"question": f"Name {n} things."} for n in range(40)]
    params = {"path": copy.write("open.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))}
    task = {"fn": "jsonl", "params": params, "split": "all"}
    copy.change("rl", tasks=[task], rewards=[{"fn": "accuracy_reward"}])


def reward(copy, text, **more):
    file = copy.write("reward.py", text)
    copy.change("rl", rewards=[{"fn": f"{file}:pay"} | more])


def special_tags(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<summary>", "</summary>"]})


# What is planted; the level, check and stage of the finding; words of its text.
FAULTS = {
    "a misspelt key": (
        lambda c: c.change("rl", learning_rat=1e-4),
        "error", "settings", "rl", "did you mean 'learning_rate'?"),
    "QLoRA without an adapter": (
        lambda c: c.change("cold_start", load_in_4bit=True),
        "error", "preflight", "cold_start", "use_peft: true"),
    "vLLM on the CPU": (
        lambda c: c.change("rl", use_vllm=True), "error", "preflight", "rl", "on GPUs only"),
    "too large a batch": (
        lambda c: c.change("rl", per_device_train_batch_size=8000),
        "error", "preflight", "rl", "fewer than the"),
    "no key for the teacher": (
        lambda c: c.change("collect", teacher="deepseek"),
        "error", "preflight", "traces", "DEEPSEEK_API_KEY is not set"),
    "a teacher that is not there": (
        lambda c: c.change("collect", teacher="openai", model="m", base_url="http://127.0.0.1:9/v1"),
        "error", "server", "traces", "does not answer"),
    "groups that do not divide": (
        lambda c: c.change("rl", num_generations=6),
        "error", "settings", "rl", "make that a multiple of num_generations"),
    "a checkpoint inside a generation": (
        lambda c: c.change("rl_final", steps_per_generation=4, save_steps=6),
        "error", "preflight", "rl_final", "generation window"),
    "a template that changes the question": (
        lambda c: c.template("message['content']", "message['content'].upper()"),
        "error", "preflight", "cold_start", "changes the user turn, or leaves it out"),
    "a template that eats the answer": (
        lambda c: c.template("message['content']", "message['content'].split('qx')[0]"),
        "error", "preflight", "sft2", "leaves the assistant's text out"),
    "a template that takes no system turn": (
        lambda c: (c.template("{%", "{% if messages[0].role == 'system' %}{{ raise_exception('No "
                              "system') }}{% endif %}{%", 1), c.change("eval", system_prompt="S")),
        "error", "preflight", "eval", 'No system; set `system_prompt: ""`'),
    "a template that adds words": (
        lambda c: c.template("'<|im_end|>", "' Goodbye!<|im_end|>"),
        "error", "preflight", "cold_start", "adds ' Goodbye!<|im_end|>"),
    "an end that generation does not know": (
        lambda c: (c.edit("base/tokenizer_config.json", eos_token="<|endoftext|>"),
                   c.edit("base/generation_config.json", eos_token_id=0)),
        "error", "preflight", "cold_start", "set `eos_token: <|im_end|>` in the SFT stage"),
    "tags that are special tokens": (
        lambda c: c.tokenizer(special_tags),
        "error", "preflight", "cold_start", "the tags are lost in decoding"),
    "no tokenizer": (
        lambda c: (c.folder / "base/tokenizer_config.json").unlink(),
        "error", "preflight", "cold_start", "no tokenizer_config.json"),
    "rows of another form": (
        lambda c: rows_with(c, write("I add.", "2", "think")), "error", "preflight", "cold_start",
        "set `transcript: think`"),
    "rows of no form": (
        lambda c: rows_with(c, "I add: 2."), "error", "rows", "cold_start", "4 of 4 completions"),
    "rows with questions of the evaluation": (
        tests_that_were_trained_on, "warning", "rows", "eval", "2 rows of cold_start have questions"),
    "no tasks": (
        lambda c: c.change("rl", tasks=[]), "error", "preflight", "rl", "tasks: none given"),
    "RL on what has no answers": (
        rows_without_answers, "error", "preflight", "rl", "rewards: none applies to"),
    "more rows than there are": (
        lambda c: c.change("eval", tasks=[{"fn": "reasoning_gym", "size": 400, "split": "test",
                                             "params": FEW_SUMS}]),
        "error", "preflight", "eval", "distinct rows of split 'test' exist"),
    "rows longer than max_length": (
        lambda c: c.change("cold_start", max_length=40), "error", "preflight", "cold_start", "raise max_length"),
    "prompts longer than the model": (
        lambda c: c.edit("base/config.json", max_position_embeddings=16),
        "error", "preflight", "rl", "TRL cuts no prompt"),
    "no room for a completion": (
        lambda c: c.edit("base/config.json", max_position_embeddings=96),
        "warning", "preflight", "rejection", "write max_new_tokens:"),
    "a verifier that refuses its golds": (
        golds_that_are_none, "error", "rewards", "rl", "as much as the gold answer"),
    "a reward of a column that no row has": (
        lambda c: reward(c, "def pay(completion, colour):\n    return 1.0\n"),
        "error", "preflight", "rl", "colour"),
    "a reward that pays wrong answers more": (
        lambda c: reward(c, "def pay(completion, answer):\n    return float(answer not in completion)\n"),
        "error", "rewards", "rl", "as the gold answer"),
    "a reward for the form alone": (
        lambda c: c.change("rl", rewards=[{"fn": "format_reward"}]),
        "error", "rewards", "rl", "as much as the gold answer"),
    "another vocabulary than the teacher's": (
        lambda c: c.tokenizer(lambda t: t.add_tokens(["<extra>"]), "student_base"),
        "error", "preflight", "distill", "differ in 1 tokens"),
    "4-bit weights under FSDP 2": (
        lambda c: (c.change("cold_start", load_in_4bit=True, use_peft=True, use_cpu=False),
                   c.stage("cold_start", launch="fsdp2")),
        "error", "preflight", "cold_start", "cannot shard 4-bit weights"),
    "two processes that are one": (
        lambda c: c.launch("cold_start", "distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"),
        "error", "launch", "cold_start", "starts one process and says nothing"),
    "too small a GPU": (
        lambda c: (c.on_gpu(1024), c.change("sft2", use_cpu=False)),
        "error", "memory", "sft2", "of 1.0 GiB"),
    "a tracker that is not installed": (
        lambda c: c.change("chain", report_to="mlflow"),
        "error", "preflight", "cold_start", "mlflow is not installed; pip install mlflow"),
    "no token for the Hub": (no_token, "error", "preflight", "sft2", "set HF_TOKEN"),
    "a version that is too old": (
        lambda c: c.package("peft", "0.1.0"), "error", "versions", None, "peft 0.1.0 is too old"),
    "a version that nobody tested": (
        lambda c: c.package("peft", "9.9"), "warning", "versions", None, "peft 9.9 was not tested"),
    "a model that is not on this machine": (
        lambda c: c.change("chain", base="Qwen/Qwen2.5-0.5B"),
        "warning", "preflight", "cold_start", "--online fetches it"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, copy):
    plant, level, check, stage, words = FAULTS[name]
    plant(copy)
    findings = copy.examine(stage)
    found = [f.text for f in findings if (f.level, f.check, f.stage) == (level, check, stage)]
    assert any(words in text for text in found), findings
    assert level == "error" or not any(f.level == "error" for f in findings)


def test_the_copy_is_sound_without_a_fault(copy, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["chainforge", "doctor", "quick"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().out
    assert not left.value.code, said
    assert "0 errors, 0 warnings" in said
    assert max(map(len, said.splitlines())) <= 80
    checks = {f["check"] for f in diagnose(capsys, monkeypatch)[1]}
    assert checks == {"versions", "machine", "verifier", "preflight", "rewards", "memory"}


def test_a_template_that_a_stage_sets_is_that_of_those_after_it(copy, capsys, monkeypatch):
    """And faults are the exit code of the command."""
    template = (copy.folder / "base/chat_template.jinja").rename(copy.folder / "chatml.jinja")
    loud = "{% if quiet is not defined %}{{ raise_exception('Loud') }}{% endif %}"
    template.write_text(loud + template.read_text())
    code, findings, _ = diagnose(capsys, monkeypatch)
    bare = {f["stage"] for f in findings if f["level"] == "error"}
    assert (code, bare >= {"cold_start", "rl", "rejection", "eval"}) == (1, True)
    for name in ("cold_start", "sft2", "eval"):  # the second SFT starts from the base as well
        quiet = {"quiet": True}
        copy.change(name, chat_template_path=str(template), chat_template_kwargs=quiet)
    code, findings, _ = diagnose(capsys, monkeypatch)
    assert [f for f in findings if f["level"] != "ok"] == []


def test_keys_are_never_shown(copy, capsys, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_API_KEY", "sk-a-secret-of-mine")
    copy.change("collect", teacher="deepseek")
    code, findings, _ = diagnose(capsys, monkeypatch)
    (teacher,) = [f for f in findings if f["check"] == "teacher"]
    assert (code, teacher["level"]) == (0, "ok")
    assert "DEEPSEEK_API_KEY is set" in teacher["text"]
    assert "a-secret" not in json.dumps(findings)


def test_a_pool_that_is_not_made_yet_is_no_fault(copy):
    """Neither that of rejection sampling, nor the one whose pass rates choose prompts of RL."""
    copy.stage("rejection", data="rl", model=None)
    copy.stage("rl_final", data="rejection")
    assert [f for f in copy.examine("rl_final", launch="cpu") if f.level == "error"] == []


def test_what_a_server_runs_is_checked_for_its_processes(copy):
    """Eight processes on GPUs, looked at from a machine without any."""
    server = Machine((24 * 2**30,) * 8, 2**39, 64)
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    copy.change("rl", **dict.fromkeys(sizes, 1), use_cpu=False, num_generations=8)
    found = [f for f in copy.examine("rl", server, "ddp") if f.stage == "rl"]
    assert [f.text for f in found if f.level == "error"] == []
    (text,) = [f.text for f in found if f.check == "memory"]
    assert "of 24.0 GiB" in text
    copy.change("rl", num_generations=16)
    found = copy.examine("rl", server, "ddp")
    assert any("divisible" in f.text for f in found if f.level == "error"), found
