"""The memory estimate against what stages really hold, on models of random weights.

    python benchmarks/memory.py                     # all cases, a table, results/memory.json
    python benchmarks/memory.py --only mini-lora
    python benchmarks/memory.py --gpu               # on a GPU, with Qwen2.5-0.5B's shape as well

On the CPU the peak is the sum of all tensors alive at a time, which no allocator blurs; the growth
of the process beside it is what the operating system saw. On a GPU it is torch's own count, and
goes to results/memory_gpu.json; where there is none, `--gpu` says so and ends. Each case is a
process of its own that trains two steps with TRL's trainer. An estimate may be 15 % off.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
from typing import Any

from measuring import results, save
from random_models import SHAPES, has_gpu, make_model, tokenizer_of

from chainforge.doctor.memory import CUDA, INTERPRETER, estimate, read_shape
from chainforge.train.distributed import Layout

OFF = 0.15  # that much an estimate may be
MINI = {
    "model_type": "qwen2", "vocab_size": 32000, "hidden_size": 384, "intermediate_size": 1536,
    "num_hidden_layers": 12, "num_attention_heads": 6, "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}  # fmt: skip
SMOL, QWEN = SHAPES["SmolLM2-135M"], SHAPES["Qwen2.5-0.5B"]
FEW_WORDS = MINI | {"vocab_size": 2048, "num_hidden_layers": 8}  # blocks weigh more than the head
LORA = {"use_peft": True}
BATCH = {"per_device_train_batch_size": 4}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mini-full": ("sft", MINI, BATCH | {"max_length": 256, "bf16": False}),
    "mini-full-no-checkpointing": (
        "sft", MINI, BATCH | {"max_length": 256, "bf16": False, "gradient_checkpointing": False}),
    "mini-full-mixed": (
        "sft", MINI, BATCH | {"max_length": 256, "gradient_checkpointing": False}),
    "mini-lora": (
        "sft", MINI, BATCH | LORA
        | {"max_length": 256, "bf16": False, "gradient_checkpointing": False}),
    "mini-lora-all-half": (
        "sft", MINI, BATCH | LORA
        | {"max_length": 256, "dtype": "bfloat16", "lora_target_modules": ["all-linear"],
           "gradient_checkpointing": False}),
    "mini-qlora": (
        "sft", MINI, BATCH | LORA
        | {"max_length": 256, "load_in_4bit": True, "dtype": "bfloat16"}),
    "mini-grpo": (
        "grpo", MINI, {"per_device_train_batch_size": 8, "num_generations": 4, "bf16": False,
                       "max_completion_length": 96, "gradient_checkpointing": False}),
    "mini-grpo-reference": (
        "grpo", MINI, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8,
                       "num_generations": 4, "beta": 0.05, "max_completion_length": 96}),
    "mini-grpo-lora": (
        "grpo", MINI, LORA | {"per_device_train_batch_size": 8, "num_generations": 4,
                              "beta": 0.05, "bf16": False, "max_completion_length": 96}),
    "mini-distill": (
        "distill", MINI, BATCH | {"bf16": False, "max_completion_length": 96}),
    "blocks-full": ("sft", FEW_WORDS, BATCH | {"max_length": 512, "bf16": False}),
    "blocks-mixed-no-checkpointing": (
        "sft", FEW_WORDS, BATCH | {"max_length": 512, "gradient_checkpointing": False}),
    "blocks-lora-half": (
        "sft", FEW_WORDS, BATCH | LORA | {"max_length": 512, "dtype": "bfloat16",
                                          "gradient_checkpointing": False}),
    "blocks-accumulated": (
        "sft", FEW_WORDS, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
                           "max_length": 256, "bf16": False}),
    "cache-grpo": (
        "grpo", FEW_WORDS, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 16,
                            "num_generations": 8, "max_completion_length": 256, "bf16": False}),
    "smollm2-full": (
        "sft", SMOL, {"per_device_train_batch_size": 2, "max_length": 256, "bf16": False}),
    "smollm2-lora": (
        "sft", SMOL, LORA | {"per_device_train_batch_size": 2, "max_length": 256, "bf16": False,
                             "gradient_checkpointing": False}),
}  # fmt: skip
GPU_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen-full": ("sft", QWEN, BATCH | {"max_length": 2048}),
    "qwen-full-no-checkpointing": (
        "sft", QWEN, BATCH | {"max_length": 1024, "gradient_checkpointing": False}),
    "qwen-lora": ("sft", QWEN, BATCH | LORA | {"max_length": 2048}),
    "qwen-qlora": (
        "sft", QWEN, BATCH | LORA | {"max_length": 2048, "load_in_4bit": True,
                                     "dtype": "bfloat16"}),
    "qwen-grpo": (
        "grpo", QWEN, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8,
                       "num_generations": 8, "max_completion_length": 512}),
    "qwen-grpo-reference": (
        "grpo", QWEN, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8,
                       "num_generations": 8, "beta": 0.05, "max_completion_length": 512}),
}  # fmt: skip
ALL_CASES = CASES | GPU_CASES
PROMPT = 32  # tokens


def configs_of(recipe: str, settings: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    """Return TRL's configurations of training and of the model."""
    import trl

    kind = {"sft": trl.SFTConfig, "grpo": trl.GRPOConfig, "distill": trl.DistillationConfig}[recipe]
    mine = {key: value for key, value in settings.items() if hasattr(trl.ModelConfig(), key)}
    rest = {key: value for key, value in settings.items() if key not in mine}
    return kind(**rest, **more), trl.ModelConfig(**mine)


def trainer_of(recipe: str, path: str, settings: dict[str, Any], folder: str, size: int) -> Any:
    """Build TRL's trainer as the recipe does."""
    import torch
    import trl
    from datasets import Dataset

    names = {"sft": "SFT", "grpo": "GRPO", "distill": "Distillation"}
    kind = getattr(trl, f"{names[recipe]}Trainer")
    training, model = configs_of(
        recipe, settings | {"model_name_or_path": path}, output_dir=folder,
        use_cpu=not torch.cuda.is_available(), max_steps=2, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    training.model_init_kwargs = {"dtype": model.dtype}
    prompt = " ".join(f"w{number}" for number in range(PROMPT))
    rows: dict[str, list[Any]] = {"prompt": [prompt] * 64}
    options: dict[str, Any] = {}
    if recipe == "sft":
        full = settings["max_length"]  # every other row is shorter, so that batches are padded
        rows = {"text": [" ".join(["w1"] * length) for length in (full, 3 * full // 4)] * 32}
    if recipe == "grpo":
        options["reward_funcs"] = lambda completions, **_: [float(len(c)) for c in completions]
    if recipe == "distill":
        options["teacher_model"] = path
    return kind(
        model=path, args=training, train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer_of(size), peft_config=trl.get_peft_config(model),
        quantization_config=trl.get_quantization_config(model), **options,
    )  # fmt: skip


def run_case(name: str) -> dict[str, Any]:
    """Train two steps of a case in this process; return the peaks in bytes."""
    import torch
    from alive import Alive

    recipe, shape, settings = ALL_CASES[name]
    size = shape["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(shape, folder)
        gc.collect()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        trainer = trainer_of(recipe, path, settings, f"{folder}/out", size)
        if recipe != "sft":  # the end token is never drawn
            trainer.generation_config.suppress_tokens = [size - 2]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            trainer.train()
            return {"allocated": torch.cuda.max_memory_allocated(),
                    "reserved": torch.cuda.max_memory_reserved()}  # fmt: skip
        alive = Alive()
        alive.take_all()
        with alive:
            trainer.train()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return {"tensors": alive.peak, "process_grew": grown * 1024}


def expected(name: str, on_cpu: bool) -> dict[str, Any]:
    """Return the estimate of a case, without what the interpreter or CUDA itself take."""
    recipe, config, given = ALL_CASES[name]
    shape = read_shape(config)
    training, model = configs_of(recipe, given, output_dir="out", use_cpu=True)
    settings = vars(training) | vars(model) | {"use_cpu": on_cpu}
    found = estimate(
        recipe, settings, shape, Layout(),
        prompt_tokens=PROMPT, teacher=shape if recipe == "distill" else None,
    )  # fmt: skip
    return {"estimate": found.peak - (INTERPRETER if on_cpu else CUDA), "parts": found.parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=ALL_CASES, help="Cases to run; all if left out."
    )
    parser.add_argument("--gpu", action="store_true", help="Run on a GPU, larger cases as well.")
    parser.add_argument("--case", choices=ALL_CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args.case)))
        return
    if args.gpu and not has_gpu():
        raise SystemExit(
            "no GPU here: nothing was measured. Leave out --gpu to measure on the CPU."
        )
    found = {}
    print(f"{'case':<28}{'estimate':>10}{'measured':>10}{'ratio':>7}   MiB")
    for name in args.only or (ALL_CASES if args.gpu else CASES):
        command = [sys.executable, __file__, "--case", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measured = json.loads(done.stdout.splitlines()[-1])
        row = measured | expected(name, "tensors" in measured)
        peak = measured.get("tensors") or measured["allocated"]
        found[name] = row | {"ratio": round(row["estimate"] / peak, 3)}
        mib = [value / 2**20 for value in (row["estimate"], peak)]
        off = "" if abs(found[name]["ratio"] - 1) <= OFF else f"  more than {OFF:.0%} off"
        print(f"{name:<28}{mib[0]:>10.0f}{mib[1]:>10.0f}{found[name]['ratio']:>7.2f}{off}")
    if not args.only:
        worst = max(abs(row["ratio"] - 1) for row in found.values())
        summary = {"n": 1, "limit": OFF, "worst": round(worst, 3), "cases": found}
        save(results() / ("memory_gpu.json" if args.gpu else "memory.json"), summary)


if __name__ == "__main__":
    main()
