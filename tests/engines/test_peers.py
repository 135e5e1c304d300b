"""lm_eval and lighteval find the same accuracy on the same rows as `recipes/evaluate.py`."""

import json
import re
import sys
from pathlib import Path

import pytest
from runs import accuracy, execute, receipt

from evaluation import SUMMARY, lm_eval  # isort: skip
from chainforge.core.jsonl import write_rows

LIGHTEVAL = f'''
import re

import numpy as np
from lighteval.metrics.metrics_sample import ExactMatches
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc, SamplingMethod


def prompt(row, task_name):
    return Doc(task_name=task_name, query=row["question"], choices=[row["answer"]], gold_index=0)


def summary(text):
    return "".join(re.findall(r"{SUMMARY}", text)[:1])


accuracy = SampleLevelMetric(
    metric_name="accuracy",
    sample_level_fn=ExactMatches(normalize_pred=summary, strip_strings=True),
    category=SamplingMethod.GENERATIVE,
    corpus_level_fn=np.mean,
    higher_is_better=True,
)
TASKS_TABLE = [
    LightevalTaskConfig(
        name="sums",
        prompt_function=prompt,
        hf_repo="rows",
        hf_subset="default",
        evaluation_splits=["test"],
        metrics=[accuracy],
        generation_size=72,
        stop_sequence=["<|im_end|>"],
    )
]
'''


@pytest.fixture
def rows(local, tmp_path):
    """The rows that were evaluated, in a file; all answers are whole numbers."""
    done, _ = local
    found = [
        {"question": row["prompt"][-1]["content"], "answer": row["answer"]}
        for row in done.rows("local")
    ]
    assert all(re.fullmatch(r"-?\d+", row["answer"]) for row in found)
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows/test.jsonl", found)
    return found


def compare(name, done, found, local, rows, *packages, note=""):
    mine = accuracy(local[0], "local")
    assert found == pytest.approx(mine)
    figures = {"rows": len(rows), "accuracy": found, "chainforge": mine}
    receipt(f"{name}-evaluate", done, *packages, note=note, **figures)


def test_lm_eval(trained, local, rows, tmp_path):
    command = lm_eval(sys.executable, tmp_path, local[0].rows("local"))
    command += ["--model_args", f"pretrained={trained},dtype=float32", "--batch_size", "16"]
    done = execute(tmp_path, [*command, "--output_path", "out"])
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["sums"]["exact_match,summary"]
    compare("lm-eval", done, found, local, rows, "lm_eval")


def test_lighteval(trained, local, rows, tmp_path):
    (tmp_path / "sums.py").write_text(LIGHTEVAL)
    command = [sys.executable, "-m", "lighteval", "accelerate"]
    command += [f"model_name={trained},dtype=float32,device=cpu,batch_size=16", "sums|0"]
    command += ["--custom-tasks", "sums.py", "--output-dir", "out"]
    done = execute(tmp_path, command, Path(sys.prefix) / "lighteval")
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["sums|0"]["accuracy"]
    compare("lighteval", done, found, local, rows, note="lighteval 0.13.0")
