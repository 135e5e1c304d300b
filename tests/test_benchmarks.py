"""The benchmarks run, compare like with like, and the table says what the results say."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from chainforge.core.jsonl import write_rows
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.rewards.functions import accuracy_reward, format_reward

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
SCRIPTS = [
    path
    for path in sorted([*FOLDER.glob("*.py"), *FOLDER.glob("raw/*.py")])
    if 'if __name__ == "__main__"' in path.read_text()
]


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "raw"))
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delenv("BENCH_RESULTS", raising=False)


def script(monkeypatch, path, *words):
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, words)])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as leaving:
        if leaving.code:
            raise AssertionError(f"{path}: exit code {leaving.code}") from leaving


def test_the_readme_has_the_table_of_the_results():
    from table import BEGIN, END, EVALUATION, README, ROWS, ablation, table

    for page, made in ((README, table()), (EVALUATION, ablation())):
        shown = page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
        assert shown.strip() == made, "run `python benchmarks/table.py --write`"
    names = ["P1", "P1b", *(f"P{n}" for n in range(2, 13)), "G1", "G2", "G3"]
    assert [row.name for row in ROWS] == names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_scripts_say_what_they_take(path, monkeypatch, capsys):
    script(monkeypatch, path, "--help")
    assert "usage:" in capsys.readouterr().out


def test_the_sft_script_leaves_the_weights_that_the_recipe_leaves(monkeypatch, tmp_path):
    from datasets import Dataset
    from measuring import QUICKSTART, weights

    said = "<reasoning_process>{n}+1={m}</reasoning_process>\n<summary>{m}</summary>"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n} + 1 ="}],
            "completion": [{"role": "assistant", "content": said.format(n=n, m=n + 1)}],
        }
        for n in range(64)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    base, common = QUICKSTART / "base", ["--max_steps", 3, "--seed", 7]
    script(monkeypatch, FOLDER / "raw/sft.py", "--model", base, "--data", tmp_path / "rows.parquet",
           "--output_dir", tmp_path / "raw", *common)  # fmt: skip
    script(monkeypatch, ROOT / "recipes/sft.py", "--config", QUICKSTART / "cold_start.yaml", "--data",
           tmp_path / "rows.parquet", "--model_name_or_path", base,
           "--output_dir", tmp_path / "ours", *common)  # fmt: skip
    assert weights(tmp_path / "raw/model") == weights(tmp_path / "ours/model") != weights(base)


def test_the_scripts_ask_the_same_and_judge_alike(tmp_path):
    import questions
    from sides import QUICKSTART, SEED, tasks_of

    from chainforge.core.config import read_yaml

    tasks = read_yaml(QUICKSTART / "tasks.yaml")["tasks"]
    few = tmp_path / "few.yaml"
    few.write_text(json.dumps({"tasks": [task | {"size": 30} for task in tasks]}))
    theirs = questions.load(str(tasks_of(str(few), tmp_path / "tasks.json")))
    args = TaskArgs(tasks=json.loads(few.read_text())["tasks"], system_prompt="")
    ours = load_examples(args, seed=SEED)
    assert [row["prompt"] for row in theirs] == [row["prompt"] for row in ours]
    for mine, other in zip(ours, theirs, strict=True):
        gold = other["answer"]
        for answer in (gold, f"{gold}1", "", "no"):
            text = f"<reasoning_process>So.</reasoning_process>\n<summary>{answer}</summary>"
            for done in (text, text[1:], text + "!", text + text):
                verdict = accuracy_reward(
                    done, mine["answer"], verifier=mine["verifier"], entry=mine["entry"]
                )
                assert questions.correct(done, gold) == verdict
                assert questions.formatted(done) == format_reward(done)


def test_the_table_judges_what_it_is_given(tmp_path):
    from table import table

    found = {"runs": 3, "limit": 1.02, "stages": {}}
    for kind, ratio in (("sft", 1.01), ("grpo", 1.019)):
        middle = {name: {"median": ratio} for name in ("seconds", "peak_bytes")}
        found["stages"][kind] = {"ratio": middle, "bit_equal": True}
    write_rows(tmp_path / "overhead.json", [found])
    assert "**met**" in table(tmp_path).splitlines()[2]
    found["stages"]["grpo"]["bit_equal"] = False
    write_rows(tmp_path / "overhead.json", [found])
    lines = table(tmp_path).splitlines()
    assert "weights differ" in lines[2]
    assert lines[2].endswith("not met |")
    assert all(line.endswith("not measured |") for line in lines[3:])


def test_an_evaluation_must_be_fast_and_find_the_same():
    from table import evaluation

    spread = {"median": 0.4, "low": 0.3, "high": 0.5}
    found = {"ratio": spread, "accuracy": {"ours": {"rl": 0.5}}, "equal": True, "limit": 0.5}
    words = "0.40 (0.30 to 0.50) of the time, the same accuracy (rl: 50.0 %; n=3)"
    assert evaluation(found | {"runs": 3}) == (words, True)
    assert evaluation(found | {"runs": 3, "equal": False})[1] is False
