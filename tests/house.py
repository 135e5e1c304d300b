"""Print the measures of the package's size and structure, with their limits.

python tests/house.py
"""

import ast
import dataclasses
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
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name: str, known: dict[str, Path]) -> str | None:
    """Return the module that an imported name is or lies in."""
    return next((m for m in (name, name.rpartition(".")[0]) if m in known), None)


def graph(eager: bool = False) -> dict[str, set[str]]:
    """Return which modules each module of the package imports."""
    known = modules()
    return {
        name: {found for given in imports(path, eager) if (found := module_of(given, known))}
        - {name}
        for name, path in known.items()
    }


def knots(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected parts of more than one node (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    sys.setrecursionlimit(5000)
    for node in edges:
        if node not in index:
            visit(node)
    return found


def floors(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return which sub-packages each sub-package imports."""
    found: dict[str, set[str]] = {}
    for name, others in edges.items():
        own = name.split(".")[1]
        found.setdefault(own, set()).update({o.split(".")[1] for o in others} - {own})
    return found


def upward(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Return the imports that do not go down the list of sub-packages."""
    rank = {name: place for place, name in enumerate(FLOORS)}
    return [
        (name, other)
        for name, others in edges.items()
        for other in sorted(others)
        if rank.get(other.split(".")[1], 99) > rank.get(name.split(".")[1], 99)
    ]


def reached(start: Path) -> set[Path]:
    """Return the package's files that importing a recipe loads."""
    known, edges = modules(), graph(eager=True)
    queue = [found for name in imports(start, eager=True) if (found := module_of(name, known))]
    seen: set[str] = set()
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue += edges[name]
    return {known[name] for name in seen}


def private_trl_files() -> list[str]:
    """Return the files that import from TRL's private or experimental names."""
    found = []
    for name, path in modules().items():
        for given in imports(path):
            parts = given.split(".")
            if parts[0] == "trl" and any(p.startswith("_") or p == "experimental" for p in parts):
                found.append(name)
                break
    return found


def own_settings() -> set[str]:
    """Return the settings of the recipes that TRL does not have."""
    import importlib

    found: set[str] = set()
    for module in modules():
        tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Args"):
                kind = getattr(importlib.import_module(module), node.name)
                if dataclasses.is_dataclass(kind):
                    found |= {field.name for field in dataclasses.fields(kind)}
    from transformers import TrainingArguments
    from trl import DistillationConfig, GRPOConfig, ModelConfig, SFTConfig

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
        "lines reached from recipes/sft.py": lines(sorted(reached(ROOT / "recipes/sft.py"))),
        "import cycles between modules": len(knots(edges)),
        "import cycles between sub-packages": len(knots(floors(edges))),
        "imports that go up": len(upward(edges)),
        "files with private TRL names": len(private_trl_files()),
        "own settings": len(own_settings()),
        "lines in README.md": lines([ROOT / "README.md"]),
    }


def main() -> None:
    print(f"{'measure':<40}{'now':>8}{'limit':>8}")
    for name, value in measures().items():
        print(f"{name:<40}{value:>8,}{LIMITS[name]:>8,}{'' if value <= LIMITS[name] else '  over'}")
    edges = graph()
    for part in (*knots(edges), *knots(floors(edges)), *upward(edges), private_trl_files()):
        print("  " + " ".join(part))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
