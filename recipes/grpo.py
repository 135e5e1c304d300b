"""Reinforcement learning with verifiable rewards: GRPO on tasks whose answers can be checked.

    accelerate launch recipes/grpo.py --config recipes/quickstart/reason.yaml \
        --model_name_or_path runs/quickstart/cold/model --output_dir runs/quickstart/reason

Every option is TRL's own (GRPOConfig, ModelConfig) but for `tasks`, `rewards` and `transcript`.
With `beta` above 0 the KL reference is the policy that the stage starts from. `--random_rewards`
turns the stage into its own control: the same steps on rewards that mean nothing.
"""

from chainforge.core import process
from chainforge.core.config import parse
from chainforge.data.datasets import check_batch, grpo_dataset
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.rewards.scoring import RewardArgs, load_rewards
from chainforge.training.checkpoints import check_save_steps
from chainforge.training.policy import check_model, load_tokenizer, prepare, train
from chainforge.training.stage import open_stage


def main() -> None:
    from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config, get_quantization_config

    tasks, judges, training, model = configs = parse(TaskArgs, RewardArgs, GRPOConfig, ModelConfig)
    base = check_model(model.model_name_or_path)
    check_save_steps(training)
    with open_stage(
        "grpo", training.output_dir, *configs, inputs={"model": base}, seed=training.seed
    ) as stage:
        examples = load_examples(tasks, judges.transcript, training.seed)
        rewards = load_rewards(judges, set().union(*examples))
        check_batch(examples, training.generation_batch_size, training.num_generations)
        training.reward_weights = [reward.weight for reward in rewards]
        trainer = GRPOTrainer(
            model=base,
            args=prepare(training, model, stage),
            reward_funcs=rewards,
            train_dataset=grpo_dataset(examples),
            processing_class=load_tokenizer(base, judges.transcript),
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
        stage.notes["kl_reference"] = base if training.beta else None
        train(trainer, stage)


if __name__ == "__main__":
    process.run(main)
