"""Reinforcement learning with verifiable rewards: GRPO on tasks whose answers can be checked.

    accelerate launch recipes/grpo.py --config recipes/quickstart/rl.yaml \
        --model_name_or_path runs/quickstart/cold_start/model --output_dir runs/quickstart/rl

Every option is TRL's own (GRPOConfig, ModelConfig) except those of the other classes below.
`preset: modern` puts a file of `recipes/presets/` under the stage's own keys. With `beta` above 0
the KL reference is the policy that the stage starts from, whatever `adapter` does with a LoRA
adapter that it is given. `gate_pool` leaves out prompts that were always or never solved before.
`heldout_size` rows are evaluated during training, and `health` warns or stops at unhealthy metrics;
after `max_zero_advantage_steps` without a learning signal the stage ends. Every completion is saved
with its rewards in `rollouts.jsonl`. `--random_rewards` turns the stage into its own control: the
same steps on rewards that mean nothing.
"""

from types import SimpleNamespace
from typing import Any

from trl import GRPOConfig, GRPOTrainer, ModelConfig

from chainforge.core import process
from chainforge.core.config import parse
from chainforge.data.tasks import TaskArgs, check_batch, grpo_dataset, load_examples
from chainforge.generate.rollouts import Recorder, gate
from chainforge.generate.settings import check_prompts
from chainforge.hub.push import check_push, push_signed
from chainforge.rewards.reward import RewardArgs, check_applicable, check_overlong, load_rewards
from chainforge.rewards.verify import start_pool
from chainforge.train.checkpoints import check_saving
from chainforge.train.health import HealthCallback, RLArgs
from chainforge.train.heldout import RolloutCallback, chosen_step, hold_out, rollout_engine
from chainforge.train.loop import train
from chainforge.train.policy import PolicyArgs, check_policy, open_policy, prepare
from chainforge.train.stage import is_main_process, open_stage
from chainforge.train.templates import load_tokenizer

CONFIGS = (TaskArgs, RewardArgs, RLArgs, PolicyArgs, GRPOConfig, ModelConfig)


def preflight(configs: tuple[Any, ...]) -> SimpleNamespace:
    """Check settings, rows, rewards and tokenizer; return what was loaded. No weights are read."""
    tasks, rewarding, rl, policy, training, model = configs
    start = check_policy(policy, training, model)
    check_saving(training)
    check_push(training, start)
    prompts, counts = gate(load_examples(tasks, rewarding.transcript, training.seed), rl)
    heldout = hold_out(rl, tasks, rewarding.transcript, training)
    rewards = load_rewards(rewarding, set().union(*prompts))
    check_applicable(rewards, prompts)
    check_overlong(rewards, training.max_completion_length)
    rollouts = rollout_engine(rl, training)
    check_batch(prompts, training.generation_batch_size, training.num_generations)
    rows = [*prompts, *(heldout or ())]
    tokenizer = load_tokenizer(
        start.source.tokenizer,
        rewarding.transcript,
        template=rl.chat_template_path,
        rows=rows,
        template_options=training.chat_template_kwargs,
        **start.tokenizer_options,
    )
    longest = check_prompts(tokenizer, rows, start.source.model, training.max_completion_length,
                            "max_completion_length")  # fmt: skip
    return SimpleNamespace(start=start, rows=prompts, gate=counts, heldout=heldout,
                           rewards=rewards, tokenizer=tokenizer, prompt_tokens=longest,
                           transcript=rewarding.transcript, rollouts=rollouts)  # fmt: skip


def main() -> None:
    _, _, rl, _, training, _ = configs = parse(*CONFIGS)
    ready = preflight(configs)
    base, rewards = ready.start.reference, ready.rewards
    inputs = {"model": base} | ({"data.0": rl.gate_pool} if rl.gate_pool else {})
    with open_stage(
        "grpo",
        training.output_dir,
        *configs,
        inputs=inputs,
        seed=training.seed,
        push=push_signed,
    ) as stage:
        start_pool(ready.rows)
        training.reward_weights = [reward.weight for reward in rewards]
        recorder = Recorder(stage.directory, rewards, training, model=base,
                            transcript=ready.transcript, end=ready.tokenizer.eos_token_id,
                            keep=rl.log_rollouts)  # fmt: skip
        trainer = GRPOTrainer(
            model=open_policy(ready.start, stage),
            args=prepare(training, stage),
            reward_funcs=recorder.for_trl(),
            train_dataset=grpo_dataset(ready.rows),
            eval_dataset=grpo_dataset(ready.heldout) if ready.heldout else None,
            processing_class=ready.tokenizer,
            peft_config=ready.start.peft_config,
            callbacks=[RolloutCallback(recorder)],
            **ready.rollouts,
        )
        recorder.attach(trainer)
        stage.notes["kl_reference"] = stage.notes["starts_from"] if training.beta else None
        stage.metrics |= {"gate": ready.gate} if ready.gate else {}
        train(trainer, stage, HealthCallback(rl, stage, rewards))
        stage.notes |= chosen_step(trainer)
        if rl.log_rollouts and is_main_process():
            stage.metrics["rollouts"] = recorder.close()


if __name__ == "__main__":
    process.run(main)
