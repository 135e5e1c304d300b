"""Roll a policy out over Examples and judge what it wrote: the work of reject and of evaluate.

What was sampled is judged and on disk as soon as it is there. A run that was cut goes on where it
stopped and samples nothing twice. Several processes of one launch share the prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chainforge.core.jsonl import Row, sample
from chainforge.core.transcript import chat_mark, lenient_answer, read, special_ids
from chainforge.generate.engine import Drawn, Engine, SamplingArgs
from chainforge.generate.rounds import Accept, Rounds, pass_rates
from chainforge.generate.shards import Shards, rank, world_size
from chainforge.rewards.functions import accuracy_rewards
from chainforge.rewards.reward import Reward, score
from chainforge.rewards.verify import start_pool

Progress = Callable[[int, int, str, str], None]
POLL_SECONDS = TELL_SECONDS = 0.2


@dataclass
class Rolled:
    """The Samples, in the order of the Examples, and what it took to get them.

    Each Sample has its prompt's `pass_rate`, `n_samples` and `n_correct` (see `pass_rates`).
    """

    samples: list[Row]
    report: dict[str, Any] = field(default_factory=dict)


def roll_out(
    engine: Callable[[], Engine],
    examples: list[Row],
    sampling: SamplingArgs,
    *,
    path: Path,
    transcript: str,
    seed: int,
    provenance: Row,
    rewards: Sequence[Reward] = (),
    accept: Accept | None = None,
    keep: int = 1,
    progress: Progress = lambda done, total, unit, note: None,
) -> Rolled:
    """Return judged Samples of each Example: `num_samples`, or as many as it needs.

    They are written down beside `path` as they come (`Shards`); those that are there already, for
    the model that `provenance` names, are not sampled again. `engine` opens the policy, once
    there is something to sample. With `max_samples` a prompt is done when `keep` different
    completions are accepted; `accept` says of Samples which are, and means the right ones if left
    out. Of several processes the first waits for the others and returns everything, the others
    return nothing.
    """
    sampling.check()
    start_pool(examples)
    with Shards(path, provenance["model"]) as shards:
        rounds = Rounds(examples, sampling, accept, keep)
        rounds.note(list(shards.rows.values()))

        told = 0.0

        def tell(every: float = 0.0) -> None:
            nonlocal told
            if rank() == 0 and time.monotonic() - told >= every:
                rounds.note(shards.refresh())
                _tell(rounds, progress)
                told = time.monotonic()

        def take(batch: list[Drawn]) -> None:
            rows = [_sample(drawn, sampling) | provenance for drawn in batch]
            rows = judge(rows, transcript, rewards, opened.tokenizer)
            shards.extend(rows)
            rounds.note(rows)
            tell(TELL_SECONDS)

        mine = examples[rank() :: world_size()]
        opened: Any = None
        while draws := rounds.draws(mine, seed):
            opened = opened or engine()
            opened.sample(draws, take)
        if rank() > 0:
            return Rolled([])
        tell()
        while rounds.draws(examples, seed):  # what the other processes have not done yet
            time.sleep(POLL_SECONDS)
            tell()
    samples = rounds.samples()
    rates = pass_rates(samples)
    return Rolled([row | rates[row["id"]] for row in samples], rounds.report())


def _tell(rounds: Rounds, progress: Progress) -> None:
    right = rounds.right / max(rounds.count, 1)
    if rounds.args.adaptive:
        note = f"{right:.0%} right of {rounds.count:,} samples"
        progress(rounds.settled(), len(rounds.examples), "prompts", note)
    else:
        total = len(rounds.examples) * rounds.args.most
        progress(rounds.count, total, "samples", f"{right:.0%} right")


def _sample(drawn: Drawn, sampling: SamplingArgs) -> Row:
    """Make the Sample of one completion; its sampling parameters and its seed stand in it."""
    draw, answer = drawn
    columns = {key: value for key, value in answer.items() if key != "completion"}
    if sampling.adaptive:
        columns["round"] = draw.sample // sampling.round_size
    return sample(
        draw.row,
        answer["completion"],
        draw.sample,
        source="policy",
        sampling=sampling.parameters() | {"seed": draw.seed},
        **columns,
    )


def judge(
    rows: list[Row], transcript: str, rewards: Sequence[Reward] = (), tokenizer: Any = None
) -> list[Row]:
    """Return Samples with their rewards and verdicts.

    `correct` is strict, `lenient_correct` forgives the form; both are None when the gold cannot
    be judged. `extracted` is the answer that was found, `formatted` whether the form is right,
    and with a tokenizer `reasoning_tokens` the length of a well-formed reasoning and `chat_token`
    the first of its special tokens that the text holds, if any.
    """
    special = special_ids(tokenizer).values() if tokenizer is not None else ()
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
            if mark := chat_mark(row["completion"], special):
                verdicts["chat_token"] = mark
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
