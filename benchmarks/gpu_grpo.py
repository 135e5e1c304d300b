"""A GRPO step on a GPU: where its time goes, with which way of generating, and how near the limit.

    python benchmarks/gpu_grpo.py                                  # all models, all cases
    python benchmarks/gpu_grpo.py --models SmolLM2-135M --only trl static

Models of random weights in the shapes of Qwen2.5-0.5B, 1.5B and SmolLM2-135M, 128 prompts of 128
tokens and completions of 512, which no token ends, so that every case does the same work. `trl` is
TRL with its defaults and the same batch; the others change the one thing that they are named after;
`chainforge` samples, and computes log-probabilities, as our recipe does without vLLM.
`shipped` has what our recipes for real models set. vLLM is left out where it is not installed. The
rewards are ours, over completions of `mathrows.py`. A case is a process of its own; its first two
steps are not counted. The limit of generating is the time to read weights and the keys and values
once a token; that of training, 6 operations a parameter and token (8 with checkpointing), both at
what this device was measured to do. Writes `benchmarks/results/gpu_grpo.json`, prints Markdown.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from typing import Any

import gpu_cases as gpu
from measuring import save
from random_models import SHAPES, has_gpu, make_model, tokenizer_of
from step_profile import START, Clock

from chainforge.train.scoring import OwnRollouts

VLLM = importlib.util.find_spec("vllm") is not None
CASES: dict[str, dict[str, Any]] = {
    "trl": {},
    "chainforge": {},  # its rollouts
    "one batch": {"per_device_train_batch_size": 32},
    "static": {"cache_implementation": "static"},
    "continuous": {"use_transformers_continuous_batching": True},
    "vllm": {"use_vllm": True, "vllm_mode": "colocate"},
    "no checkpointing": {"gradient_checkpointing": False},
    "reference": {"beta": 0.01},
    "lora": {"use_peft": True},
    "shipped": {},  # what the recipe says
}
# The keys of a recipe that change what a step costs, the amount of work aside.
SPEED = (
    "per_device_train_batch_size", "gradient_checkpointing", "cache_implementation", "use_vllm",
    "vllm_mode", "use_transformers_continuous_batching", "beta", "torch_compile", "use_peft",
    "num_iterations", "attn_implementation",
)  # fmt: skip
GENERATE, REWARDS, TRAIN = "generate", "rewards", "train"


def main() -> None:
    args = gpu.arguments(__doc__, "gpu_grpo").parse_args()
    if args.case:
        print(json.dumps(run_case(*args.case, steps=args.steps, toy=args.toy)))
        return
    names = [name for name in args.only or CASES if VLLM or name != "vllm"]
    found = gpu.measure(__file__, names, args, shares)
    prompt, completion, completions = sizes_of(args.toy)
    result = {"prompt_tokens": prompt, "completion_tokens": completion, "completions": completions,
              **found, "row": gpu.verdict(found["cases"], comparable), "vllm": VLLM}  # fmt: skip
    save(args.out, result)
    print(table(result))


def sizes_of(toy: bool) -> tuple[int, int, int]:
    """Return the tokens of a prompt and of a completion, and the completions of a step."""
    return (8, 12, 8) if toy else (128, 512, 128)


def comparable(row: dict[str, Any]) -> bool:
    """Return whether a case does what the shipped settings do, only in another way."""
    return row["case"] not in ("reference", "lora")


def run_case(model: str, case: str, steps: int, toy: bool) -> dict[str, Any]:
    """Train some steps in this process; return a step's seconds by part, and tokens a second."""
    import torch
    from transformers import TrainerCallback

    prompt, completion, completions = sizes_of(toy)
    with tempfile.TemporaryDirectory() as folder:
        given = CASES[case]
        if case == "shipped":
            given = gpu.shipped(model, "rl.yaml" if model == "toy" else "grpo.yaml", SPEED)
        trainer = build(model, folder, given, steps, toy)
        trainer.generation_config.suppress_tokens = [SHAPES[model]["vocab_size"] - 2]
        if case == "chainforge":
            trainer.rollout_func, trainer.eos_token_ids = OwnRollouts(), []
        clock = Clock()
        install(clock, trainer)

        class Restart(TrainerCallback):
            """Forget what the first two steps took."""

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                gpu.wait()
                if state.global_step == min(2, steps - 1):
                    clock.rows(1)
                    clock.seconds.clear()
                    clock.calls.clear()

        trainer.add_callback(Restart())
        if has_gpu():
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        counted = steps - min(2, steps - 1)
        parts = {row["part"]: row["seconds"] / counted for row in clock.rows(1)}
        parts["rest"] = parts.pop(START)
    whole = sum(parts.values())
    return {
        "seconds_a_step": whole, "parts": parts, "tokens_a_step": completions * completion,
        "tokens_per_second": completions * completion / whole,
        "generated_per_second": completions * completion / (parts.get(GENERATE) or whole),
        "peak_bytes": torch.cuda.max_memory_allocated() if has_gpu() else None,
        "prompt": prompt, "completion": completion, "completions": completions,
    }  # fmt: skip


def build(model: str, folder: str, case: dict[str, Any], steps: int, toy: bool) -> Any:
    """Build TRL's trainer: its defaults, the same batch for every case, and what a case changes."""
    import trl
    from datasets import Dataset

    prompt, completion, completions = sizes_of(toy)
    given = {"per_device_train_batch_size": 8} | case
    peft = trl.get_peft_config(trl.ModelConfig(use_peft=bool(given.pop("use_peft", False))))
    each = min(given.pop("per_device_train_batch_size"), completions)
    config = trl.GRPOConfig(
        output_dir=f"{folder}/out", max_steps=steps, num_generations=8, report_to="none",
        per_device_train_batch_size=each, gradient_accumulation_steps=completions // each,
        max_completion_length=completion, save_strategy="no", disable_tqdm=True, use_cpu=toy,
        bf16=not toy, logging_steps=1, **given,
    )  # fmt: skip
    words = [" ".join(f"w{(7 * row + place) % 300}" for place in range(prompt))
             for row in range(completions)]  # fmt: skip
    prompts = [[{"role": "user", "content": text}] for text in words]
    tokenizer = tokenizer_of(SHAPES[model]["vocab_size"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return trl.GRPOTrainer(
        model=make_model(SHAPES[model], folder),
        args=config,
        reward_funcs=rewards_of(completions),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        peft_config=peft,
        processing_class=tokenizer,
    )


def rewards_of(count: int) -> Any:
    """Return a reward that costs what ours costs: over completions with answers, not noise."""
    from mathrows import make

    from chainforge.rewards.reward import RewardArgs, load_rewards

    [reward] = load_rewards(
        RewardArgs(rewards=[{"fn": "accuracy_reward"}]), {"prompt", "answer"}
    )  # fmt: skip
    rows = make(max(count, 64), seed=1)[:count]
    golds = [row["gold"] for row in rows]

    def accuracy(prompts: Any, completions: Any, **given: Any) -> Any:
        texts = [row["completion"] for row in rows][: len(completions)]
        return reward([None] * len(texts), texts, answer=golds[: len(texts)])

    return accuracy


def install(clock: Clock, trainer: Any) -> None:
    """Clock a trainer's parts, each until the device is done with it."""
    if trainer.rollout_func:
        sample = finished(trainer.rollout_func)
        trainer.rollout_func = finished(clock.clocked(GENERATE, sample))
    for name, method in (
        (TRAIN, "training_step"),
        ("around generating", "_generate"),
        (GENERATE, "_generate_single_turn"),
        (REWARDS, "_calculate_rewards"),
    ):
        setattr(trainer, method, finished(clock.clocked(name, finished(getattr(trainer, method)))))


def finished(function: Any) -> Any:
    """Return a function that waits for the device."""

    def call(*given: Any, **named: Any) -> Any:
        result = function(*given, **named)
        gpu.wait()
        return result

    return call


def shares(row: dict[str, Any], most: dict[str, float]) -> dict[str, float]:
    """Return which share of the device's limits generating and training came to."""
    parameters, cache = gpu.weights_of(row["model"])
    middle = row["prompt"] + row["completion"] / 2
    read = row["completion"] * (2 * parameters + row["completions"] * middle * cache)
    tokens = row["completions"] * (row["prompt"] + row["completion"])
    each = 6 if row["case"] == "no checkpointing" else 8
    train = row["parts"].get(TRAIN, 0.0)
    generate = row["parts"].get(GENERATE, 0.0)
    return {
        "share_of_reading": read / most["bytes_per_second"] / generate if generate else 0.0,
        "share_of_multiplying": each * parameters * tokens / most["flops"] / train
        if train
        else 0.0,
    }


def table(result: dict[str, Any]) -> str:
    """Return the cases as Markdown."""
    lines = [
        "| model | case | tokens/s | s a step | generate | rewards | train | of reading | of "
        "multiplying | GiB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["cases"]:
        if "error" in row:
            lines.append(f"| {row['model']} | {row['case']} | failed: {row['error']} |" + " |" * 7)
            continue
        parts = [row["parts"].get(name, 0.0) for name in (GENERATE, REWARDS, TRAIN)]
        peak = f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else ""
        lines.append(
            f"| {row['model']} | {row['case']} | {row['tokens_per_second']:,.0f} "
            f"| {row['seconds_a_step']:.2f} | {' | '.join(f'{part:.2f}' for part in parts)} "
            f"| {row['share_of_reading']:.0%} | {row['share_of_multiplying']:.0%} | {peak} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
