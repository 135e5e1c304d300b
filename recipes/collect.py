"""Stage 0: collect chain-of-thought from a teacher.

    python recipes/collect.py --config recipes/quickstart/collect.yaml \
        --output_dir runs/quickstart/traces

The teacher is DeepSeek, any OpenAI-compatible server (`base_url`), or `offline`: worked solutions
made from the data sets' own metadata, labelled as such. Every answer is on disk as it arrives and
scored by the rewards; wrong ones stay in `samples.jsonl`, labelled, and out of `dataset/`.
"""

from collections import Counter

from chainforge.core import artifacts, process
from chainforge.core.config import parse
from chainforge.core.records import write_rows
from chainforge.data.datasets import save_dataset
from chainforge.data.rollouts import judge
from chainforge.data.selection import SelectionArgs, select_rows
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.data.teacher import TeacherArgs, collect
from chainforge.rewards.scoring import RewardArgs, load_rewards
from chainforge.training.stage import RunArgs, open_stage


def main() -> None:
    run, tasks, judges, teacher, selection = configs = parse(
        RunArgs, TaskArgs, RewardArgs, TeacherArgs, SelectionArgs
    )
    with open_stage("collect", run.output_dir, *configs, seed=run.seed) as stage:
        examples = load_examples(tasks, judges.transcript, run.seed)
        rewards = load_rewards(judges, set().union(*examples))
        collected = collect(
            teacher,
            examples,
            stage.directory,
            transcript=judges.transcript,
            seed=run.seed,
            stage=stage.directory.name,
            score=lambda row: judge([row], judges.transcript, rewards)[0],
            progress=lambda done, total: stage.progress(done, total, "answers"),
        )
        selected = select_rows(collected.rows, selection, run.seed)
        write_rows(stage.path("samples.jsonl"), selected.kept + selected.dropped)
        dropped = Counter(collected.funnel["dropped"]) + Counter(selected.funnel["dropped"])
        funnel = selected.funnel | {"in": collected.funnel["in"], "dropped": dict(dropped)}
        artifacts.write_json(stage.path("funnel.json"), funnel)
        save_dataset(selected.kept, stage.path("dataset"))
        stage.metrics |= funnel | {"sources": collected.sources}


if __name__ == "__main__":
    process.run(main)
