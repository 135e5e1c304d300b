"""Stage 0: collect chain-of-thought from a teacher.

    python recipes/collect.py --config recipes/deepseek/collect.yaml --output_dir runs/traces

The teacher is DeepSeek, any OpenAI-compatible server (`base_url`), or `offline`: worked solutions
made from the data sets' own metadata, labelled as such. Every answer is on disk as it arrives and
scored by the rewards; wrong ones stay in `samples.jsonl`, labelled, and out of `dataset/`.
`--dry_run` prints what it would cost, and asks nothing.
"""

from collections import Counter

from chainforge.core import artifacts, process
from chainforge.core.config import parse
from chainforge.core.errors import InputError
from chainforge.core.jsonl import write_rows
from chainforge.data.datasets import save_dataset
from chainforge.data.select import SelectionArgs, select_rows
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate.budget import estimate
from chainforge.generate.card import write_card
from chainforge.generate.progress import watched
from chainforge.generate.rollouts import judge
from chainforge.generate.settings import TeacherArgs, check
from chainforge.generate.teacher import collect
from chainforge.rewards.reward import RewardArgs, load_rewards
from chainforge.train.stage import RunArgs, open_stage


def main() -> None:
    run, tasks, judges, teacher, selection = configs = parse(
        RunArgs, TaskArgs, RewardArgs, TeacherArgs, SelectionArgs
    )
    check(teacher)
    if teacher.dry_run:
        examples = load_examples(tasks, judges.transcript, run.seed)
        print(estimate(teacher, examples, run.output_dir))
        return
    with open_stage("collect", run.output_dir, *configs, seed=run.seed) as stage:
        examples = load_examples(tasks, judges.transcript, run.seed)
        rewards = load_rewards(judges, set().union(*examples))
        with watched(stage.progress) as progress:
            collected = collect(
                teacher,
                examples,
                stage.directory,
                transcript=judges.transcript,
                seed=run.seed,
                stage=stage.directory.name,
                score=lambda rows: judge(rows, judges.transcript, rewards),
                progress=progress,
            )
        selected = select_rows(collected.rows, selection, run.seed)
        write_rows(stage.path("samples.jsonl"), selected.kept + selected.dropped)
        dropped = Counter(collected.funnel["dropped"]) + Counter(selected.funnel["dropped"])
        funnel = selected.funnel | {"in": collected.funnel["in"], "dropped": dict(dropped)}
        funnel["sources"] = collected.sources
        artifacts.write_json(stage.path("funnel.json"), funnel)
        if not selected.kept:
            raise InputError(f"no row was kept; {funnel['dropped']}. funnel.json has all reasons")
        folder = save_dataset(selected.kept, stage.path("dataset")).parent
        write_card(folder, teacher, selected.kept, funnel, collected.spending)
        stage.metrics |= funnel | {"spending": collected.spending}


if __name__ == "__main__":
    process.run(main)
