"""Data sets as TRL's trainers want them, from rows and from the directories of earlier stages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainforge.core.disk import replacing
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Message, Row
from chainforge.core.secrets import public
from chainforge.core.transcript import DEFAULT, PRESETS, is_blank, read, write
from chainforge.data.columns import columns_of
from chainforge.data.mixing import mix
from chainforge.data.salvage import SHARE, Salvage, salvage
from chainforge.data.tables import wrong_turns

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FALLBACK = "offline-fallback"
FILE = "train.parquet"
# The columns that SFT looks at.
_TRAINED_ON = ("prompt", "completion", "messages", "source", "drop")
# Where servers and data sets keep the reasoning of an assistant's message, and what else a message
# may hold that would be lost: only its text is trained on.
_REASONING = ("reasoning_content", "reasoning", "thinking")
_LOST = ("tool_calls", "function_call", "reasoning_details", "thinking_blocks")


@dataclass
class DataArgs:
    """What to train on."""

    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Directories of data stages, folders of parquet, or .jsonl files."},
    )
    data_weights: list[float] = field(
        default_factory=list,
        metadata={
            "help": "In which ratio the sources of `data` stand, such as 3 1; no row is taken "
            "twice. Every row of each when left out."
        },
    )
    data_repeat: bool = field(
        default=False,
        metadata={"help": "Reach data_weights by repeating rows instead of leaving rows out."},
    )
    max_bad_rows: float = field(
        default=SHARE,
        metadata={"help": "Share of malformed rows above which a source stops the run."},
    )
    allow_offline_rows: bool = field(
        default=False,
        metadata={"help": "Also train on worked solutions that stood in for a failed teacher."},
    )
    transcript: str = field(default=DEFAULT, metadata={"help": "Preset of the transcript's tags."})


def sft_dataset(paths: Sequence[str | Path], *, allow_offline_rows: bool = False) -> Dataset:
    """Return the kept rows of several stages as `sft_mixture` does, every row of each."""
    args = DataArgs([str(path) for path in paths], allow_offline_rows=allow_offline_rows)
    return sft_mixture(args)[0]


def sft_mixture(args: DataArgs, seed: int = 0) -> tuple[Dataset, dict[str, dict[str, int]]]:
    """Return a data set of `prompt` and `completion` messages, and each source's rows and use.

    A source is a stage's directory (its `dataset/`, or its `samples.jsonl`), a folder of parquet
    files, or a .jsonl or .parquet file; rows may have `messages` instead of `prompt` and
    `completion`. A reasoning beside an assistant's text is joined with it as `transcript` says.
    Rows with a reason in `drop`, and wrong ones that were never selected, are left out and counted;
    malformed rows are left out and written to the stage's rejects. Raises `InputError`, naming path
    and row, for too many of them, for rows of the fallback teacher unless they are allowed, and
    when nothing is left.
    """
    from datasets import Dataset

    if not args.data:
        raise InputError("data: none given; name the directory of a data stage or a .jsonl file")
    read_in = [_source(path, args) for path in args.data]
    sources = [pairs for pairs, _ in read_in]
    sizes = [len(source) for source in sources]
    chosen = [list(range(size)) for size in sizes]
    if args.data_weights:
        chosen = mix(sizes, args.data_weights, repeat=args.data_repeat, seed=seed)
    pairs = [source[i] for source, picks in zip(sources, chosen, strict=True) for i in picks]
    counts = {
        str(path): {"rows": size, "used": len(picks)} | ({"dropped": dropped} if dropped else {})
        for path, size, picks, (_, dropped) in zip(args.data, sizes, chosen, read_in, strict=True)
    }
    columns = {"prompt": [pair[0] for pair in pairs], "completion": [pair[1] for pair in pairs]}
    return Dataset.from_dict(columns), counts


def _source(path: str, args: DataArgs) -> tuple[list[tuple[list[Message], list[Message]]], int]:
    """Return one source's rows as prompts and completions, and how many were dropped before."""
    found = _read(path, _TRAINED_ON)
    fallback = [number for number, row in found.rows if row.get("source") == FALLBACK]
    if fallback and not args.allow_offline_rows:
        raise InputError(
            f"{path}: {len(fallback)} of {len(found.rows)} rows (the first: row {fallback[0]}) are "
            f"{FALLBACK}: worked solutions in place of a teacher that failed; collect again, "
            "or set `allow_offline_rows: true`"
        )
    pairs = []
    good = []
    for number, row in found.rows:
        try:
            pairs.append(_pair(row, args.transcript))
            good.append((number, row))
        except InputError as error:
            found.faults.append((number, str(error)))
    found.rows = good
    found.settle(args.max_bad_rows)
    return pairs, found.dropped


def read_kept(path: str | Path) -> list[tuple[int, Row]]:
    """Return a stage's kept rows, or a file's rows, each with its number in the file."""
    return _read(path).settle(SHARE)


def _read(path: str | Path, columns: tuple[str, ...] = ()) -> Salvage:
    """Read what `read_kept` returns, with what is wrong with other rows.

    Of parquet files only `columns` are read, where any are given.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".parquet":
        found = Salvage(path, list(enumerate(_parquet([path], columns), start=1)))
    elif path.is_file():
        found = salvage(path)
    elif not path.is_dir():
        raise InputError(f"{path}: no such file or directory")
    elif files := sorted((path / "dataset").glob("*.parquet")) or sorted(path.glob("*.parquet")):
        found = Salvage(path, list(enumerate(_parquet(files, columns), start=1)))
    elif (path / "samples.jsonl").is_file():
        found = salvage(path / "samples.jsonl")
    else:
        raise InputError(
            f"{path}: holds no rows: neither dataset/*.parquet nor samples.jsonl; is it the "
            "directory of a finished collect or reject stage?"
        )
    kept = [(number, row) for number, row in found.rows if not _dropped(row)]
    found.dropped, found.rows = len(found.rows) - len(kept), kept
    if not found.rows:
        found.settle()
        raise InputError(
            f"{path}: no rows to train on ({found.dropped} are marked `drop`, or wrong); its "
            "funnel.json, if any, says where they went"
        )
    if found.dropped:
        words = "%s: left out %d rows that are marked `drop`, or wrong and never selected"
        logger.warning(words, path, found.dropped)
    return found


def _dropped(row: Row) -> bool:
    """Return whether selection dropped a Sample, or would have, had it seen it: it is wrong."""
    return bool(row["drop"]) if "drop" in row else row.get("correct") is False


def _parquet(files: list[Path], columns: tuple[str, ...]) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[Row] = []
    for file in files:
        try:
            with pq.ParquetFile(file) as table:
                there = [name for name in columns if name in table.schema_arrow.names]
                for batch in table.iter_batches(1024, columns=there if columns else None):
                    rows += batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file} is not a parquet file: {error}") from None
    return rows


def _pair(row: Row, transcript: str = DEFAULT) -> tuple[list[Message], list[Message]]:
    """Return a row's prompt and completion as messages; raise `InputError` for what is neither."""
    turns, said = row.get("prompt"), row.get("completion")
    if turns is None and isinstance(row.get("messages"), list):
        turns, said = row["messages"][:-1], row["messages"][-1:]
    if wrong := wrong_turns(turns):
        raise InputError(f"prompt: {wrong}")
    assert turns is not None
    if isinstance(said, list) and len(said) == 1 and isinstance(said[0], dict):
        if said[0].get("role") != "assistant":
            raise InputError(f"completion: the last turn is not the assistant's: {said!r:.80}")
        said = _text(said[0], transcript)
    if not isinstance(said, str) or is_blank(said):
        raise InputError(f"completion: expected text, found {said!r:.80}")
    plain = [{"role": turn["role"], "content": _text(turn, transcript)} for turn in turns]
    return plain, [{"role": "assistant", "content": said}]


def _text(turn: dict[str, Any], transcript: str) -> Any:
    """Return a message's content, joined with the reasoning beside it as `transcript` says."""
    if lost := [key for key in _LOST if turn.get(key)]:
        raise InputError(f"the {turn['role']} turn has {lost[0]}, which would be lost: take it out")
    said, thoughts = turn.get("content"), [turn[key] for key in _REASONING if turn.get(key)]
    if not thoughts or not isinstance(said, str):
        return said
    if any(not isinstance(thought, str) or thought != thoughts[0] for thought in thoughts):
        raise InputError(f"the {turn['role']} turn has several reasonings: {thoughts!r:.80}")
    for preset in PRESETS:  # some servers leave the reasoning in the content as well
        whole = read(said, preset)
        if whole is not None and whole.reasoning == thoughts[0].strip():
            if preset == transcript:
                return said
            said = whole.answer
            break
    return write(thoughts[0], said, transcript)


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
    return Dataset.from_dict(columns_of(rows))


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

    The file appears whole or not at all. Text completions become messages, as in `sft_dataset`;
    who wrote a row is named without what a path tells of this machine.
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
    pairs = [dict(zip(("prompt", "completion"), _pair(row), strict=True)) for row in rows]
    whole = [_named(row) | pair for row, pair in zip(rows, pairs, strict=True)]
    with replacing(folder / FILE) as temporary:
        pq.write_table(pa.table(columns_of(whole)), temporary)
    return folder / FILE


def _named(row: Row) -> Row:
    model = row.get("model")
    return row | {"model": public(model)} if isinstance(model, str) else row
