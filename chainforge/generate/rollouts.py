"""Score samples, record GRPO's rollouts with their rewards, and gate prompts by pass rate.

TRL's own log keeps the last batch only. A recorder sees every completion, because it wraps the
rewards, which TRL calls with everything it has. `rollouts.jsonl` then serves `reject` as a pool,
and the pass rates in a pool choose the prompts of RL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.jsonl import JsonLines, Row, read_rows, write_rows
from chainforge.core.transcript import chat_mark, read, special_ids
from chainforge.data.select import pass_rates, read_pool
from chainforge.generate.shards import (
    gathered,
    merge,
    own_file,
    rank,
    shard_of,
    shards_of,
    world_size,
)
from chainforge.rewards.answers import lenient_answer
from chainforge.rewards.functions import accuracy_rewards
from chainforge.rewards.reward import Reward, score, text_of, total

ROLLOUTS = "rollouts.jsonl"


def score_samples(
    rows: list[Row], transcript: str, rewards: Sequence[Reward] = (), tokenizer: Any = None
) -> list[Row]:
    """Return Samples with their rewards and verdicts.

    `correct` is strict, `lenient_correct` forgives the format; both are None when the answer cannot
    be judged. `extracted` is the answer that was found, `formatted` whether the format is right,
    and with a tokenizer `reasoning_tokens` the length of a well-formed reasoning and `chat_token`
    the first of its special tokens in the text, if any.
    """
    special = special_ids(tokenizer).values() if tokenizer is not None else ()
    calls = [_call(row, row["completion"], transcript) for row in rows]
    strict = accuracy_rewards(calls)
    parts = [read(row["completion"], transcript) for row in rows]
    # The lenient verdict differs from the strict one only where the format is wrong.
    loose = [call | {"lenient": True} for call, part in zip(calls, parts) if part is None]
    lenient = iter(accuracy_rewards(loose))
    points = score(rewards, rows, [row["completion"] for row in rows])
    scored = []
    for row, part, verdict, point in zip(rows, parts, strict, points, strict=True):
        text = row["completion"]
        columns: Row = {
            "rewards": point.rewards,
            "reward": point.total,
            "correct": _verdict(verdict),
            "lenient_correct": _verdict(verdict if part else next(lenient)),
            "formatted": part is not None,
            "extracted": part.answer if part else lenient_answer(text, transcript),
        }
        if tokenizer is not None:
            length = len(tokenizer(part.reasoning)["input_ids"]) if part else None
            columns["reasoning_tokens"] = length
            if mark := chat_mark(text, special):
                columns["chat_token"] = mark
        scored.append(row | columns)
    return scored


def _call(row: Row, completion: str, transcript: str) -> Row:
    """Return the arguments of `accuracy_reward` for a row."""
    given = {name: row.get(name) for name in ("answer", "verifier", "entry")}
    return given | {"completion": completion, "transcript": transcript}


def _verdict(value: float | None) -> bool | None:
    return None if value is None else bool(value)


class Recorded:
    """A reward whose values the recorder notes; TRL and ChainForge call it as the reward itself."""

    def __init__(self, reward: Reward, recorder: Recorder, last: bool) -> None:
        self.__name__, self.weight = reward.__name__, reward.weight
        self.model: Any = reward.function if hasattr(reward.function, "use") else None
        self._reward, self._recorder, self._last = reward, recorder, last

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **given: Any) -> Any:
        """Return the reward's values; after the last reward, write the rows."""
        values = self._reward(prompts, completions, **given)
        self._recorder.values[self.__name__] = values
        if self._last:
            self._recorder.write(prompts, completions, **given)
        return values


class Recorder:
    """Write the rollouts of one process of a GRPO stage.

    A row is a Sample with `step`, the first step that trains on it, and `policy`, the stage and
    how many updates it had made by then. While `held_out` is set the completions belong to an
    evaluation: they are not rollouts, and only their strict accuracy is logged.
    """

    def __init__(
        self,
        directory: Path,
        rewards: Sequence[Reward],
        training: Any,
        *,
        model: str,
        transcript: str,
        end: int,
        keep: bool = True,
    ) -> None:
        self.path = directory / ROLLOUTS
        self.keep, self.held_out = keep, False
        self.values: dict[str, list[float | None]] = {}
        self.rewards = [Recorded(reward, self, last=reward is rewards[-1]) for reward in rewards]
        self.ends = {end}  # a trainer may end at others too: its model's own
        self._group, self._transcript = training.num_generations, transcript
        sampling = {name: getattr(training, name) for name in ("temperature", "top_p", "top_k")}
        sampling["max_new_tokens"] = training.max_completion_length
        self._common: Row = {"source": "policy", "model": model, "stage": directory.name}
        self._common["sampling"] = sampling
        self._verdicts = [reward.__name__ for reward in rewards if reward.measures_correctness]
        self._lines: JsonLines | None = None

    def for_trl(self) -> list[Any]:
        """Return the rewards as TRL is given them: a reward model as a model, which it prepares."""
        return [one.model.open() if one.model else one for one in self.rewards]

    def attach(self, trainer: Any) -> None:
        """Take from the trainer the reward models that it prepared, and the ends of a completion.

        TRL would score all rows with a model: here it is bound to its task, and recorded.
        """
        for place, one in enumerate(self.rewards):
            if one.model:
                one.model.use(trainer.reward_funcs[place])
                trainer.reward_funcs[place] = one
                trainer.reward_func_names[place] = one.__name__
        self.ends = set(trainer.eos_token_ids)

    def resume(self, step: int) -> None:
        """Forget the rollouts of steps that a resumed run will take again."""
        files = [own_file(self.path)]
        if rank() == 0:  # and those of processes that no longer exist
            others = {shard_of(self.path, number) for number in range(1, world_size())}
            files = [path for path in (self.path, *shards_of(self.path)) if path not in others]
        for path in files:
            if path.exists():
                rows = read_rows(path, torn_tail=True)
                write_rows(path, [row for row in rows if row["step"] <= step])

    def write(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] = lambda name, value: None,
        **given: Any,
    ) -> None:
        """Write one generation of this process, every completion with all its rewards."""
        lists = {key: value for key, value in given.items() if isinstance(value, list)}
        columns = [dict(zip(lists, values)) for values in zip(*lists.values(), strict=True)]
        texts = [text_of(completion) for completion in completions]
        values, self.values = self.values, {}
        if self.held_out:
            calls = [_call(row, text, self._transcript) for row, text in zip(columns, texts)]
            for verdict in accuracy_rewards(calls):
                if verdict is not None:
                    log_metric("accuracy", verdict)
            return
        updates = int(getattr(trainer_state, "global_step", 0) or 0)
        step = {"step": updates + 1, "policy": f"{self._common['stage']}@{updates}"}
        rows = []
        for place, (text, ids) in enumerate(zip(texts, completion_ids, strict=True)):
            row = columns[place] | self._common | {"prompt": prompts[place], "completion": text}
            # A group may be spread over processes: count its places in the whole batch.
            row |= step | {"sample": (rank() * len(texts) + place) % self._group}
            rows.append(
                row | self._scored(text, ids, {name: v[place] for name, v in values.items()})
            )
        if self.keep:
            self._lines = self._lines or JsonLines(own_file(self.path))
            self._lines.extend(rows)
        self._log_groups(rows, log_metric)

    def _scored(self, text: str, ids: Sequence[int], scores: dict[str, float | None]) -> Row:
        """Return the columns that say how good a completion is, and how it ended."""
        verdicts = (scores[name] for name in self._verdicts)
        return {
            "rewards": scores,
            "reward": total(self.rewards, scores),
            "correct": _verdict(next((one for one in verdicts if one is not None), None)),
            "formatted": read(text, self._transcript) is not None,
            "tokens": len(ids),
            "finish_reason": "stop" if len(ids) and ids[-1] in self.ends else "length",
        }

    def _log_groups(self, rows: list[Row], log: Callable[[str, float], None]) -> None:
        """Log the shares of right and of well-formed completions, and of groups without a signal.

        TRL takes the mean of what is logged, so every completion and group counts once. Its own
        `frac_reward_zero_std` misses groups: in float32 the mean of eight rewards of 1.2 is not
        1.2, so their deviation is not quite zero.
        """
        for row in rows:
            log("formatted", row["formatted"])
            if row["correct"] is not None:
                log("accuracy", row["correct"])
        scores = [(row["reward"], row["correct"]) for row in rows]
        if len(scores) % self._group:  # groups are spread over processes
            scores = gathered(scores)
        for start in range(0, len(scores), self._group):
            rewards, verdicts = zip(*scores[start : start + self._group])
            log("frac_zero_advantage", len(set(rewards)) == 1)
            if self._verdicts:
                log("frac_mixed_correctness", len(set(verdicts) - {None}) > 1)

    def close(self) -> int:
        """Merge the rows of all processes, in the order of the steps; return how many.

        The first process calls this once all have ended.
        """
        if self._lines:
            self._lines.close()
        files = [path for path in (self.path, *shards_of(self.path)) if path.exists()]
        rows = [row for path in files for row in read_rows(path, torn_tail=True)]
        if files != [self.path]:
            merge(self.path, sorted(rows, key=lambda row: row["step"]))
        return len(rows)


@dataclass
class PoolArgs:
    """Existing samples to select from."""

    pool: list[str] | str = field(
        default_factory=list,
        metadata={
            "help": "Directories of GRPO or reject stages, or .jsonl files of samples: select from "
            "these, and sample nothing."
        },
    )

    def paths(self) -> list[str]:
        """Return the paths as a list; one path may be given as text."""
        return [self.pool] if isinstance(self.pool, str) else self.pool


@dataclass
class GateArgs:
    """Which prompts are worth training on, by how often they were solved before."""

    gate_pool: str | None = field(
        default=None,
        metadata={
            "help": "Directory of a reject or GRPO stage, or a .jsonl of samples, whose pass rates "
            "choose the prompts; default: all prompts."
        },
    )
    min_pass_rate: float = field(default=0.1, metadata={"help": "Least share of right answers."})
    max_pass_rate: float = field(default=0.9, metadata={"help": "Largest share of right answers."})


def gate(examples: Sequence[Row], args: GateArgs) -> tuple[list[Row], dict[str, int]]:
    """Return the Examples whose pass rate is in the range, each with its `pass_rate`, and counts.

    A group of completions that are all right, or all wrong, has no advantage. The counts are `in`,
    `kept`, `too_hard`, `too_easy` and `unmeasured`: prompts that the pool lacks. Raises
    `InputError` for a wrong range, and when nothing is left.
    """
    low, high = args.min_pass_rate, args.max_pass_rate
    if not 0 <= low <= high <= 1:
        raise InputError(
            f"min_pass_rate, max_pass_rate: expected 0 <= least <= largest <= 1, found {low} "
            f"and {high}"
        )
    if args.gate_pool is None:
        return list(examples), {}
    rates = pass_rates(read_pool([args.gate_pool]))
    counts = dict.fromkeys(("in", "kept", "too_hard", "too_easy", "unmeasured"), 0)
    counts["in"] = len(examples)
    kept = []
    for row in examples:
        rate = rates.get(row["id"])
        if rate is None:
            counts["unmeasured"] += 1
        elif not low <= rate <= high:
            counts["too_hard" if rate < low else "too_easy"] += 1
        else:
            kept.append(row | {"pass_rate": rate})
    counts["kept"] = len(kept)
    if not kept:
        raise InputError(
            f"gate_pool: no prompt has a pass rate from {low:g} to {high:g} ({counts}); widen "
            "min_pass_rate and max_pass_rate, or take a pool of the same tasks and system prompt"
        )
    return kept, counts
