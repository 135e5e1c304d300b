"""lm_eval and lighteval find the same accuracy on the same rows as `recipes/evaluate.py`."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from runs import accuracy, execute, receipt

from chainforge.core.jsonl import write_rows

SUMMARY = r"(?s)<summary>\s*(.*?)\s*</summary>"
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
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows/test.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<|im_end|>"], "do_sample": False, "max_gen_toks": 72},
        "filter_list": [
            {
                "name": "summary",
                "filter": [
                    {"function": "regex", "regex_pattern": SUMMARY},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(task))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args"]
    command += [f"pretrained={trained},dtype=float32", "--tasks", "sums", "--include_path", "."]
    command += ["--apply_chat_template", "--device", "cpu", "--batch_size", "16"]
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
