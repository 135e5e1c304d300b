"""SFT on a GPU, a ladder: padding, packing, padding-free, compiled, LoRA, QLoRA; tokens a second.

    python benchmarks/gpu_sft.py                                   # all models, all cases
    python benchmarks/gpu_sft.py --models SmolLM2-135M --only trl packing

Models of random weights in the shapes of Qwen2.5-0.5B, 1.5B and SmolLM2-135M, on rows of 64 to
2,048 tokens, most of them short, as reasoning traces are. Counted are the predicted tokens, not
padding. `trl` is TRL with its defaults; each other case changes what it is named after. A case that
packs takes fewer, fuller steps, so cases are compared over the same rows, and each reports its mean
loss, which must not differ between those that compute the same. A case is a process of its own; its
first two steps are not counted. The limit is 6 operations a parameter and token (8 with
checkpointing; 4 and 6 with LoRA) at what this device was measured to multiply. Writes
`benchmarks/results/gpu_sft.json` and prints Markdown.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from typing import Any

import gpu_cases as gpu
from measuring import save
from random_models import SHAPES, has_gpu, make_model, tokenizer_of

LENGTHS, TOY_LENGTHS = (64, 2048), (4, 32)
ROWS, TOY_ROWS = 512, 24
BATCH = 8
PACKED = {"packing": True, "per_device_train_batch_size": BATCH // 4}
CASES: dict[str, dict[str, Any]] = {
    "trl": {},
    "no checkpointing": {"gradient_checkpointing": False},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "packing": PACKED,
    "padding-free": {"padding_free": True, "max_length": None},
    "compiled": PACKED | {"torch_compile": True, "gradient_checkpointing": False},
    "packing, no checkpointing": PACKED | {"gradient_checkpointing": False},
    "lora": {"use_peft": True},
    "lora, packing": {"use_peft": True} | PACKED,
    "qlora": {"use_peft": True, "load_in_4bit": True},
    "qlora, packing": {"use_peft": True, "load_in_4bit": True} | PACKED,
    "shipped": {},  # what the recipe says
}
# The keys of a recipe that change what a step costs.
SPEED = (
    "per_device_train_batch_size", "gradient_checkpointing", "packing", "padding_free", "use_peft",
    "load_in_4bit", "torch_compile", "attn_implementation",
)  # fmt: skip


def main() -> None:
    args = gpu.arguments(__doc__, "gpu_sft").parse_args()
    if args.case:
        print(json.dumps(run_case(*args.case, steps=args.steps, toy=args.toy)))
        return
    found = gpu.measure(__file__, args.only or CASES, args, shares)
    result = {"rows": TOY_ROWS if args.toy else ROWS, "lengths": lengths_of(args.toy),
              **found, "row": compared(found["cases"])}  # fmt: skip
    save(args.out, result)
    print(table(result))


def compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the shipped settings with cases that train as many weights, to the same loss."""
    trained = {row["model"]: row for row in rows if row["case"] == "shipped" and "lora" in row}

    def comparable(row: dict[str, Any]) -> bool:
        own = trained.get(row["model"])
        return (
            bool(own)
            and row["lora"] == own["lora"]
            and (abs(row["loss"] - own["loss"]) < 0.02 * own["loss"])
        )

    return gpu.verdict(rows, comparable)


def lengths_of(toy: bool) -> tuple[int, int]:
    return TOY_LENGTHS if toy else LENGTHS


def rows_of(toy: bool, words: int) -> list[str]:
    """Return texts of random words, most of them short, the same for every case."""
    rng = random.Random(0)
    shortest, longest = lengths_of(toy)
    texts = []
    for _ in range(TOY_ROWS if toy else ROWS):
        count = min(longest, int(shortest * (longest / shortest) ** rng.betavariate(2, 2)))
        texts.append(" ".join(f"w{rng.randrange(words)}" for _ in range(count)))
    return texts


def run_case(model: str, case: str, steps: int, toy: bool) -> dict[str, Any]:
    """Train once over the rows in this process; `steps` counts for the toy only."""
    import torch
    from transformers import TrainerCallback

    given = CASES[case]
    if case == "shipped":
        given = gpu.shipped(model, "cold_start.yaml" if model == "toy" else "sft.yaml", SPEED)
    counted: dict[str, Any] = {"started": 0.0, "tokens": 0, "before": 0}
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(model, folder, given, steps if toy else -1, toy)
        compute = trainer.compute_loss

        def counting(net: Any, inputs: Any, *others: Any, **named: Any) -> Any:
            counted["tokens"] += int((inputs["labels"][:, 1:] != -100).sum())
            return compute(net, inputs, *others, **named)

        trainer.compute_loss = counting

        class Start(TrainerCallback):
            """Begin to count after the second step, or the first where there are only two."""

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == min(2, state.max_steps - 1):
                    gpu.wait()
                    counted.update(started=time.perf_counter(), before=counted["tokens"])

        trainer.add_callback(Start())
        if has_gpu():
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        gpu.wait()
        seconds = time.perf_counter() - counted["started"]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "tokens": counted["tokens"], "steps": trainer.state.global_step, "seconds": seconds,
        "tokens_per_second": (counted["tokens"] - counted["before"]) / seconds,
        "loss": sum(losses) / len(losses), "last_loss": losses[-1], "trained_parameters": trained,
        "lora": bool(given.get("use_peft")), "checkpointing": trainer.args.gradient_checkpointing,
        "peak_bytes": torch.cuda.max_memory_allocated() if has_gpu() else None,
    }  # fmt: skip


def build(name: str, folder: str, case: dict[str, Any], steps: int, toy: bool) -> Any:
    """Build TRL's trainer: its defaults, a pass over the rows, and what a case changes."""
    import trl
    from datasets import Dataset

    mine = {key: case[key] for key in ("use_peft", "load_in_4bit") if key in case}
    model = trl.ModelConfig(dtype="bfloat16" if "load_in_4bit" in case else "float32", **mine)
    given = {"max_length": lengths_of(toy)[1], "per_device_train_batch_size": BATCH} | {
        key: value for key, value in case.items() if key not in mine
    }
    config = trl.SFTConfig(
        output_dir=f"{folder}/out", max_steps=steps, num_train_epochs=1, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=1, use_cpu=toy, bf16=not toy,
        model_init_kwargs={"dtype": model.dtype}, **given,
    )  # fmt: skip
    shape, texts = SHAPES[name], rows_of(toy, SHAPES["toy"]["vocab_size"] - 2)
    return trl.SFTTrainer(
        model=make_model(shape, folder), args=config,
        processing_class=tokenizer_of(shape["vocab_size"]),
        train_dataset=Dataset.from_dict({"text": texts}), peft_config=trl.get_peft_config(model),
        quantization_config=trl.get_quantization_config(model),
    )  # fmt: skip


def shares(row: dict[str, Any], most: dict[str, float]) -> dict[str, float]:
    """Return which share of the device's multiplications went into training."""
    parameters, _ = gpu.weights_of(row["model"])
    operations = (4 if row["lora"] else 6) + (2 if row["checkpointing"] else 0)
    used = operations * parameters * row["tokens_per_second"]
    return {"share_of_multiplying": used / most["flops"]}


def table(result: dict[str, Any]) -> str:
    """Return the cases as Markdown."""
    lines = ["| model | case | tokens/s | of TRL's default | of multiplying | loss | GiB |",
             "|---|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    first = {row["model"]: row for row in result["cases"] if row["case"] == "trl"}
    for row in result["cases"]:
        if "error" in row:
            lines.append(f"| {row['model']} | {row['case']} | failed: {row['error']} | | | | |")
            continue
        of = first.get(row["model"], {}).get("tokens_per_second")
        peak = f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else ""
        times = f"{row['tokens_per_second'] / of:.2f}x" if of else ""
        lines.append(
            f"| {row['model']} | {row['case']} | {row['tokens_per_second']:,.0f} | {times} "
            f"| {row['share_of_multiplying']:.0%} | {row['loss']:.4f} | {peak} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
