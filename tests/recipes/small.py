"""Settings of stages that end in seconds, and rewards that differ on a model that knows nothing."""

SUMS = {"dataset": "chain_sum", "min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
TASK = {"fn": "reasoning_gym", "params": SUMS, "size": 24, "split": "train"}
CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
TRAIN = CPU | {
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "learning_rate": 0.01,
    "save_strategy": "no",
}
GRPO = TRAIN | {"tasks": [TASK], "num_generations": 4, "max_completion_length": 8}


def by_length(folder):
    """Return rewards of which one is on length: right is no answer of a random model."""
    (folder / "reward.py").write_text("def short(completion):\n    return -len(completion) / 20\n")
    return [{"fn": "accuracy_reward"}, {"fn": f"{folder}/reward.py:short", "weight": 0.1}]
