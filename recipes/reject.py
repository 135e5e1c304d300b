"""Rejection sampling: let a policy answer, keep what its rewards accept.

    python recipes/reject.py --config recipes/smollm2-135m/rejection.yaml \
        --model_name_or_path runs/smollm2-135m/rl/model --output_dir runs/rejection

Leaves every scored sample (`samples.jsonl`), the kept rows ready for `sft.py` (`dataset/`), and
what became of the others (`funnel.json`). An interrupted run continues where it stopped; under
`accelerate launch` several processes share the prompts. `--pool runs/quickstart/rl` selects
from the rollouts of a GRPO stage instead, and samples nothing; with `--dry_run` it prints the
funnel that the settings give, and leaves nothing.
"""

from functools import partial

from rich.console import Console

from chainforge.core import process
from chainforge.core.config import parse
from chainforge.core.errors import InputError
from chainforge.data.filters import FilterArgs
from chainforge.data.select import SelectionArgs
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate.build import BuildArgs, Rows, build, open_pool, pooled, preview
from chainforge.generate.rollouts import PoolArgs, score_samples
from chainforge.generate.sampling import accepted_by, open_engine, roll_out
from chainforge.generate.settings import SamplingArgs
from chainforge.hub.export import check_push, push_signed
from chainforge.rewards.reward import RewardArgs, load_rewards
from chainforge.train.model_source import check_model
from chainforge.train.stage import RunArgs, is_main_process, open_stage
from chainforge.train.templates import load_tokenizer


def main() -> None:
    run, tasks, rewarding, sampling, pool, selection, texts, output = configs = parse(
        RunArgs, TaskArgs, RewardArgs, SamplingArgs, PoolArgs, SelectionArgs, FilterArgs, BuildArgs
    )
    if output.dry_run:
        Console().print(preview(pooled(pool.paths(), output), selection, texts, run.seed))
        return
    check_push(output)
    if pool.paths() and run.model_name_or_path:
        raise InputError("pool: nothing is sampled from it, so leave model_name_or_path out")
    inputs = {f"data.{number}": path for number, path in enumerate(pool.paths())}
    if not pool.paths():
        inputs = {"model": check_model(run.model_name_or_path)}
    with open_stage(
        "reject",
        run.output_dir,
        *configs,
        inputs=inputs,
        seed=run.seed,
        shared=True,
        push=push_signed,
    ) as stage:
        if pool.paths():
            source, report = open_pool(pool.paths(), output, rewarding)
        else:
            examples = load_examples(tasks, rewarding.transcript, run.seed)
            rewards = load_rewards(rewarding, set().union(*examples))
            policy, tokenizer = inputs["model"], None
            if sampling.engine != "api":
                tokenizer = load_tokenizer(policy, rewarding.transcript, rows=examples,
                                           template=sampling.chat_template_path)  # fmt: skip
            rolled = roll_out(
                partial(open_engine, sampling, policy, tokenizer, dtype=run.dtype,
                        directory=stage.directory),
                examples,
                sampling,
                path=stage.path("samples.jsonl"),
                seed=run.seed,
                provenance={"model": policy, "stage": stage.directory.name},
                score=lambda rows: score_samples(rows, rewarding.transcript, rewards, tokenizer),
                accept=accepted_by(selection, texts),
                keep=selection.max_per_prompt,
                progress=stage.progress,
            )  # fmt: skip
            source, report = Rows(rolled.samples), rolled.report
        if not is_main_process():
            return
        stage.metrics |= build(source, stage.directory, selection, texts, output, run.seed,
                               report={"sampling": report})  # fmt: skip


if __name__ == "__main__":
    process.run(main)
