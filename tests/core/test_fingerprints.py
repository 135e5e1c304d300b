import pytest

from chainforge.core import artifacts, fingerprints
from chainforge.core.artifacts import Manifest
from chainforge.core.errors import InputError
from chainforge.core.fingerprints import fingerprint, input_fingerprint


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
    assert fingerprints.changes({"a": 1, "b": "1e-4"}, {"b": 2e-4, "c": 1}) == [
        "a: 1 -> not set",
        "b: 0.0001 -> 0.0002",
        "c: not set -> 1",
    ]
