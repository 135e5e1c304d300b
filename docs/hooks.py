"""What mkdocs does besides: pages made of other files of the repository, and tables of settings.

A link in a page is relative to where its file is in the repository, so that it works there too.
Here it is changed to where the site has that file; a file that is no page is copied.
"""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from chainforge.core.options import tables
from chainforge.core.plugins import load_file

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "benchmarks/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("recipes/*/README.md"))
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")
MADE = re.compile(r"<!-- (settings|modules)(?:: (\w+))? -->")
CODE = re.compile(r"`[^`\n]+`")  # in a table GitHub needs \| there, and Python-Markdown |
PACKAGES = "doctor report chain hub train generate data rewards core"  # the highest first


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are elsewhere in the repository, and what pages link to."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, "quickstart.md", content=notebook("docs/quickstart.ipynb")))
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            path = _target(page.src_uri, target)
            if path.is_file() and not files.get_file_from_path(_uri(path)):
                files.append(File.generated(config, _uri(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Change links to files of the repository to the site's, and insert tables of settings."""
    here = os.path.dirname(page.file.src_uri)

    def changed(match: re.Match[str]) -> str:
        path = _target(page.file.src_uri, match[1])
        return os.path.relpath(_uri(path), here or ".") if path.is_file() else match[1]

    markdown = LINK.sub(changed, markdown)
    markdown = MADE.sub(lambda match: settings(match[2]) if match[2] else modules(), markdown)
    return CODE.sub(lambda match: match[0].replace("\\|", "|"), markdown)


def _target(page: str, target: str) -> Path:
    """Return which file of the repository a page's link means."""
    own = page in PAGES or page.startswith(("benchmarks/", "recipes/"))
    return Path(os.path.normpath(ROOT / ("." if own else "docs") / os.path.dirname(page) / target))


def _uri(path: Path) -> str:
    """Return where the site has a file of the repository."""
    return str(path.relative_to(ROOT)).removeprefix("docs/")


def notebook(name: str) -> str:
    """Return a notebook as Markdown: its text, its code, and what that printed."""
    parts = []
    for cell in json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            html = "".join(data.get("text/html", ""))
            plain = "".join(output.get("text") or data.get("text/plain", "")).rstrip()
            table = re.sub(r"(?s)<style.*?</style>\s*| (?:border|class|style)=\"[^\"]*\"", "", html)
            parts.append(table if "<table" in table else f"```text\n{plain}\n```")
    return "\n\n".join([*parts, f"[The notebook of this page]({os.path.basename(name)})"])


def settings(recipe: str) -> str:
    """Return the tables of a recipe's settings: its own, and those of TRL that are set most."""
    return tables(load_file(ROOT / f"recipes/{recipe}.py").CONFIGS)


def modules() -> str:
    """Return the table of the package's modules, each with the first sentence about it."""
    rows = ["| module | |", "|---|---|"]
    for package in PACKAGES.split():
        for path in sorted((ROOT / "chainforge" / package).glob("[!_]*.py")):
            about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            first = " ".join(about.split("\n\n")[0].split())
            rows.append(f"| `{package}/{path.name}` | {first} |")
    return "\n".join(rows)
