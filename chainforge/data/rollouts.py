"""Roll a policy out over Examples and judge what it wrote: the work of reject and of evaluate.

Every batch is judged and on disk before the next is generated. A run that was cut goes on where
it stopped and samples nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.records import JsonLines, Row, read_rows, sample
from chainforge.core.transcript import lenient_answer, read
from chainforge.data.sampling import SamplingArgs, generate
from chainforge.rewards.functions import accuracy_rewards
from chainforge.rewards.scoring import Reward, score

Progress = Callable[[int, int, str, str], None]


def open_policy(reference: str, **options: Any) -> Any:
    """Load a policy for inference, on the GPU where there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(reference, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{reference}: no model could be loaded: {reason}") from None
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def roll_out(
    model: Any,
    tokenizer: Any,
    examples: list[Row],
    sampling: SamplingArgs,
    *,
    path: Path,
    transcript: str,
    seed: int,
    provenance: Row,
    rewards: Sequence[Reward] = (),
    progress: Progress = lambda done, total, unit, note: None,
) -> list[Row]:
    """Return `num_samples` judged Samples of each Example, in the order of the Examples.

    They are appended to `path` as they come; those that `path` holds already, for the model that
    `provenance` names, are taken from there.
    """
    total = len(examples) * sampling.num_samples
    with JsonLines(path) as lines:
        mine = [row for row in read_rows(path) if row["model"] == provenance["model"]]
        rows = {(row["id"], row["sample"]): row for row in mine}
        for batch in generate(model, tokenizer, examples, sampling, seed, done=set(rows)):
            made = [_sample(examples[record["index"]], record, sampling) for record in batch]
            made = judge([row | provenance for row in made], transcript, rewards, tokenizer)
            lines.extend(made)
            rows |= {(row["id"], row["sample"]): row for row in made}
            right = sum(bool(row["correct"]) for row in rows.values())
            progress(len(rows), total, "samples", f"{right / len(rows):.0%} right")
    order = [(row["id"], index) for row in examples for index in range(sampling.num_samples)]
    return [rows[key] for key in order]


def _sample(row: Row, record: Row, sampling: SamplingArgs) -> Row:
    """Make the Sample of one completion; its sampling parameters stand in it."""
    parameters = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": record["seed"],
    }
    return sample(
        row,
        record["completion"],
        record["sample"],
        source="policy",
        sampling=parameters,
        tokens=record["tokens"],
        finish_reason=record["finish_reason"],
    )


def judge(
    rows: list[Row], transcript: str, rewards: Sequence[Reward] = (), tokenizer: Any = None
) -> list[Row]:
    """Return Samples with their rewards and verdicts.

    `correct` is strict, `lenient_correct` forgives the form; both are None when the gold cannot
    be judged. `extracted` is the answer that was found, `formatted` whether the form is right,
    and with a tokenizer `reasoning_tokens` the length of a well-formed reasoning.
    """
    calls = [_call(row, transcript) for row in rows]
    strict = accuracy_rewards(calls)
    parts = [read(row["completion"], transcript) for row in rows]
    # The lenient verdict differs from the strict one only where the form is wrong.
    loose = [index for index, part in enumerate(parts) if part is None]
    forgiven = accuracy_rewards([calls[index] | {"lenient": True} for index in loose])
    lenient = list(strict)
    for index, verdict in zip(loose, forgiven, strict=True):
        lenient[index] = verdict
    scores = score(rewards, rows, [row["completion"] for row in rows])
    judged = []
    for row, part, right, right_in_any_form, points in zip(
        rows, parts, strict, lenient, scores, strict=True
    ):
        found = part.answer if part else lenient_answer(row["completion"], transcript)
        verdicts: Row = {
            "rewards": points.rewards,
            "reward": points.total,
            "correct": None if right is None else bool(right),
            "lenient_correct": None if right_in_any_form is None else bool(right_in_any_form),
            "formatted": part is not None,
            "extracted": found,
        }
        if tokenizer is not None:
            text = part.reasoning if part else ""
            verdicts["reasoning_tokens"] = len(tokenizer(text)["input_ids"]) if part else None
        judged.append(row | verdicts)
    return judged


def _call(row: Row, transcript: str) -> dict[str, Any]:
    """Return the arguments with which `accuracy_reward` judges a Sample."""
    return {
        "completion": row["completion"],
        "answer": row["answer"],
        "verifier": row["verifier"],
        "entry": row.get("entry"),
        "transcript": transcript,
    }
