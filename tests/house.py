"""Print the measures of the package's size and structure, with their limits.

    python tests/house.py                 # a few seconds
    python tests/house.py runs/quickstart # also which modules made this chain, from its logs

For the second, run the chain with PYTHONPROFILEIMPORTTIME=1, so that its logs list the imports.
"""

import ast
import dataclasses
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "chainforge"
FLOORS = ("core", "rewards", "data", "generate", "train", "hub", "report", "chain", "doctor")
LIMITS = {
    "lines in chainforge/": 13_000,
    "modules": 75,
    "lines in tests/": 12_500,
    "lines reached from recipes/sft.py": 3_500,
    "import cycles between modules": 0,
    "import cycles between sub-packages": 0,
    "imports that go up": 0,
    "files with private TRL names": 1,
    "own settings": 80,
    "lines in README.md": 160,
}
PUBLIC_TRL = {"trl", "trl.scripts.utils.TrlParser"}  # and what can be imported from `trl` itself

Edges = dict[str, set[str]]


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def modules() -> dict[str, Path]:
    """Return every module of the package that holds anything, by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py"
    }


def imports(path: Path, eager: bool = False) -> Iterator[str]:
    """Yield the dotted name of everything that a file imports; eager leaves out functions'."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if eager and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if eager and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            yield child
            yield from walk(child)

    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides its sub-package"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph(eager: bool = False) -> Edges:
    """Return which modules each module of the package imports."""
    known = modules()
    return {name: _known(path, known, eager) - {name} for name, path in known.items()}


def _known(path: Path, known: dict[str, Path], eager: bool) -> set[str]:
    names = {part for name in imports(path, eager) for part in (name, name.rpartition(".")[0])}
    return names & set(known)


def cycles(edges: Edges) -> list[set[str]]:
    """Return the sets of nodes that reach each other."""
    reach = {node: reached(edges, {node}) for node in edges}
    found = {frozenset(o for o in reach[n] if n in reach.get(o, ())) | {n} for n in edges}
    return [set(part) for part in found if len(part) > 1]


def reached(edges: Edges, start: set[str]) -> set[str]:
    """Return every node that can be reached from the start, which is not among them by itself."""
    seen: set[str] = set()
    queue = list(start)
    while queue:
        new = edges.get(queue.pop(), set()) - seen
        seen |= new
        queue += new
    return seen


def packages(edges: Edges) -> Edges:
    """Return which sub-packages each sub-package imports."""
    found: Edges = {}
    for name, others in edges.items():
        own = name.split(".")[1]
        found.setdefault(own, set()).update({o.split(".")[1] for o in others} - {own})
    return found


def upward(edges: Edges) -> list[str]:
    """Return the imports that do not go down the list of sub-packages."""
    rank = {name: place for place, name in enumerate(FLOORS)}
    return [
        f"{name} imports {other}"
        for name, others in edges.items()
        for other in sorted(others)
        if rank.get(other.split(".")[1], 99) > rank.get(name.split(".")[1], 99)
    ]


def reached_from(recipe: Path) -> list[Path]:
    """Return the package's files that importing a recipe loads."""
    known = modules()
    first = _known(recipe, known, eager=True)
    return [known[name] for name in first | reached(graph(eager=True), first)]


def private_trl_files() -> list[str]:
    """Return the files with names of TRL or of its trainers that are not documented."""
    places = [*modules().values(), *sorted((ROOT / "recipes").glob("*.py"))]
    return [str(path.relative_to(ROOT)) for path in places if _is_private(path)]


def _is_private(path: Path) -> bool:
    for name in imports(path):
        if name.startswith("trl.") and name.count(".") > 1 and name not in PUBLIC_TRL:
            return True
    return any(
        isinstance(node, ast.Attribute)
        and re.match("_[a-z]", node.attr)
        and isinstance(node.value, ast.Name)
        and node.value.id == "trainer"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )


def own_settings() -> set[str]:
    """Return the settings of the recipes that TRL does not have."""
    from transformers import TrainingArguments
    from trl import DistillationConfig, GRPOConfig, ModelConfig, SFTConfig

    found: set[str] = set()
    for module, path in modules().items():
        for name in re.findall(r"^class (\w+Args)\b", path.read_text(encoding="utf-8"), re.M):
            kind = getattr(importlib.import_module(module), name)
            if dataclasses.is_dataclass(kind):
                found |= {field.name for field in dataclasses.fields(kind)}
    for kind in (TrainingArguments, SFTConfig, GRPOConfig, DistillationConfig, ModelConfig):
        found -= {field.name for field in dataclasses.fields(kind)}
    return found


def measures() -> dict[str, int]:
    """Return every measure of `LIMITS`."""
    edges = graph()
    return {
        "lines in chainforge/": lines(sorted(PACKAGE.rglob("*.py"))),
        "modules": len(modules()),
        "lines in tests/": lines(sorted((ROOT / "tests").rglob("*.py"))),
        "lines reached from recipes/sft.py": lines(reached_from(ROOT / "recipes/sft.py")),
        "import cycles between modules": len(cycles(edges)),
        "import cycles between sub-packages": len(cycles(packages(edges))),
        "imports that go up": len(upward(edges)),
        "files with private TRL names": len(private_trl_files()),
        "own settings": len(own_settings()),
        "lines in README.md": lines([ROOT / "README.md"]),
    }


def modules_in_logs(folder: Path) -> set[str]:
    """Return the package's modules that the logs of a chain's stages list as imported."""
    logs = [path.read_text(errors="replace") for path in folder.glob("*/log.txt")]
    return {name for log in logs for name in re.findall(r"\| +(chainforge\.\w+\.\w+)", log)}


def main() -> None:
    print(f"{'measure':<40}{'now':>8}{'limit':>8}")
    for name, value in measures().items():
        print(f"{name:<40}{value:>8,}{LIMITS[name]:>8,}{'' if value <= LIMITS[name] else '  over'}")
    for folder in sys.argv[1:]:
        print(f"{'modules that made ' + folder:<40}{len(modules_in_logs(Path(folder))):>8,}{55:>8}")
    edges = graph()
    for part in (*cycles(edges), *cycles(packages(edges)), *upward(edges), *private_trl_files()):
        print(f"  {part}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
