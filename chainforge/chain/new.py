"""`chainforge new`: copy a recipe folder to a new project of the user's own."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from chainforge.chain.spec import load_chain, safe_name
from chainforge.core import paths
from chainforge.core.config import read_yaml
from chainforge.core.errors import InputError, hint


def make_project(folder: Path, recipe: str) -> list[str]:
    """Copy the recipe folder `recipe` to `folder`; return what to print about it, line by line.

    Commands in the files get the project's own path. A path of a YAML that leads out of the recipe
    still leads there. The chain, and so the folder of its runs, is named after the project.
    """
    recipes = {
        file.parent.name: file.parent for file in paths.shipped("recipes").glob("*/chain.yaml")
    }
    if recipe not in recipes:
        raise InputError(f"--from: no recipe {recipe!r}; {hint(recipe, recipes)}")
    source, name = recipes[recipe], safe_name(folder.resolve().name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; name a new folder")
    here = paths.short(folder)
    chain = str(read_yaml(source / "chain.yaml").get("name"))
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        shutil.copytree(source, part, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        for file in part.rglob("*"):
            if file.suffix in (".yaml", ".md", ".py"):
                text = _renamed(file.read_text(encoding="utf-8"), recipe, here, chain, name)
                if file.suffix == ".yaml":
                    text = _relocated(text, source / file.parent.relative_to(part), folder)
                file.write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    load_chain(folder)  # as valid as what it was copied from
    commands = [f"  chainforge {command} {here}" for command in ("plan", "doctor", "run")]
    return [f"{here}, from the recipe {recipe}; read {here}/README.md, then:", *commands]


def _renamed(text: str, recipe: str, here: str, chain: str, name: str) -> str:
    """Return a file's text for its new place: the paths in it, and the chain's name."""
    end = r"(?![\w.-]*\w)"
    text = re.sub(rf"(?m)^.*chainforge new \S+ --from {re.escape(recipe)}.*\n\n?", "", text)
    text = re.sub(rf"recipes/{re.escape(recipe)}{end}", here, text)
    text = re.sub(rf"\bruns/{re.escape(chain)}{end}", f"runs/{name}", text)
    command = r"(chainforge (?:plan|run|show|doctor) )"
    text = re.sub(rf"{command}{re.escape(recipe)}{end}", rf"\g<1>{here}", text)
    return re.sub(rf"(?m)^name: {re.escape(chain)}\b", f"name: {name}", text)


def _relocated(text: str, source: Path, folder: Path) -> str:
    """Return a YAML's text with the paths that lead out of `source` rewritten for `folder`.

    They are relative if both ends are below the current folder and so move together, else absolute.
    """

    def path(match: re.Match[str]) -> str:
        target = Path(os.path.abspath(source / match[0]))
        if not target.exists():
            return match[0]
        together = all(path.is_relative_to(Path.cwd()) for path in (target, folder.resolve()))
        return os.path.relpath(target, folder) if together else str(target)

    return re.sub(r"(?<![\w./-])(?:\.\./)+[\w./-]*\w", path, text)
