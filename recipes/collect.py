"""Stage 0: collect chain-of-thought from a teacher.

    python recipes/collect.py --config recipes/deepseek/collect.yaml --output_dir runs/traces

The teacher is DeepSeek, any OpenAI-compatible server (`base_url`), or `offline`: worked solutions
made from the data sets' own metadata, labelled as such. Every answer is on disk as it arrives and
scored by the rewards; wrong ones stay in `samples.jsonl`, labelled, and out of `dataset/`.
`--dry_run` prints what it would cost, and asks nothing.
"""

from chainforge.core import process
from chainforge.core.config import parse
from chainforge.data.select import SelectionArgs
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate.build import BuildArgs, Rows, build
from chainforge.generate.rollouts import score_samples
from chainforge.generate.sampling import accepted_by
from chainforge.generate.settings import TeacherArgs, TeacherFilterArgs
from chainforge.generate.teacher import card_sections, collect, estimate
from chainforge.rewards.reward import RewardArgs, load_rewards
from chainforge.train.stage import RunArgs, open_stage


def main() -> None:
    run, tasks, rewarding, teacher, selection, texts = configs = parse(
        RunArgs, TaskArgs, RewardArgs, TeacherArgs, SelectionArgs, TeacherFilterArgs
    )
    teacher.check()
    if teacher.dry_run:
        examples = load_examples(tasks, rewarding.transcript, run.seed)
        print(estimate(teacher, examples, run.output_dir))
        return
    with open_stage("collect", run.output_dir, *configs, seed=run.seed) as stage:
        examples = load_examples(tasks, rewarding.transcript, run.seed)
        rewards = load_rewards(rewarding, set().union(*examples))
        collected = collect(
            teacher,
            examples,
            stage.directory,
            transcript=rewarding.transcript,
            seed=run.seed,
            stage=stage.directory.name,
            score=lambda rows: score_samples(rows, rewarding.transcript, rewards),
            accept=accepted_by(selection, texts),
            keep=selection.max_per_prompt,
            progress=stage.progress,
        )
        stage.metrics |= {"spending": collected.spending} | build(
            Rows(collected.rows), stage.directory, selection, texts, BuildArgs(), run.seed,
            lost=collected.lost, report={"sources": collected.sources},
            sections=lambda kept: card_sections(teacher, kept, collected.spending),
        )  # fmt: skip


if __name__ == "__main__":
    process.run(main)
