"""The data set of SFT or DPO, from rows and from the directories of earlier stages."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Message, Row, writing
from chainforge.core.process import scratch
from chainforge.core.transcript import DEFAULT, PRESETS, is_blank, read, write
from chainforge.data.rows import FoundRows, read_file, wrong_turns

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FALLBACK = "offline-fallback"
# What is trained on beside the prompt; the pairs of DPO are in a folder of their own.
SFT, DPO = ("completion",), ("chosen", "rejected")
_OTHERS = ("prompt", "messages", "source", "drop")  # the other columns that are looked at
# Where servers and data sets keep the reasoning of an assistant's message.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")

_BATCH, _BUFFER = 1000, 1 << 20  # rows in memory at a time; bytes of a parquet file

Pair = tuple[list[Message], list[Message]]  # prompt and completion
Columns = tuple[str, ...]


@dataclass
class DataArgs:
    """What to train on."""

    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Directories of data stages, folders of parquet, or .jsonl files."},
    )
    allow_offline_rows: bool = field(
        default=False,
        metadata={"help": "Also train on worked solutions that replaced a failed teacher's."},
    )
    transcript: str = field(default=DEFAULT, metadata={"help": "Preset of the transcript's tags."})
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Arguments of the chat template, which the saved one has as defaults."},
    )


def sft_dataset(
    args: DataArgs, columns: Columns = SFT
) -> tuple[Dataset, dict[str, dict[str, int]]]:
    """Return a data set of `prompt` and other columns, all messages, and the rows of each source.

    A source is a stage's directory (its `dataset/`, or its `samples.jsonl`; for DPO its `pairs/`),
    a folder of parquet files, or a .jsonl or .parquet file; rows may have `messages` instead of
    `prompt` and `completion`. A reasoning beside an assistant's text is joined with it as
    `transcript` says. Rows with a reason in `drop`, and wrong ones that were never selected, are
    left out and counted; malformed rows are left out and written to the stage's rejects. Raises
    `InputError`, naming path and row, for too many of them, for rows of the fallback teacher unless
    they are allowed, and when nothing is left. The data set is mapped from a file, beside which
    TRL's tokens go as well.
    """
    import pyarrow as pa
    from datasets import Dataset, config

    if not args.data:
        raise InputError("data: none given; name the directory of a data stage or a .jsonl file")
    turns = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    schema = pa.schema(dict.fromkeys(("prompt", *columns), turns))
    handle, file = tempfile.mkstemp(".arrow", dir=scratch(Path(config.HF_DATASETS_CACHE)))
    counts: dict[str, dict[str, int]] = {}
    with writing(file), open(handle, "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
        for path in args.data:
            found = Counter[str]()
            rows = _source(path, args, columns, found)
            while batch := list(itertools.islice(rows, _BATCH)):
                made = [pa.array(column, turns) for column in zip(*batch, strict=True)]
                out.write_batch(pa.record_batch(made, schema=schema))
            counts[path] = {key: found[key] for key in ("rows", "dropped") if found[key]}
    return Dataset.from_file(file), counts


def _source(
    path: str, args: DataArgs, columns: Columns, counts: Counter[str]
) -> Iterator[list[list[Message]]]:
    """Yield one source's rows, prompt and columns; count them, and those dropped before."""
    found = _read(Path(path), columns)
    found.rows = _kept(path, found.rows, args, counts)
    for pairs in found.each(lambda row: [_in_form(row, args.transcript, one) for one in columns]):
        counts["rows"] += 1
        yield [pairs[0][0], *(said for _, said in pairs)]
    dropped = counts["dropped"]
    if not counts["rows"]:
        raise InputError(f"{path}: no rows to train on ({dropped} are marked `drop`, or wrong)")
    if dropped:
        words = "%s: left out %d rows that are marked `drop`, or wrong and never selected"
        logger.warning(words, path, dropped)


def _kept(
    path: str, rows: Iterable[tuple[int, Row]], args: DataArgs, counts: Counter[str]
) -> Iterator[tuple[int, Row]]:
    """Yield the rows that are not dropped; raise `InputError` at the end for a fallback's."""
    kept, fallback, first = 0, 0, 0
    for number, row in rows:
        # Wrong samples that selection never saw are not trained on either.
        if row["drop"] if "drop" in row else row.get("correct") is False:
            counts["dropped"] += 1
            continue
        kept += 1
        if row.get("source") == FALLBACK:
            fallback, first = fallback + 1, first or number
        yield number, row
    if fallback and not args.allow_offline_rows:
        raise InputError(
            f"{path}: {fallback} of {kept} rows (the first: row {first}) are {FALLBACK}: worked "
            "solutions in place of a teacher that failed; collect again, or set "
            "`allow_offline_rows: true`"
        )


def _read(path: Path, columns: Columns) -> FoundRows:
    """Read the rows of a stage, a folder or a file, with what is wrong with other rows."""
    if path.is_file() and path.suffix != ".parquet":
        return read_file(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    folder = path / ("dataset" if columns == SFT else "pairs")
    files = [path] if path.is_file() else sorted(folder.glob("*.parquet"))
    if files := files or sorted(path.glob("*.parquet")):
        return FoundRows(path, enumerate(_parquet(files, columns), start=1))
    if columns == DPO:
        raise InputError(f"{path}: contains no pairs: make them with `preference_pairs: 1`")
    if (path / "samples.jsonl").is_file():
        return read_file(path / "samples.jsonl")
    raise InputError(f"{path}: contains no rows: neither dataset/*.parquet nor samples.jsonl")


def _parquet(files: list[Path], columns: Columns) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            with pq.ParquetFile(file, buffer_size=_BUFFER) as table:
                there = table.schema_arrow.names
                names = [one for one in there if one in (*_OTHERS, *columns)]
                for batch in table.iter_batches(_BATCH, columns=names):
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file} is not a parquet file: {error}") from None


def pair_of(row: Row, transcript: str = DEFAULT, name: str = "completion") -> Pair:
    """Return a row's prompt and completion as messages; raise `InputError` for what is neither."""
    turns, said = row.get("prompt"), row.get(name)
    if turns is None and isinstance(row.get("messages"), list):
        turns, said = row["messages"][:-1], row["messages"][-1:]
    if wrong := wrong_turns(turns):
        raise InputError(f"prompt: {wrong}")
    assert turns is not None
    if isinstance(said, list) and len(said) == 1 and isinstance(said[0], dict):
        if said[0].get("role") != "assistant":
            raise InputError(f"{name}: the last turn is not the assistant's: {said!r:.80}")
        said = _text(said[0], transcript)
    if not isinstance(said, str) or is_blank(said):
        raise InputError(f"{name}: expected text, found {said!r:.80}")
    plain = [{"role": turn["role"], "content": _text(turn, transcript)} for turn in turns]
    return plain, [{"role": "assistant", "content": said}]


def _in_form(row: Row, transcript: str, name: str) -> Pair:
    """Return a pair; raise `InputError` for a completion that is a transcript of another form."""
    pair = pair_of(row, transcript, name)
    forms = [preset for preset in PRESETS if read(pair[1][0]["content"], preset)]
    if forms and transcript not in forms:
        raise InputError(
            f"{name}: a transcript of the form {forms[0]}, and RL would look for {transcript}; "
            f"set `transcript: {forms[0]}`"
        )
    return pair


def _text(turn: dict[str, Any], transcript: str) -> Any:
    """Return a message's content, joined with the reasoning beside it as `transcript` says."""
    if turn.get("tool_calls"):
        raise InputError(f"the {turn['role']} turn has tool_calls, which would be lost")
    said = turn.get("content")
    thoughts = next((turn[key] for key in REASONING_FIELDS if turn.get(key)), None)
    if thoughts is None or not isinstance(said, str):
        return said
    if not isinstance(thoughts, str):
        raise InputError(
            f"the {turn['role']} turn's reasoning must be text, found {thoughts!r:.80}"
        )
    if said.lstrip().startswith("<think>"):  # some servers leave the reasoning in the content, too
        said = said.partition("</think>")[2]
    return write(thoughts, said, transcript)
