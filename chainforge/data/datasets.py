"""Data sets as TRL's trainers want them, from rows and from the directories of earlier stages."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainforge.core.errors import InputError
from chainforge.core.records import Message, Row, read_rows
from chainforge.core.transcript import DEFAULT
from chainforge.data.tables import listed, wrong_turns

if TYPE_CHECKING:
    from datasets import Dataset

FALLBACK = "offline-fallback"
FILE = "train.parquet"


@dataclass
class DataArgs:
    """What to train on."""

    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Directories of data stages, folders of parquet, or .jsonl files."},
    )
    allow_offline_rows: bool = field(
        default=False,
        metadata={"help": "Also train on worked solutions that stood in for a failed teacher."},
    )
    transcript: str = field(default=DEFAULT, metadata={"help": "Preset of the transcript's tags."})


def sft_dataset(paths: Sequence[str | Path], *, allow_offline_rows: bool = False) -> Dataset:
    """Return the kept rows of several stages as a data set of `prompt` and `completion` messages.

    A path is a stage's directory (its `dataset/`, or the rows of `samples.jsonl` without a reason
    to drop them), a folder of parquet files, or a .jsonl or .parquet file; rows may have
    `messages` instead of `prompt` and `completion`. Raises `InputError`, naming path and row, for
    rows without a prompt or completion, for rows of the fallback teacher unless they are
    allowed, and when nothing is left.
    """
    from datasets import Dataset

    if not paths:
        raise InputError("data: none given; name the directory of a data stage or a .jsonl file")
    prompts: list[list[Message]] = []
    completions: list[list[Message]] = []
    for path in paths:
        rows = read_kept(path)
        wrong: list[str] = []
        fallback = [number for number, row in rows if row.get("source") == FALLBACK]
        if fallback and not allow_offline_rows:
            raise InputError(
                f"{path}: {len(fallback)} of {len(rows)} rows (the first: row {fallback[0]}) are "
                f"{FALLBACK}: worked solutions in place of a teacher that failed; collect again, "
                "or set `allow_offline_rows: true`"
            )
        for number, row in rows:
            try:
                prompt, completion = _pair(row)
            except InputError as error:
                wrong.append(f"row {number}: {error}")
                continue
            prompts.append(prompt)
            completions.append(completion)
        if wrong:
            raise InputError(
                f"{path}: {len(wrong)} of {len(rows)} rows are malformed:{listed(wrong)}"
            )
    return Dataset.from_dict({"prompt": prompts, "completion": completions})


def read_kept(path: str | Path) -> list[tuple[int, Row]]:
    """Return a stage's kept rows, or a file's rows, each with its number in the file."""
    path = Path(path)
    if path.is_file():
        rows = _parquet([path]) if path.suffix == ".parquet" else read_rows(path)
        kept = list(enumerate(rows, start=1))
    elif not path.is_dir():
        raise InputError(f"{path}: no such file or directory")
    elif files := sorted((path / "dataset").glob("*.parquet")) or sorted(path.glob("*.parquet")):
        kept = list(enumerate(_parquet(files), start=1))
    elif (path / "samples.jsonl").is_file():
        rows = read_rows(path / "samples.jsonl", torn_tail=True)
        kept = [(number, row) for number, row in enumerate(rows, start=1) if not row.get("drop")]
    else:
        raise InputError(
            f"{path}: holds no rows: neither dataset/*.parquet nor samples.jsonl; is it the "
            "directory of a finished collect or reject stage?"
        )
    if not kept:
        raise InputError(
            f"{path}: no rows to train on; its funnel.json, if any, says where they went"
        )
    return kept


def _parquet(files: list[Path]) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[Row] = []
    for file in files:
        try:
            rows += pq.read_table(file).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file} is not a parquet file: {error}") from None
    return rows


def _pair(row: Row) -> tuple[list[Message], list[Message]]:
    """Return a row's prompt and completion as messages."""
    turns, said = row.get("prompt"), row.get("completion")
    if turns is None and isinstance(row.get("messages"), list):
        turns, said = row["messages"][:-1], row["messages"][-1:]
    if wrong := wrong_turns(turns):
        raise InputError(f"prompt: {wrong}")
    assert turns is not None
    if isinstance(said, list) and len(said) == 1 and isinstance(said[0], dict):
        if said[0].get("role") != "assistant":
            raise InputError(f"completion: the last turn is not the assistant's: {said!r:.80}")
        said = said[0].get("content")
    if not isinstance(said, str) or not said.strip():
        raise InputError(f"completion: expected text, found {said!r:.80}")
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    return plain, [{"role": "assistant", "content": said}]


def grpo_dataset(rows: Sequence[Row]) -> Dataset:
    """Return Examples as a data set for GRPO: every column, so that rewards find theirs by name.

    A column that Arrow cannot hold as it is (mappings, mixed types) becomes JSON text.
    """
    from datasets import Dataset

    if not rows:
        raise InputError("no rows to train on")
    for number, row in enumerate(rows, start=1):
        if wrong := wrong_turns(row.get("prompt")):
            raise InputError(f"row {number}: {wrong}")
    return Dataset.from_dict(_columns(rows))


def check_batch(rows: Sequence[Row], generation_batch_size: int, num_generations: int) -> None:
    """Raise `InputError` unless the rows fill one generation batch.

    With fewer, TRL ends after 0 steps without an error; the last incomplete batch is left out.
    """
    if num_generations < 2:
        raise InputError(f"num_generations: expected 2 or more to compare, found {num_generations}")
    if generation_batch_size % num_generations:
        raise InputError(
            f"num_generations ({num_generations}) does not divide the generation batch of "
            f"{generation_batch_size} completions (per_device_train_batch_size x processes x "
            "steps_per_generation); make one a multiple of the other"
        )
    prompts = generation_batch_size // num_generations
    if len(rows) < prompts:
        raise InputError(
            f"{len(rows)} rows are fewer than the {prompts} prompts of one generation batch "
            f"({generation_batch_size} completions, {num_generations} a prompt): raise the tasks' "
            "`size`, or lower per_device_train_batch_size or gradient_accumulation_steps"
        )


def save_dataset(rows: Sequence[Row], path: str | Path) -> Path:
    """Write kept Samples to `path`/train.parquet, ready for SFT and `datasets.load_dataset`.

    The file appears whole or not at all. Text completions become messages, as in `sft_dataset`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rows:
        raise InputError(
            f"{path}: no row was kept, so there is nothing to train on; funnel.json beside it says "
            "where the rows went"
        )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{FILE}.tmp"
    pairs = [dict(zip(("prompt", "completion"), _pair(row), strict=True)) for row in rows]
    whole = [row | pair for row, pair in zip(rows, pairs, strict=True)]
    pq.write_table(pa.table(_columns(whole)), temporary)
    os.replace(temporary, folder / FILE)
    return folder / FILE


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Return rows as columns of one type each; what a row lacks is None."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    messages = ("prompt", "completion")
    return {
        name: values if name in messages else _one_type(values) for name, values in columns.items()
    }


def _one_type(values: list[Any]) -> list[Any]:
    """Return a column that Arrow holds without changing a value, else its values as JSON text."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    # Arrow would give every mapping the keys of all, so mappings are text too.
    if len(kinds) <= 1 and dict not in kinds and not _holds_mappings(values):
        try:
            pa.array(values)
            return values
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            pass
    return [None if value is None else json.dumps(value, default=str) for value in values]


def _holds_mappings(values: list[Any]) -> bool:
    return any(
        isinstance(value, list) and any(isinstance(item, dict) for item in value)
        for value in values
    )
