"""Stage 0: collect chain-of-thought from a teacher.

    python recipes/collect.py --config recipes/deepseek/collect.yaml --output_dir runs/traces

The teacher is DeepSeek, any OpenAI-compatible server (`base_url`), or `offline`: worked solutions
made from the data sets' own metadata, labelled as such. Every answer is on disk as it arrives and
scored by the rewards; wrong ones stay in `samples.jsonl`, labelled, and out of `dataset/`.
`--dry_run` prints the estimated cost and sends no request.
"""

from types import SimpleNamespace
from typing import Any

from chainforge.core import process
from chainforge.core.config import parse
from chainforge.data.filters import FilterArgs, SelectionArgs
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate.build import BuildArgs, build
from chainforge.generate.rollouts import score_samples
from chainforge.generate.sampling import accepted_by
from chainforge.generate.settings import RunArgs, TeacherArgs
from chainforge.generate.teacher import card_sections, collect, endpoint_of, estimate, key_of
from chainforge.rewards.reward import RewardArgs, check_bound, load_rewards
from chainforge.train.stage import open_stage

CONFIGS = (RunArgs, TaskArgs, RewardArgs, TeacherArgs, SelectionArgs, FilterArgs)


def preflight(configs: tuple[Any, ...]) -> SimpleNamespace:
    """Check settings, teacher, rows and rewards; return what was loaded. No request is sent."""
    run, tasks, rewarding, teacher, *_ = configs
    teacher.check()
    endpoints = [] if teacher.teacher == "offline" else [endpoint_of(teacher)]
    if endpoints and not teacher.dry_run:
        key_of(teacher)
    rows = load_examples(tasks, rewarding.transcript, run.seed)
    rewards = load_rewards(rewarding, set().union(*rows))
    check_bound(rewards, rows)
    return SimpleNamespace(rows=rows, rewards=rewards, endpoints=endpoints,
                           transcript=rewarding.transcript)  # fmt: skip


def main() -> None:
    run, _, rewarding, teacher, selection, filters = configs = parse(*CONFIGS)
    ready = preflight(configs)
    if teacher.dry_run:
        print(estimate(teacher, ready.rows))
        return
    with open_stage("collect", run.output_dir, *configs, seed=run.seed) as stage:
        collected = collect(
            teacher,
            ready.rows,
            stage.directory,
            transcript=rewarding.transcript,
            seed=run.seed,
            stage=stage.directory.name,
            score=lambda rows: score_samples(rows, rewarding.transcript, ready.rewards),
            accept=accepted_by(selection, filters),
            keep=selection.max_per_prompt,
            filters=filters,
            progress=stage.progress,
        )
        stage.metrics |= {"spending": collected.spending} | build(
            collected.rows, stage.directory, selection, filters, BuildArgs(), run.seed,
            lost=collected.lost, report={"sources": collected.sources},
            sections=lambda kept: card_sections(teacher, kept, collected.spending),
        )  # fmt: skip


if __name__ == "__main__":
    process.run(main)
