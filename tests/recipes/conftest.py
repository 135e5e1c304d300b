import sys

import configs
import pytest
import yaml

from chainforge.core import process


@pytest.fixture
def recipe(monkeypatch, capsys):
    """Run a recipe in this process as its command line would; return its exit code and stderr."""

    def run(name, *argv):
        module = configs.recipe(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        try:
            process.run(module.main)
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def stage(recipe, tmp_path):
    """Run a recipe with settings in a file; `name` is the file's and the output folder's."""

    def run(kind, name, settings, *flags):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        given = ["--config", tmp_path / f"{name}.yaml", "--output_dir", tmp_path / name]
        return recipe(kind, *given, *flags)

    return run
