"""Keep the rollouts of RL: scored completions that are paid for already.

TRL's own log keeps the last batch only. A recorder sees every completion, because it stands around
the rewards, which TRL calls with everything it has. `rollouts.jsonl` then serves `reject` as a
pool: samples without sampling, from the policies of earlier steps.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError
from chainforge.core.jsonl import JsonLines, Row, read_rows, write_rows
from chainforge.core.transcript import read
from chainforge.data.pool import MARKS, find_samples
from chainforge.generate.shards import gathered, merge, own_file, rank, shards_of, world_size
from chainforge.rewards.functions import accuracy_rewards
from chainforge.rewards.reward import Reward, text_of

ROLLOUTS = "rollouts.jsonl"


@dataclass
class PoolArgs:
    """Samples that are there already."""

    pool: list[str] | str = field(
        default_factory=list,
        metadata={
            "help": "Directories of GRPO or reject stages, or .jsonl files of samples: select from "
            "these, and sample nothing."
        },
    )

    def paths(self) -> list[str]:
        """Return the paths, however many there are."""
        return [self.pool] if isinstance(self.pool, str) else self.pool


class Recorded:
    """A reward whose values the recorder notes; TRL and we call it as the reward itself."""

    def __init__(self, reward: Reward, recorder: Recorder, last: bool) -> None:
        self.__name__, self.weight = reward.__name__, reward.weight
        self._reward, self._recorder, self._last = reward, recorder, last

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **given: Any) -> Any:
        """Return the reward's values; after the last reward the rows are written down."""
        values = self._reward(prompts, completions, **given)
        self._recorder.values[self.__name__] = values
        if self._last:
            self._recorder.write(prompts, completions, **given)
        return values


class Recorder:
    """Writes the rollouts of one process of a GRPO stage.

    A row is a Sample with `step`, the first step that trains on it, and `policy`, the stage and
    how many updates it had made by then. While `held_out` is set the completions are an
    evaluation's: they are no rollouts, and only their strict accuracy is logged.
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
        self._stage, self._model, self._transcript = directory.name, model, transcript
        self._group = training.num_generations
        self.ends = {end}  # a trainer may end at others too: its model's own
        self._sampling = {
            "temperature": training.temperature,
            "top_p": training.top_p,
            "top_k": training.top_k,
            "max_new_tokens": training.max_completion_length,
        }
        self._weights = {reward.__name__: reward.weight for reward in rewards}
        self._verdicts = [reward.__name__ for reward in rewards if reward.measures_correctness]
        self._lines: JsonLines | None = None

    def resume(self, step: int) -> None:
        """Forget the rollouts of steps that a resumed run will take again."""
        files = [own_file(self.path)]
        if rank() == 0:  # and those of processes that are no longer there
            ours = {self.path.with_name(f"{self.path.stem}.rank-{n}.jsonl")
                    for n in range(1, world_size())}  # fmt: skip
            files += [path for path in (self.path, *shards_of(self.path)) if path not in ours]
        for path in dict.fromkeys(files):
            if path.exists():
                rows = read_rows(path, torn_tail=True)
                write_rows(path, [row for row in rows if row["step"] <= step])

    def write(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        trainer_state: Any = None,
        **given: Any,
    ) -> None:
        """Write down one generation of this process, every completion with all its rewards."""
        updates = int(getattr(trainer_state, "global_step", 0) or 0)
        size = len(completions)
        columns = {key: value for key, value in given.items() if isinstance(value, list)}
        log = given.get("log_metric") or (lambda name, value: None)
        texts = [text_of(completion) for completion in completions]
        if self.held_out:
            self.values = {}
            self._log_accuracy(texts, columns, log)
            return
        rows = []
        for place, (text, ids) in enumerate(zip(texts, completion_ids, strict=True)):
            scores = {name: values[place] for name, values in self.values.items()}
            parts = [self._weights[name] * value for name, value in scores.items()
                     if value is not None]  # fmt: skip
            verdict = next((v for name in self._verdicts if (v := scores[name]) is not None), None)
            rows.append(
                {key: values[place] for key, values in columns.items()}
                | {
                    "prompt": prompts[place],
                    "completion": text,
                    # A group may be spread over processes: count its places in the whole batch.
                    "sample": (rank() * size + place) % self._group,
                    "step": updates + 1,
                    "policy": f"{self._stage}@{updates}",
                    "source": "policy",
                    "model": self._model,
                    "stage": self._stage,
                    "rewards": scores,
                    "reward": sum(parts) if parts else None,
                    "correct": None if verdict is None else bool(verdict),
                    "formatted": read(text, self._transcript) is not None,
                    "sampling": self._sampling,
                    "tokens": len(ids),
                    "finish_reason": "stop" if len(ids) and ids[-1] in self.ends else "length",
                }
            )
        self.values = {}
        if self.keep:
            self._lines = self._lines or JsonLines(own_file(self.path))
            self._lines.extend(rows)
        self._log_groups(rows, log)

    def _log_accuracy(
        self, texts: list[str], columns: dict[str, list[Any]], log: Callable[[str, float], None]
    ) -> None:
        """Log the strict accuracy of an evaluation's completions, whatever the rewards are."""
        names = [name for name in ("answer", "verifier", "entry") if name in columns]
        given: dict[str, list[Any]] = {name: columns[name] for name in names}
        given |= {"completion": texts, "transcript": [self._transcript] * len(texts)}
        calls = [dict(zip(given, values)) for values in zip(*given.values(), strict=True)]
        for verdict in accuracy_rewards(calls):
            if verdict is not None:
                log("accuracy", verdict)

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
        """Make one file of all processes' rows, in the order of the steps; return how many.

        For the first process, once all have ended.
        """
        if self._lines:
            self._lines.close()
        files = [path for path in (self.path, *shards_of(self.path)) if path.exists()]
        rows = [row for path in files for row in read_rows(path, torn_tail=True)]
        if len(files) > 1 or files != [self.path]:
            merge(self.path, sorted(rows, key=lambda row: row["step"]))
        return len(rows)


def read_pool(paths: Sequence[str]) -> list[Row]:
    """Return the Samples of stages or files, numbered anew within each prompt.

    Raises `InputError` for a path without samples and for rows that are none.
    """
    numbers: Counter[str] = Counter()
    pool = []
    for file in find_samples(paths):
        for line, row in enumerate(read_rows(file), start=1):
            lacking = [name for name in ("id", "prompt", "completion") if name not in row]
            if lacking:
                raise InputError(f"{file}, row {line}: no sample: it has no {lacking[0]!r}")
            number = numbers[row["id"]]
            numbers[row["id"]] += 1
            left = {key: value for key, value in row.items() if key not in MARKS}
            pool.append(left | {"sample": number, "pooled_from": file.parent.name})
    if not pool:
        raise InputError(f"pool: {', '.join(map(str, paths))}: no samples in it")
    return pool


def origins(pool: Sequence[Row]) -> dict[str, Any]:
    """Return which policies wrote a pool: how many, from which steps; older ones than the last."""
    steps: dict[str, list[int]] = defaultdict(list)
    for row in pool:
        steps[str(row.get("stage") or row["pooled_from"])].append(int(row.get("step") or 0))
    return {
        stage: {"rows": len(of), "policies": len(set(of)), "steps": [min(of), max(of)]}
        if any(of)
        else {"rows": len(of)}
        for stage, of in steps.items()
    }
