"""The package's structure: imports go down, the command line is light, and nothing grows."""

import json
import subprocess
import sys

import house
import pytest

# What is still above its limit may only shrink.
OVER = {
    "modules": 82,
    "lines in chainforge/": 20_608,
    "lines in tests/": 17_606,
    "lines reached from recipes/sft.py": 3_885,
}
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "scipy", "matplotlib"}


def test_imports_only_go_down_and_in_no_circle():
    edges = house.graph()
    assert house.upward(edges) == []
    assert house.cycles(edges) == []
    assert house.cycles(house.packages(edges)) == []
    assert {name.split(".")[1] for name in edges} - {"api", "cli"} == set(house.FLOORS)
    for path in house.modules().values():
        assert not [name for name in house.imports(path) if name.startswith("recipes")], path


def test_packages_import_nothing_of_ours_when_they_are_imported():
    for path in house.PACKAGE.rglob("__init__.py"):
        known = {name.partition(".")[0] for name in house.imports(path, eager=True)}
        assert known <= {"importlib", "pathlib", "sys", "types", "typing"}, path


@pytest.mark.parametrize(("name", "value"), house.measures().items())
def test_measure_is_within_its_limit(name, value):
    assert value <= OVER.get(name, house.LIMITS[name])


def test_a_cycle_an_import_that_goes_up_and_a_private_name_are_seen(tmp_path):
    assert house.cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert house.upward({"chainforge.core.x": {"chainforge.data.y"}})
    file = tmp_path / "file.py"
    for text in ("from trl.trainer.utils import x", "trainer._load_best_model()"):
        file.write_text(text)
        assert house._is_private(file)
    file.write_text("from trl import SFTTrainer\nself._mine = 1")
    assert not house._is_private(file)


def test_the_command_line_loads_nothing_heavy():
    code = "import sys, json, chainforge, chainforge.cli; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(json.loads(done.stdout))
