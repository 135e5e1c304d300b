"""The shipped evaluations parse strictly, and what their README tells to type is still true."""

from pathlib import Path

import pytest
import yaml

from chainforge.core.config import parse
from chainforge.core.plugins import resolve
from chainforge.core.transcript import system_prompt
from chainforge.data.sources import PRESETS
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate.settings import SamplingArgs
from chainforge.report.gates import METRICS, read_gates
from chainforge.train.stage import RunArgs

ROOT = Path(__file__).parents[2]
EVALS = sorted(ROOT.glob("recipes/evals/*.yaml"))
README = (ROOT / "recipes/evals/README.md").read_text()


@pytest.mark.parametrize("file", EVALS, ids=lambda file: file.stem)
def test_every_evaluation_parses_and_asks_all_test_rows(file):
    args = resolve(f"{ROOT}/recipes/evaluate.py:EvaluateArgs", {})
    _, tasks, _, sampling = parse(
        RunArgs, TaskArgs, args, SamplingArgs, argv=["--config", str(file)]
    )
    sampling.check()
    for task in tasks.tasks:
        assert task["params"]["dataset"] in PRESETS
        assert task["split"] == "test"
        assert "size" not in task
    assert f"`{file.name}`" in README


def test_there_is_one_for_each_benchmark():
    named = {
        task["params"]["dataset"]
        for file in EVALS
        for task in yaml.safe_load(file.read_text())["tasks"]
    }
    assert named == {"gsm8k", "math-500", "aime24", "aime25"}


def test_two_years_are_two_tasks(tmp_path):
    """With copies on disk, as the README says."""
    pytest.importorskip("datasets")
    config = yaml.safe_load((ROOT / "recipes/evals/aime.yaml").read_text())
    for task in config["tasks"]:
        preset = task["params"]["dataset"]
        folder = tmp_path / preset
        folder.mkdir()
        lines = [f'{{"problem": "{preset} {i}?", "answer": "{i}"}}' for i in range(30)]
        (folder / "train.jsonl").write_text("\n".join(lines))
        task["params"] = {"dataset": str(folder), "preset": preset}
    rows = load_examples(TaskArgs(tasks=config["tasks"]))
    assert [row["task"] for row in rows] == ["aime24"] * 30 + ["aime25"] * 30


def test_the_readme_gives_the_system_prompt_and_gates_that_are_taken():
    assert README.count(system_prompt()) == 2  # once for each harness
    stage = yaml.safe_load(README.split("```yaml")[1].split("```")[0])[0]
    gates = read_gates(stage["gate"], stage["models"])
    assert [gate.model for gate in gates] == ["cold_start", "cold_start"]
    said = README.split("Metrics: ")[1].split("with `min`")[0]
    assert {metric for metric in METRICS if f"`{metric}`" in said} == METRICS.keys() - {"strict"}
