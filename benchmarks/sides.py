"""The quickstart's stages and the scripts in `raw/` that do the same work by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from measuring import CHAINFORGE, QUICKSTART, ROOT, run

from chainforge.chain.plan import plan_chain
from chainforge.chain.spec import load_chain
from chainforge.core.config import read_settings
from chainforge.core.plugins import as_struct
from chainforge.data.tasks import Task, TaskArgs

RAW = ROOT / "benchmarks/raw"
SEED = 42


def recipe(kind: str, config: str | Path, output: Path, *words: Any, seed: int = SEED) -> list[str]:
    """Return the command of a stage of ours; a config is the quickstart's, or a whole path."""
    given = ["--config", QUICKSTART / config, "--output_dir", output, "--seed", seed, *words]
    return [sys.executable, str(ROOT / f"recipes/{kind}.py"), *map(str, given)]


def raw(kind: str, *words: Any) -> list[str]:
    """Return the command of a raw script."""
    return [sys.executable, str(RAW / f"{kind}.py"), *map(str, words)]


def caches(folder: Path) -> dict[str, str]:
    """Return an environment in which `datasets` finds nothing of an earlier run."""
    return {"HF_DATASETS_CACHE": str(folder)}


def asked(config: str) -> list[dict[str, Any]]:
    """Return the tasks of a configuration, or those that the quickstart's chain gives its stage."""
    if tasks := read_settings(QUICKSTART / config).get("tasks"):
        return list(tasks)
    steps = plan_chain(load_chain(QUICKSTART), "runs")
    return next(list(s.given["tasks"]) for s in steps if s.stage.config == str(QUICKSTART / config))


def tasks_of(config: str, output: Path) -> Path:
    """Write down what a stage asks, for a raw script: the same rows, in the same order."""
    settings = TaskArgs(tasks=asked(config))
    listed = []
    for number, given in enumerate(settings.tasks):
        task = as_struct(given, Task, f"tasks[{number}]")
        params = {key: value for key, value in task.params.items() if key != "dataset"}
        listed.append({"dataset": task.params["dataset"], "params": params, "size": task.size,
                       "seed": task.own_seed(SEED), "split": task.split})  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(listed, indent=2))
    return output


def prepared(folder: Path, until: str) -> Path:
    """Run the quickstart up to a stage, unless it is there; return the folder of its stages."""
    chain = [*CHAINFORGE, "run", str(QUICKSTART / "chain.yaml"), "--runs", str(folder)]
    if not (folder / "quickstart" / until / "manifest.json").exists():
        run([*chain, "--until", until], folder / f"{until}.log")
    return folder / "quickstart"
