import errno
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


def signed(folder, files):
    """Sign a stage that left these files."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    made = manifest()
    made.outputs, made.states = artifacts.sign_for(folder, files)
    made.write(folder)
    return artifacts.read_manifest(folder)


def flip_unseen(path):
    """Flip a bit, and give the file its time back, as bit rot does."""
    state, data = path.stat(), bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


DAMAGE = {
    "removed": (lambda path: path.unlink(), "model/a is missing", True),
    "cut": (lambda path: path.write_text(""), "model/a has 0 bytes", True),
    "other contents": (lambda path: path.write_text("thr33"), "model/a is not what", True),
    "bit rot": (flip_unseen, "model/a is not what", False),
    "touched": (lambda path: os.utime(path, (1, 1)), None, True),
    "whole": (lambda path: None, None, True),
}


@pytest.mark.parametrize(("harm", "words", "at_a_glance"), DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_is_not_what_was_signed_is_named(tmp_path, harm, words, at_a_glance):
    made = signed(tmp_path, {"model/a": "three", "models": "one"})
    assert artifacts.damage(tmp_path, made, thorough=True) == []
    harm(tmp_path / "model/a")
    for part, thorough in (("", True), ("model", True), ("", False), ("models", True)):
        found = artifacts.damage(tmp_path, made, part, thorough=thorough)
        seen = words and part != "models" and (thorough or at_a_glance)
        assert [text.startswith(words) for text in found] == ([True] if seen else [])


def test_a_manifest_of_an_earlier_version_is_held_to_its_hashes(tmp_path):
    made = signed(tmp_path, {"a": "one"})
    made.states = {}
    assert artifacts.damage(tmp_path, made) == []
    (tmp_path / "a").write_text("two")
    assert "a is not what was signed" in artifacts.damage(tmp_path, made)[0]


def test_a_holder_is_named_while_it_holds(tmp_path):
    assert artifacts.holder(tmp_path) is None
    with lock(tmp_path):
        assert artifacts.holder(tmp_path).startswith(f"process {os.getpid()} on ")
    assert artifacts.holder(tmp_path) is None
    (tmp_path / artifacts.HOLDER).write_text("process 1 on a machine that went off")
    assert artifacts.holder(tmp_path) is None


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    import fcntl

    def no_locks(*words):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(InputError, match="gives no locks .No locks available"), lock(tmp_path):
        pass


@pytest.mark.parametrize("target", ["/proc/nowhere/x", "out"])
def test_a_directory_that_cannot_be_made_is_named(tmp_path, target):
    (tmp_path / "out").symlink_to(target)
    with (
        pytest.raises(InputError, match="out: no folder can be made there"),
        lock(tmp_path / "out"),
    ):
        pass
