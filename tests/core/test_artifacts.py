import json
import os
import signal
import subprocess
import sys

import pytest

from chainforge.core import artifacts
from chainforge.core.artifacts import Manifest, lock
from chainforge.core.errors import InputError


def manifest(mark="f" * 64):
    return Manifest("sft", mark, {}, {}, {}, {}, {}, {}, "cpu", 1, 0.0)


def test_a_manifest_comes_back(tmp_path):
    assert artifacts.read_manifest(tmp_path) is None
    manifest().write(tmp_path)
    read = artifacts.read_manifest(tmp_path)
    assert read.recipe == "sft"
    assert read.finished


def test_a_foreign_manifest_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text('{"version": 9}')
    with pytest.raises(InputError, match="manifest.json is not a manifest"):
        artifacts.read_manifest(tmp_path)


def test_a_directory_is_held_by_one(tmp_path):
    code = (
        "import sys, time; from chainforge.core.artifacts import lock\n"
        f"with lock({str(tmp_path)!r}): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"in use by process {holder.pid} on"), lock(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with lock(tmp_path):
        pass


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"n": 1})
    with pytest.raises(TypeError):
        artifacts.write_json(path, {("a", "b"): 2})
    assert json.loads(path.read_text()) == {"n": 1}
