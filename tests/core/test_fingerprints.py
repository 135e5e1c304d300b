import pytest

from chainforge.core import artifacts
from chainforge.core.artifacts import Manifest, fingerprint, input_fingerprint
from chainforge.core.errors import InputError


def manifest(mark="f" * 64):
    return Manifest("sft", mark, {}, {}, {}, {}, {}, {}, "cpu", 1, 0.0)


def test_paths_do_not_count_and_numbers_count_as_numbers():
    one = {"learning_rate": "1e-4", "output_dir": "a", "config": "x.yaml", "max_steps": 3}
    two = {"learning_rate": 0.0001, "output_dir": "b", "max_steps": "3"}
    assert fingerprint("sft", one, {}) == fingerprint("sft", two, {})


@pytest.mark.parametrize(
    ("recipe", "given", "inputs"),
    [
        ("grpo", {"max_steps": 3}, {"model": "a"}),
        ("sft", {"max_steps": 4}, {"model": "a"}),
        ("sft", {"max_steps": 3, "seed": 1}, {"model": "a"}),
        ("sft", {"max_steps": 3}, {"model": "b"}),
        ("sft", {"max_steps": True}, {"model": "a"}),
    ],
)
def test_everything_else_counts(recipe, given, inputs):
    assert fingerprint(recipe, given, inputs) != fingerprint(
        "sft", {"max_steps": 3}, {"model": "a"}
    )


def test_files_that_a_setting_names_count_by_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"rewards": [{"fn": "mine.py:good"}]}
    (tmp_path / "mine.py").write_text("a")
    before = fingerprint("grpo", given, {})
    assert fingerprint("grpo", given, {}) == before
    (tmp_path / "mine.py").write_text("b")
    assert fingerprint("grpo", given, {}) != before


def test_an_input_is_a_stage_a_folder_or_a_hub_id(tmp_path):
    assert input_fingerprint("Qwen/Qwen2.5-0.5B") == "hub:Qwen/Qwen2.5-0.5B"
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    plain = input_fingerprint(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{ }")
    assert input_fingerprint(tmp_path / "model") != plain
    manifest("abc").write(tmp_path)
    assert input_fingerprint(tmp_path / "model") == input_fingerprint(tmp_path) == "abc"


def test_an_unfinished_stage_is_no_input(tmp_path):
    artifacts.write_json(tmp_path / "stage.json", {})
    with pytest.raises(InputError, match="not finished"):
        input_fingerprint(tmp_path)


def test_changes_are_said_in_words():
    assert artifacts.changes({"a": 1, "b": "1e-4"}, {"b": 2e-4, "c": 1}) == [
        "a: 1 -> not set",
        "b: 0.0001 -> 0.0002",
        "c: not set -> 1",
    ]


LAYOUT = {
    "reward.py": "import helper\nfrom kit import (tool,\n  other)\n\ndef good(completion): return 1.0",
    "helper.py": "import json, far.away as away",
    "kit/__init__.py": "",
    "kit/tool.py": "from .. import nothing\nfrom . import deep\nfrom .deep.down import x",
    "kit/deep/down.py": "x = 1",
    "far/away.py": "def f():\n    import late",
    "late.py": "1",
    "unused.py": "1",
    "broken.py": "def (",
    "lib/packed/mod.py": "import packed.other",
    "lib/packed/other.py": "1",
}
RUN = {
    "reward.py:good": {"reward.py", "helper.py", "kit/__init__.py", "kit/tool.py",
                       "kit/deep/down.py", "far/away.py", "late.py"},
    "reward:good": {"reward.py", "helper.py", "kit/__init__.py", "kit/tool.py",
                    "kit/deep/down.py", "far/away.py", "late.py"},
    "kit.tool:use": {"kit/__init__.py", "kit/tool.py", "kit/deep/down.py"},
    "packed.mod:use": {"lib/packed/mod.py", "lib/packed/other.py"},
    "broken.py:f": {"broken.py"},
    "json:loads": set(),
    "chainforge.rewards.functions:accuracy_reward": set(),
    "Question: what is unused?": set(),
}  # fmt: skip


@pytest.mark.parametrize("script", [False, True], ids=["in the settings", "as the recipe"])
@pytest.mark.parametrize("reference", RUN)
def test_code_counts_with_what_it_imports(tmp_path, monkeypatch, reference, script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "lib")
    monkeypatch.syspath_prepend("lib")
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


def test_where_code_is_says_nothing_of_what_it_does(tmp_path, monkeypatch):
    found = set()
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        (tmp_path / place / "reward.py").write_text("import helper")
        (tmp_path / place / "helper.py").write_text("1")
        found.add(fingerprint("grpo", {"fn": "reward.py:good"}, {}))
    assert len(found) == 1
