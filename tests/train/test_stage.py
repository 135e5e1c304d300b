"""A stage signs what it leaves, resumes only with the same settings, and overwrites nothing."""

import json
import os
import subprocess
import sys

import pytest

from chainforge.core import artifacts
from chainforge.core.errors import InputError
from chainforge.train.stage import open_stage


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--max_steps", "3", "--output_dir", "out"])


def work(directory, **options):
    with open_stage("sft", str(directory), **options) as stage:
        stage.path("samples.jsonl").write_text("{}\n")
        stage.metrics["rows"] = 1
    return stage


def fail(directory):
    with pytest.raises(RuntimeError), open_stage("sft", str(directory)):
        raise RuntimeError


def test_a_stage_signs_what_it_leaves_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_CANARY")
    monkeypatch.setenv("DEEPSEEK_API_KEY", "sk-CANARY")
    directory = tmp_path / "runs/cold"
    stage = work(directory, seed=7, inputs={"model": "Qwen/Qwen2.5-0.5B"})
    manifest = artifacts.read_manifest(directory)
    assert (manifest.seed, manifest.metrics, manifest.given) == (7, {"rows": 1}, {"max_steps": 3})
    assert manifest.outputs["samples.jsonl"] == artifacts.sha256(directory / "samples.jsonl")
    assert set(manifest.outputs) == {"samples.jsonl", "config.yaml"}
    assert {"torch", "trl", "chainforge"} <= set(manifest.versions)
    inputs = {"model": artifacts.input_fingerprint("Qwen/Qwen2.5-0.5B")}
    known = artifacts.fingerprint("sft", {"max_steps": 3}, inputs)  # to the chain, before
    assert manifest.fingerprint == stage.fingerprint == known
    assert not any("CANARY" in path.read_text() for path in directory.iterdir())


def test_a_stage_that_fails_is_not_signed_and_resumes_and_done_is_done(tmp_path):
    fail(tmp_path / "a")
    assert artifacts.read_manifest(tmp_path / "a") is None
    work(tmp_path / "a")
    before = (tmp_path / "a/manifest.json").read_bytes()
    with pytest.raises(SystemExit) as leaving:
        work(tmp_path / "a")
    assert leaving.value.code == 0
    assert (tmp_path / "a/manifest.json").read_bytes() == before


def test_the_time_of_a_stage_is_that_of_all_its_parts(tmp_path):
    for _ in range(2):  # two parts that were cut off, each a minute after it began
        fail(tmp_path)
        (tmp_path / "progress.json").write_text("{}")
        began = (tmp_path / "stage.json").stat().st_mtime
        os.utime(tmp_path / "progress.json", (began + 60, began + 60))
    work(tmp_path)
    assert 120 <= artifacts.read_manifest(tmp_path).seconds < 150


def test_other_settings_or_inputs_never_overwrite(tmp_path, monkeypatch):
    work(tmp_path / "done", inputs={"model": "x/y"})
    fail(tmp_path / "cut")
    with pytest.raises(InputError, match="model: the input changed"):
        work(tmp_path / "done", inputs={"model": "x/z"})
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--max_steps", "4"])
    for name, what in (("done", "a finished"), ("cut", "an unfinished")):
        words = f"contains {what} stage with different settings .max_steps: 3 -> 4"
        with pytest.raises(InputError, match=words):
            work(tmp_path / name)


def test_a_folder_that_is_no_stage_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(InputError, match=r"not empty and not a stage's .*thesis.tex"):
        work(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"thesis.tex", ".lock"}


def test_a_second_run_in_one_directory_is_refused(tmp_path):
    code = (
        "import sys, time; sys.argv = ['x', '--max_steps', '3']\n"
        "from chainforge.train.stage import open_stage\n"
        f"with open_stage('sft', {str(tmp_path / 'a')!r}): print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "open\n"
        try:
            with pytest.raises(InputError, match=f"in use by process {first.pid}"):
                work(tmp_path / "a")
        finally:
            first.kill()
    work(tmp_path / "a")


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    with open_stage("sft", str(tmp_path / "a")) as stage:
        stage.progress(1, 2, "steps", "loss 0.5")
        word = json.loads(stage.path("progress.json").read_text())
    assert word == {"done": 1, "total": 2, "unit": "steps", "note": "loss 0.5"}
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "b").mkdir()
    with open_stage("sft", str(tmp_path / "b")) as stage:
        stage.progress(1, 2, "steps")
    assert os.listdir(tmp_path / "b") == []
