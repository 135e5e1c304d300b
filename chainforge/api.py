"""Drive a chain from Python: `chainforge.run`, `plan`, `results`, `report` and `load_samples`.

They do what the commands of the same names do, and return paths and tables of pandas. Wrong input
raises `InputError`, a stage that fails `StageFailed`. `report` is the package of that name, which
can be called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainforge.chain.plan import chain_directory, override, plan_chain, to_json
from chainforge.chain.run import run_chain
from chainforge.chain.spec import Chain, load_chain
from chainforge.core.errors import InputError
from chainforge.core.jsonl import read_rows
from chainforge.core.run_dir import read_run
from chainforge.data.select import samples_file

if TYPE_CHECKING:
    from pandas import DataFrame

RESULTS = ["evaluation", "n", "strict_mean", "strict_low", "strict_high", "lenient_mean",
           "lenient_low", "lenient_high", "format", "tokens_mean"]  # fmt: skip


def run(chain: str | Path, runs: str | Path = "runs", **options: Any) -> Path:
    """Run a chain, or resume it, and return its directory.

    `options` are those of the command: `set` (a mapping of `stage.key` to values), `seed`,
    `launch`, `from_`, `until`, `force` and `ignore_gates`.
    """
    asked = {"set", "seed", "launch"} & options.keys()
    changed = _changed(chain, **{key: options.pop(key) for key in asked})
    run_chain(changed, runs, **options)
    return chain_directory(changed, runs)


def plan(chain: str | Path, runs: str | Path = "runs", **changes: Any) -> DataFrame:
    """Return each stage's recipe, state and plain command; `changes` as in `run`."""
    from pandas import DataFrame

    changed = _changed(chain, **changes)
    stages = to_json(changed, runs, plan_chain(changed, runs))["stages"]
    return DataFrame(stages).set_index("name")[["recipe", "state", "why", "command"]]


def results(run: str | Path, *, pairs: bool = False) -> DataFrame:
    """Return the accuracy of each measured model with its interval, or how pairs of them differ.

    `run` is a chain's directory. Raises `InputError` where nothing has been measured.
    """
    from pandas import json_normalize

    kind = "pairs" if pairs else "models"
    found = [stage for stage in read_run(Path(run)).stages if stage.results]
    if not found:
        raise InputError(f"{run}: no stage of this run has a results.json; evaluate first")
    rows = [{"evaluation": stage.name} | row for stage in found for row in stage.results[kind]]
    table = json_normalize(rows, sep="_")
    return table if pairs else table.set_index("name")[RESULTS]


def load_samples(stage: str | Path) -> DataFrame:
    """Return what a stage sampled: a row for each completion, with its prompt and rewards."""
    from pandas import DataFrame

    return DataFrame(read_rows(samples_file(stage), torn_tail=True))


def _changed(chain: str | Path, set: Mapping[str, Any] | None = None, **changes: Any) -> Chain:
    """Return a chain as the arguments change it."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (set or {}).items()}
    return override(load_chain(chain), [f"{k}={v}" for k, v in texts.items()], **changes)
