"""Measure rejection sampling: the naive loop, plain batches, and our engine, on the same prompts.

    python benchmarks/rejection_sampling.py --model runs/quickstart/rl/model

Without the model, the quickstart's chain is run up to it first. A row is accepted when it is right,
well-formed and not cut off; verdicts are part of every side's time. The naive loop, one
`model.generate` for one completion, is timed on some of the prompts. Sides take turns. Writes
`benchmarks/results/rejection_sampling.json` and prints Markdown.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import results, save, spread, turns
from sides import asked, prepared

from chainforge.core.jsonl import Row
from chainforge.data.filters import SelectionArgs
from chainforge.data.select import select
from chainforge.data.tasks import TaskArgs, load_examples
from chainforge.generate.local import LocalEngine, open_policy
from chainforge.generate.rollouts import score_samples
from chainforge.generate.sampling import Rounds, accepted_by
from chainforge.generate.settings import Drawn, SamplingArgs, seed_of
from chainforge.train.templates import load_tokenizer

FORM = "r1-cold-start"
LONGEST = 72
ACCEPT = accepted_by(SelectionArgs())
Side = Callable[[Any, Any, list[Row], SamplingArgs], list[Row]]


def naive(model: Any, tokenizer: Any, rows: list[Row], args: SamplingArgs) -> list[Row]:
    """One prompt at a time, one completion at a time."""
    made = []
    for row in rows:
        of_row = []
        for number in range(args.num_samples):
            torch.manual_seed(seed_of(0, row["id"], number))
            of_row += generated(model, tokenizer, [row], args, 1)
        made += score_samples(of_row, FORM)
    return made


def batched(model: Any, tokenizer: Any, rows: list[Row], args: SamplingArgs) -> list[Row]:
    """Sample in plain batches of `model.generate`, in the order of the prompts."""
    made = []
    size = max(1, args.generation_batch_size // args.num_samples)
    for start in range(0, len(rows), size):
        torch.manual_seed(start)
        part = generated(model, tokenizer, rows[start : start + size], args, args.num_samples)
        made += score_samples(part, FORM)
    return made


def generated(
    model: Any, tokenizer: Any, rows: list[Row], args: SamplingArgs, copies: int
) -> list[Row]:
    """Return what one call of `model.generate` gives: `copies` completions of each row."""
    texts = [
        tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    given = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left",
                      add_special_tokens=False)  # fmt: skip
    with torch.inference_mode():
        out = model.generate(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], do_sample=True,
            temperature=args.temperature, top_p=1.0, top_k=0, max_new_tokens=args.max_new_tokens,
            num_return_sequences=copies, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    made = []
    for place, ids in enumerate(out[:, given["input_ids"].shape[1] :].tolist()):
        ended = tokenizer.eos_token_id in ids
        length = ids.index(tokenizer.eos_token_id) + 1 if ended else len(ids)
        text = tokenizer.decode(ids[:length], skip_special_tokens=True)
        made.append(
            rows[place // copies]
            | {"completion": text, "sample": place % copies, "tokens": length}
            | {"finish_reason": "stop" if ended else "length"}
        )
    return made


def ours(
    model: Any, tokenizer: Any, rows: list[Row], args: SamplingArgs, keep: int = 1
) -> list[Row]:
    """Sample with our engine, in rounds if set, until `keep` rows of a prompt are right."""
    engine, rounds = LocalEngine(model, tokenizer, args), Rounds(rows, args, ACCEPT, keep)

    def take(batch: list[Drawn]) -> None:
        made = [draw.row | {"sample": draw.sample} | answer for draw, answer in batch]
        rounds.note(score_samples(made, FORM))

    while draws := rounds.draws(rows, seed=0):
        engine.sample(draws, take)
    return rounds.samples()


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/rl/model"))
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--naive_prompts", type=int, default=48)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--out", type=Path,
                        default=results() / "rejection_sampling.json")  # fmt: skip
    args = parser.parse_args()
    if not args.model.exists():
        prepared(Path("runs"), "rl")
    model = open_policy(str(args.model), dtype="float32")
    tokenizer = load_tokenizer(str(args.model))
    rows = prompts(args.prompts)
    some = rows[:: max(1, len(rows) // args.naive_prompts)][: args.naive_prompts]
    result = {
        "model": {"parameters": sum(weight.numel() for weight in model.parameters())},
        "prompts": len(rows),
        "naive_prompts": len(some),
        "samples_per_prompt": args.samples,
        "max_new_tokens": LONGEST,
        "threads": torch.get_num_threads(),
        "speed": speed(model, tokenizer, rows, some, args),
        "adaptive": [adaptive(model, tokenizer, rows, args, keep) for keep in (1, 2, 4)],
    }
    save(args.out, result)
    print(table(result))


def prompts(count: int) -> list[Row]:
    """Return prompts of all kinds of the quickstart, mixed."""
    asks = asked("rejection.yaml")
    tasks = TaskArgs(tasks=asks, system_prompt="")
    rows = load_examples(tasks, FORM, seed=42)
    kinds = len(asks)
    mixed = [row for number in range(kinds) for row in rows[number::kinds]]
    return mixed[:: max(1, len(mixed) // count)][:count]


def speed(model: Any, tokenizer: Any, rows: list[Row], some: list[Row], args: Any) -> list[Row]:
    """Time every side; batched sides at each batch size, and with one sample of each prompt."""
    cases: list[tuple[str, Side, list[Row], SamplingArgs]] = [
        ("naive loop", naive, some, sampling(args.samples, 1))
    ]
    for size in args.batch_sizes:
        cases.append(("plain batches", batched, rows, sampling(args.samples, size)))
        cases.append(("ours", ours, rows, sampling(args.samples, size)))
    cases.append(("plain batches", batched, rows, sampling(1, 64)))
    cases.append(("ours", ours, rows, sampling(1, 64)))
    found: list[Row] = [
        {"side": name, "batch_size": case.generation_batch_size, "samples": case.num_samples}
        | {"seconds": [], "accepted": [], "tokens": [], "rows": len(of) * case.num_samples}
        for name, _, of, case in cases
    ]
    for _, side, of, case in cases:
        side(model, tokenizer, of[: max(1, len(of) // 20)], case)  # warm
    for number, _ in turns(range(len(cases)), args.repeats):
        _, side, of, case = cases[number]
        with timed(found[number]["seconds"]):
            made = side(model, tokenizer, of, case)
        found[number]["accepted"].append(sum(map(ACCEPT, made)))
        found[number]["tokens"].append(sum(row["tokens"] for row in made))
    for one in found:
        rates = [a / s for a, s in zip(one["accepted"], one["seconds"], strict=True)]
        one["accepted_per_second"] = spread(rates, 2)
    return found


def sampling(samples: int, batch_size: int, **more: Any) -> SamplingArgs:
    """Return the quickstart's sampling."""
    return SamplingArgs(num_samples=samples, max_new_tokens=LONGEST,
                        generation_batch_size=batch_size, **more)  # fmt: skip


def adaptive(model: Any, tokenizer: Any, rows: list[Row], args: Any, keep: int) -> Row:
    """Compare what a kept row costs with and without rounds; the samples have the same seeds."""
    selection = SelectionArgs(max_per_prompt=keep)
    found: Row = {"keep": keep}
    rounds = sampling(1, 256, max_samples=args.samples, round_size=keep)
    for name, case in (("fixed", sampling(args.samples, 256)), ("rounds", rounds)):
        seconds: list[float] = []
        with timed(seconds):
            made = ours(model, tokenizer, rows, case, keep)
        kept = select(made, selection)[1]["kept"]
        tokens = sum(row["tokens"] for row in made)
        found[name] = {
            "samples": len(made),
            "tokens": tokens,
            "kept": kept,
            "tokens_per_kept_row": round(tokens / kept, 1),
            "seconds": round(seconds[0], 2),
        }
    return found


@contextlib.contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Append how long the block took."""
    start = time.perf_counter()
    yield
    seconds.append(round(time.perf_counter() - start, 3))


def table(result: Row) -> str:
    """Return the figures as Markdown."""
    first = result["speed"][0]["accepted_per_second"]["median"]
    lines = ["| side | batch | samples a prompt | accepted rows/s (range) | of naive |",
             "|---|--:|--:|--:|--:|"]  # fmt: skip
    for case in result["speed"]:
        rate = case["accepted_per_second"]
        lines.append(
            f"| {case['side']} | {case['batch_size']} | {case['samples']} | {rate['median']} "
            f"({rate['low']} to {rate['high']}) | {rate['median'] / first:.1f}x |"
        )
    lines += ["", "| keep | tokens a kept row, fixed | in rounds | rows kept, fixed | in rounds |",
              "|--:|--:|--:|--:|--:|"]  # fmt: skip
    for case in result["adaptive"]:
        fixed, rounds = case["fixed"], case["rounds"]
        lines.append(
            f"| {case['keep']} | {fixed['tokens_per_kept_row']} | {rounds['tokens_per_kept_row']} "
            f"| {fixed['kept']} | {rounds['kept']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
