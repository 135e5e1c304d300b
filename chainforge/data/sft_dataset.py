"""The data set of SFT, from rows and from the directories of earlier stages."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainforge.core.errors import InputError
from chainforge.core.jsonl import Message, Row
from chainforge.core.transcript import DEFAULT, PRESETS, is_blank, read, write
from chainforge.data.rows import FoundRows, read_file, wrong_turns

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FALLBACK = "offline-fallback"
# The columns that SFT looks at.
_TRAINED_ON = ("prompt", "completion", "messages", "source", "drop")
# Where servers and data sets keep the reasoning of an assistant's message.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")

Pair = tuple[list[Message], list[Message]]  # prompt and completion


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


def sft_dataset(args: DataArgs) -> tuple[Dataset, dict[str, dict[str, int]]]:
    """Return a data set of `prompt` and `completion` messages, and the rows of each source.

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
    pairs: list[Pair] = []
    counts: dict[str, dict[str, int]] = {}
    for path in args.data:
        found, dropped = _source(path, args)
        pairs += found
        counts[path] = {"rows": len(found)} | ({"dropped": dropped} if dropped else {})
    columns = {"prompt": [pair[0] for pair in pairs], "completion": [pair[1] for pair in pairs]}
    return Dataset.from_dict(columns), counts


def _source(path: str, args: DataArgs) -> tuple[list[Pair], int]:
    """Return one source's rows as prompts and completions, and how many were dropped before."""
    found = _read(Path(path))
    # Wrong samples that selection never saw are not trained on either.
    kept = [
        (number, row)
        for number, row in found.rows
        if not (row["drop"] if "drop" in row else row.get("correct") is False)
    ]
    dropped, found.rows = len(found.rows) - len(kept), kept
    fallback = [number for number, row in kept if row.get("source") == FALLBACK]
    if fallback and not args.allow_offline_rows:
        raise InputError(
            f"{path}: {len(fallback)} of {len(kept)} rows (the first: row {fallback[0]}) are "
            f"{FALLBACK}: worked solutions in place of a teacher that failed; collect again, or "
            "set `allow_offline_rows: true`"
        )
    pairs = found.each(lambda row: _in_form(pair_of(row, args.transcript), args.transcript))
    if not pairs:
        raise InputError(f"{path}: no rows to train on ({dropped} are marked `drop`, or wrong)")
    if dropped:
        words = "%s: left out %d rows that are marked `drop`, or wrong and never selected"
        logger.warning(words, path, dropped)
    return pairs, dropped


def _read(path: Path) -> FoundRows:
    """Read the rows of a stage, a folder or a file, with what is wrong with other rows."""
    if path.is_file() and path.suffix != ".parquet":
        return read_file(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    files = [path] if path.is_file() else sorted((path / "dataset").glob("*.parquet"))
    if files := files or sorted(path.glob("*.parquet")):
        return FoundRows(path, list(enumerate(_parquet(files), start=1)))
    if (path / "samples.jsonl").is_file():
        return read_file(path / "samples.jsonl")
    raise InputError(f"{path}: contains no rows: neither dataset/*.parquet nor samples.jsonl")


def _parquet(files: list[Path]) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[Row] = []
    for file in files:
        try:
            columns = [name for name in _TRAINED_ON if name in pq.read_schema(file).names]
            rows += pq.read_table(file, columns=columns).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file} is not a parquet file: {error}") from None
    return rows


def pair_of(row: Row, transcript: str = DEFAULT) -> Pair:
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


def _in_form(pair: Pair, transcript: str) -> Pair:
    """Return a pair; raise `InputError` for a completion that is a transcript of another form."""
    forms = [preset for preset in PRESETS if read(pair[1][0]["content"], preset)]
    if forms and transcript not in forms:
        raise InputError(
            f"completion: a transcript of the form {forms[0]}, and RL would look for {transcript}; "
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
