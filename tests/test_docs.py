"""The documentation: it builds, and its commands, settings, messages and notebook are right."""

import ast
import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import configs
import nbformat
import pandas
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from nbclient import NotebookClient
from report.chromium import Chromium, find
from typer.main import get_command

import chainforge
from chainforge.chain import spec
from chainforge.chain.plan import override
from chainforge.cli import app
from chainforge.core.config import parse, read_yaml
from chainforge.core.errors import InputError

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *ROOT.glob("recipes/*/README.md")]
PAGES = sorted([*READMES, *(ROOT / "docs").rglob("*.md")])
RECIPES = [path.stem for path in sorted(ROOT.glob("recipes/*.py"))]
EXAMPLES = ("mine", "my-project")  # chains that a page only names
OURS = re.compile(r"(?:^|\s)(?:chainforge |make |\S*recipes/\w+\.py(?=\s))")


def blocks(*kinds):
    """Return the code blocks of these kinds, with the page of each."""
    for page in PAGES:
        for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S):
            if kind in kinds and not text.startswith("--8<--"):
                yield pytest.param(text, id=f"{page.relative_to(ROOT)}: {text[:40]!r}")


def commands():
    """Return each line of a shell that starts something of ours, as words."""
    for block in blocks("", "bash", "sh"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+#.*|; done$", "", line).replace("$seed", "1").strip()
            if (found := OURS.search(line)) and not line.startswith("#"):
                yield pytest.param(line[found.start() :].strip(), id=block.id.split(":")[0])


def parsed(recipe, words):
    """Parse settings as a recipe does, for the CPU."""
    on_cpu = ["--use_cpu", "true", "--bf16", "false"]
    kinds = configs.recipe(recipe).CONFIGS
    trains = any(field.name == "use_cpu" for kind in kinds for field in dataclasses.fields(kind))
    return parse(*kinds, argv=[*words, *(on_cpu if trains else [])])


@pytest.mark.parametrize("line", commands())
def test_every_command_is_one_of_the_real_parsers(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif words[0] == "chainforge":
        group = get_command(app)
        with group.make_context("chainforge", words[1:]) as context:
            name, command, rest = group.resolve_command(context, words[1:])
            given = command.make_context(name, rest, parent=context).params
        if given.get("chain") not in (None, *EXAMPLES):
            chain = spec.load_chain(given["chain"])
            override(chain, given.get("sets") or (), given.get("seed"), given.get("launch"))
    else:
        script = next(n for n, word in enumerate(words) if "recipes/" in word)
        parsed(Path(words[script]).stem, words[script + 1 :])


@pytest.mark.parametrize("text", blocks("yaml"))
def test_every_yaml_is_read_by_the_strict_parser(text, tmp_path):
    file = tmp_path / "page.yaml"
    file.write_text("stages:\n" + text if text.lstrip().startswith("- ") else text)
    given = read_yaml(file)
    if "model_parameters" in given:  # lighteval's
        return
    if given.keys() & {"stages", "set"}:
        for stage in given.get("stages", ()):
            spec._stage(stage, 1, tmp_path)
        for key, settings in given.get("set", {}).items():
            training = [name for name, kind in spec.RECIPES.items() if kind.trains]
            kinds = training if key == spec.TRAINING else [key]
            words = [f"--{name}={value}" for name, value in settings.items()]
            assert [parsed(kind, words) for kind in kinds]
        return
    refusals = {}
    for recipe in RECIPES:
        try:
            parsed(recipe, ["--config", str(file)])
        except InputError as error:
            refusals[recipe] = str(error)
    assert len(refusals) < len(RECIPES), refusals


def said(node):
    """Return the text of a message in the code, with a dot for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_every_message_of_the_troubleshooting_is_one_of_the_code():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^\| `(.*?)` \|", page, re.M)
    assert len(messages) > 30
    files = [*(ROOT / "chainforge").rglob("*.py"), *ROOT.glob("recipes/*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    code = "\n".join(filter(None, map(said, nodes)))
    parts = {part for message in messages for part in message.split("…") if len(part) > 8}
    assert not [part for part in parts if part.strip() not in code]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        build(load_config("mkdocs.yml", site_dir=str(folder), strict=True))
    return folder


def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    loaded = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?https?:")
    assert not [page for page in pages if loaded.search(page.read_text())]
    for recipe in RECIPES:
        text = (site / f"stages/{recipe}.html").read_text()
        assert "<code>output_dir</code>" in text
    assert not [page for page in pages if re.search("--8 ?&lt;", page.read_text())]  # a snippet
    assert "rl_final" in (site / "index.html").read_text()
    assert "chain/plan.py" in (site / "code.html").read_text()
    assert (site / "benchmarks/receipts/cpu-single-sft-full.json").is_file()


@pytest.mark.skipif(not find(), reason="needs Chromium")
def test_no_page_is_wider_than_a_phone(site, tmp_path):
    browser = Chromium(tmp_path)
    browser.look(390, 844)
    wide = []
    for page in sorted(site.rglob("*.html")):
        browser.open(page)
        wide += [page] if browser.js("document.documentElement.scrollWidth") > 390 else []
    browser.close()
    assert not wide


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs/quickstart.ipynb", as_version=4)
    assert sum(bool(cell.get("outputs")) for cell in notebook.cells) >= 8  # are stored
    assert not re.search(r"(?:^|\s)/\w+/|Warning", str(notebook))  # none of this machine
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=None, resources=where).execute()
    run = tmp_path / "runs/custom"
    table = chainforge.results(run)
    assert list(table.index) == ["base", "cold_start", "rl"]
    assert table.strict_mean["rl"] > table.strict_high["base"]
    assert (table.strict_low <= table.strict_mean).all()
    assert list(chainforge.results(run, pairs=True)["to"]) == ["cold_start", "rl"]
    samples = chainforge.load_samples(run / "rl")
    assert isinstance(samples, pandas.DataFrame)
    assert {"prompt", "completion", "rewards", "reward", "step"} <= set(samples.columns)
    assert chainforge.report(run) == run / "report.html"
    states = notebook.cells[-2].outputs[0]["data"]["text/plain"]
    assert re.search(r"cold_start +done", states)
    assert re.search(r"rl +stale +\[learning_rate: 0.0001 -> 0.0002\]", states)
    shutil.rmtree(run / "eval")
    with pytest.raises(InputError, match="no stage of this run has a results.json"):
        chainforge.results(run)
    with pytest.raises(InputError, match=r"no samples: expected .* with rollouts\.jsonl"):
        chainforge.load_samples(run / "cold_start")
