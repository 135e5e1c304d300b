import cProfile
import os
import signal
import subprocess
import sys

import pytest

from chainforge.core import artifacts
from chainforge.core.artifacts import Manifest, fingerprint, input_fingerprint, lock
from chainforge.core.errors import InputError
from chainforge.core.plugins import sources
from chainforge.core.run_dir import holder


def manifest(mark="f" * 64):
    return Manifest("sft", mark)


def test_a_directory_is_held_by_one_who_is_named_while_it_lives(tmp_path):
    assert holder(tmp_path) is None
    code = (
        "import sys, time; from chainforge.core.artifacts import lock\n"
        f"with lock({str(tmp_path)!r}): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"in use by process {other.pid} on"), lock(tmp_path):
        pass
    assert holder(tmp_path).startswith(f"process {other.pid} on ")
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert holder(tmp_path) is None
    with lock(tmp_path):
        assert holder(tmp_path).startswith(f"process {os.getpid()} on ")
    assert holder(tmp_path) is None


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
    "other contents": (lambda path: path.write_text("thr33"), "model/a is not what", True),
    "bit rot": (flip_unseen, "model/a is not what", False),
    "touched": (lambda path: os.utime(path, (1, 1)), None, True),
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


def test_paths_do_not_count_and_numbers_count_as_numbers():
    one = {"learning_rate": 1.0, "output_dir": "a", "config": "x.yaml", "max_steps": 3}
    two = {"learning_rate": 1, "output_dir": "b", "max_steps": 3}
    assert fingerprint("sft", one, {}) == fingerprint("sft", two, {})
    for recipe, given, inputs in (
        ("grpo", one, {}), ("sft", one | {"max_steps": 4}, {}), ("sft", one | {"seed": 1}, {}),
        ("sft", one, {"model": "b"}), ("sft", one | {"max_steps": True}, {}),
    ):  # fmt: skip
        assert fingerprint(recipe, given, inputs) != fingerprint("sft", one, {})


def test_an_input_is_a_stage_a_folder_or_a_hub_id(tmp_path):
    assert input_fingerprint("Qwen/Qwen2.5-0.5B") == "hub:Qwen/Qwen2.5-0.5B"
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    plain = input_fingerprint(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{ }")
    assert input_fingerprint(tmp_path / "model") != plain
    manifest("abc").write(tmp_path)
    assert input_fingerprint(tmp_path / "model") == input_fingerprint(tmp_path) == "abc"
    (tmp_path / "manifest.json").rename(tmp_path / "stage.json")
    with pytest.raises(InputError, match="not finished"):
        input_fingerprint(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 9}')
    with pytest.raises(InputError, match="manifest.json is damaged, or not of this version"):
        input_fingerprint(tmp_path)


LAYOUT = {
    "reward.py": "import helper\nfrom kit import (tool,\n  other)\n\ndef good(completion): return 1.0",
    "helper.py": "import json, far.away as away",
    "kit/tool.py": "x = 1",
    "far/away.py": "def f():\n    import late",
    "late.py": "1",
    "unused.py": "1",
    "broken.py": "def (",
}
ALL = {"reward.py", "helper.py", "kit/tool.py", "far/away.py", "late.py"}
RUN = {
    "reward.py:good": ALL,
    "reward:good": ALL,
    "kit.tool:use": {"kit/tool.py"},
    "broken.py:f": {"broken.py"},
    "json:loads": set(),
    "chainforge.rewards.functions:accuracy_reward": set(),
    "Question: what is unused?": set(),
}


@pytest.mark.parametrize("script", [False, True], ids=["in the settings", "as the recipe"])
@pytest.mark.parametrize("reference", RUN)
def test_code_counts_with_what_it_imports(tmp_path, monkeypatch, reference, script):
    monkeypatch.chdir(tmp_path)
    for name, text in LAYOUT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def now():
        if script:
            return fingerprint("mine", {}, {}, reference.partition(":")[0])
        return fingerprint("grpo", {"rewards": [{"fn": reference}], "n": 3}, {})

    before, seen = now(), set()
    for name, text in LAYOUT.items():
        (tmp_path / name).write_text(f"{text}\n# another")
        seen |= {name} if now() != before else set()
        (tmp_path / name).write_text(text)
    assert now() == before
    assert seen == (RUN[reference] if not script or ".py" in reference else set())


def test_a_recipe_under_a_profiler_is_not_made_from_the_standard_library():
    assert sources(cProfile.__file__) == {}
