"""Rejection sampling: let a policy answer, keep what its rewards accept.

    python recipes/reject.py --config recipes/quickstart/picks.yaml \
        --model_name_or_path runs/quickstart/reason/model --output_dir runs/quickstart/picks

Leaves every scored sample (`samples.jsonl`), the kept rows ready for `sft.py` (`dataset/`), and
what became of the others (`funnel.json`). A run that was cut goes on where it stopped.
"""

from chainforge.core import artifacts, process
from chainforge.core.config import parse
from chainforge.core.records import write_rows
from chainforge.data.datasets import save_dataset
from chainforge.data.rollouts import open_policy, roll_out
from chainforge.data.sampling import SamplingArgs
from chainforge.data.selection import SelectionArgs, select_rows
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.rewards.scoring import RewardArgs, load_rewards
from chainforge.training.policy import check_model, load_tokenizer
from chainforge.training.stage import RunArgs, open_stage


def main() -> None:
    run, tasks, judges, sampling, selection = configs = parse(
        RunArgs, TaskArgs, RewardArgs, SamplingArgs, SelectionArgs
    )
    policy = check_model(run.model_name_or_path)
    inputs = {"model": policy}
    with open_stage("reject", run.output_dir, *configs, inputs=inputs, seed=run.seed) as stage:
        examples = load_examples(tasks, judges.transcript, run.seed)
        rewards = load_rewards(judges, set().union(*examples))
        samples = roll_out(
            open_policy(policy, dtype=run.dtype),
            load_tokenizer(policy, judges.transcript),
            examples,
            sampling,
            path=stage.path("samples.jsonl"),
            transcript=judges.transcript,
            seed=run.seed,
            provenance={"model": policy, "stage": stage.directory.name},
            rewards=rewards,
            progress=stage.progress,
        )
        selected = select_rows(samples, selection, run.seed)
        write_rows(stage.path("samples.jsonl"), selected.kept + selected.dropped)
        artifacts.write_json(stage.path("funnel.json"), selected.funnel)
        save_dataset(selected.kept, stage.path("dataset"))
        stage.metrics |= selected.funnel


if __name__ == "__main__":
    process.run(main)
