"""Rejection sampling: let a policy answer, keep what its rewards accept.

    python recipes/reject.py --config recipes/smollm2-135m/rejection.yaml \
        --model_name_or_path runs/smollm2-135m/rl/model --output_dir runs/rejection

Leaves every scored sample (`samples.jsonl`), the kept rows ready for `sft.py` (`dataset/`), and
what became of the others (`funnel.json`). An interrupted run continues where it stopped; under
`accelerate launch` several processes share the prompts. `--pool runs/quickstart/rl` selects
from the rollouts of a GRPO stage instead, and samples nothing.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from chainforge.core import process
from chainforge.core.config import parse
from chainforge.core.errors import InputError
from chainforge.data.filters import FilterArgs, SelectionArgs
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate.build import BuildArgs, build, open_pool
from chainforge.generate.rollouts import PoolArgs, score_samples
from chainforge.generate.sampling import accepted_by, open_engine, roll_out
from chainforge.generate.settings import RunArgs, SamplingArgs, check_prompts
from chainforge.hub.push import check_push, push_signed
from chainforge.rewards.reward import RewardArgs, check_bound, load_rewards
from chainforge.train.model_source import check_model
from chainforge.train.stage import is_main_process, open_stage
from chainforge.train.templates import load_tokenizer

CONFIGS = (RunArgs, TaskArgs, RewardArgs, SamplingArgs, PoolArgs, SelectionArgs, FilterArgs,
           BuildArgs)  # fmt: skip


def preflight(configs: tuple[Any, ...]) -> SimpleNamespace:
    """Check settings, rows, rewards and tokenizer; return what was loaded. No weights are read."""
    run, tasks, rewarding, sampling, pool, *_, output = configs
    check_push(output)
    ready = SimpleNamespace(rows=[], tokenizer=None, rewards=[], transcript=rewarding.transcript)
    if pool.paths():
        if run.model_name_or_path:
            raise InputError("pool: nothing is sampled from it, so leave model_name_or_path out")
        return ready
    sampling.check()
    policy = check_model(run.model_name_or_path)
    ready.rows = load_examples(tasks, rewarding.transcript, run.seed)
    ready.rewards = load_rewards(rewarding, set().union(*ready.rows))
    check_bound(ready.rewards, ready.rows)
    served = sampling.engine == "api"
    if not served or Path(policy).is_dir():
        ready.tokenizer = load_tokenizer(
            policy,
            rewarding.transcript,
            rows=ready.rows,
            template=sampling.chat_template_path,
            template_options=sampling.chat_template_kwargs,
            served=served,
        )
        check_prompts(ready.tokenizer, ready.rows, policy, sampling.max_new_tokens,
                      "max_new_tokens")  # fmt: skip
    return ready


def main() -> None:
    run, _, rewarding, sampling, pool, selection, filters, output = configs = parse(*CONFIGS)
    ready = preflight(configs)
    policy = run.model_name_or_path
    inputs = {f"data.{number}": path for number, path in enumerate(pool.paths())}
    with open_stage(
        "reject",
        run.output_dir,
        *configs,
        inputs=inputs or {"model": policy},
        seed=run.seed,
        shared=True,
        push=push_signed,
    ) as stage:
        if pool.paths():
            rows, report = open_pool(pool.paths(), output, rewarding)
        else:
            rolled = roll_out(
                partial(open_engine, sampling, policy, ready.tokenizer, dtype=run.dtype,
                        directory=stage.directory),
                ready.rows,
                sampling,
                path=stage.path("samples.jsonl"),
                seed=run.seed,
                provenance={"model": policy, "stage": stage.directory.name},
                score=lambda rows: score_samples(rows, rewarding.transcript, ready.rewards,
                                                 ready.tokenizer),
                accept=accepted_by(selection, filters),
                keep=selection.max_per_prompt,
                progress=stage.progress,
            )  # fmt: skip
            rows, report = rolled.samples, rolled.report
        if not is_main_process():
            return
        stage.metrics |= build(rows, stage.directory, selection, filters, output, run.seed,
                               report={"sampling": report})  # fmt: skip


if __name__ == "__main__":
    process.run(main)
