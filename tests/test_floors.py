"""Imports only go down: pipeline, training, data, rewards, core; and the command line is light."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import chainforge

PACKAGE = Path(chainforge.__file__).parent
FLOORS = (
    "core", "rewards", "data", "generate", "train", "hub", "report", "chain", "doctor"
)  # fmt: skip
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "scipy", "matplotlib"}
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] in FLOORS
)


def imported(path: Path) -> Iterator[str]:
    """Yield the absolute name of everything that a module imports, wherever it does so."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides its floor"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path):
    floor = FLOORS.index(path.relative_to(PACKAGE).parts[0])
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] != "recipes", f"{path} imports a recipe"
        if parts[0] == "chainforge" and len(parts) > 1 and parts[1] in FLOORS:
            assert FLOORS.index(parts[1]) <= floor, f"{path} imports {name}, which is above it"


def test_packages_re_export_nothing_but_the_version():
    for path in PACKAGE.rglob("__init__.py"):
        if path.relative_to(PACKAGE).parts[0] in (*FLOORS, "__init__.py"):
            assert not list(imported(path)), f"{path} imports something"


def test_every_floor_is_looked_at():
    assert {path.relative_to(PACKAGE).parts[0] for path in MODULES} == set(FLOORS)


def test_the_command_line_loads_nothing_heavy():
    code = "import sys, json, chainforge.cli; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(json.loads(done.stdout))
