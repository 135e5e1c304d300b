"""The built-in tasks `jsonl`, `hub` and `reasoning_gym`: functions that yield rows of questions."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import yaml

from chainforge.core.errors import InputError, hint, refuse_unknown
from chainforge.core.jsonl import Message, Row
from chainforge.core.plugins import as_struct
from chainforge.core.transcript import is_blank
from chainforge.data.rows import MAX_BAD, FoundRows, read_file, wrong_turns
from chainforge.rewards.answers import boxed_answers

logger = logging.getLogger(__name__)

EXTRACTS = ("text", "hashes", "boxed")
# Under these names data sets keep the gold answer: a file that has one was meant to have answers.
ANSWERS = {"answers", "final_answer", "gold", "ground_truth", "label", "output", "solution"}
PRESETS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8")
)
# The names under which data sets keep their own splits.
SPLIT_NAMES = {name: name for name in ("train", "validation", "test")}
SPLIT_NAMES |= dict.fromkeys(("valid", "val", "dev"), "validation")
# Of a published data set some rows have no answer that can be read; more than this is a mistake.
UNREADABLE = 0.1
TEST_PERCENT, VALIDATION_PERCENT = 20, 5


def example(
    prompt: list[Message], answer: str | None, *, task: str, verifier: str = "math", **extra: Any
) -> Row:
    """Make an Example; its id is a hash of task and prompt, so equal content has an equal id."""
    content = json.dumps([task, prompt], sort_keys=True, ensure_ascii=False)
    identity = hashlib.sha256(content.encode()).hexdigest()[:16]
    row = {"id": identity, "prompt": prompt, "answer": answer, "task": task, "verifier": verifier}
    return row | extra


def has_answer(row: Row) -> bool:
    """Return whether a row has a gold answer, an entry scored without one, or no answer column."""
    return row.get("answer", "") is not None or bool(row.get("entry"))


def question(row: Row) -> str:
    """Return the text of the last user turn of a row's prompt."""
    turns = [turn["content"] for turn in row["prompt"] if turn["role"] == "user"]
    return turns[-1] if turns else ""


def same_question(text: str) -> str:
    """Return what equal questions share: case and white space do not count."""
    return " ".join(text.lower().split())


def split_of(question: str) -> str:
    """Return `train`, `validation` or `test` for a question.

    Membership depends on the text alone (lower case, white space normalised), not on a seed or a
    position: reasoning-gym's item `i` of seed `s` is item `0` of seed `s + i`, so rows drawn with
    neighbouring seeds are mostly the same rows.
    """
    bucket = int(hashlib.sha256(same_question(question).encode()).hexdigest()[:8], 16) % 100
    if bucket < TEST_PERCENT:
        return "test"
    return "validation" if bucket < TEST_PERCENT + VALIDATION_PERCENT else "train"


class Columns(msgspec.Struct, frozen=True):
    """The columns of a table from which Examples are made."""

    question: str = "question"
    answer: str = "answer"
    verifier: str | None = None
    extract: str = "text"
    keep: list[str] | None = None

    @classmethod
    def named(cls, given: Mapping[str, Any]) -> Columns:
        """Return the columns that a task names; raise `InputError` for an unknown key."""
        columns = as_struct(given, cls, "params")
        if columns.extract not in EXTRACTS:
            raise InputError(f"extract: {columns.extract!r}; {hint(columns.extract, EXTRACTS)}")
        return columns

    def read(self, found: FoundRows, most: float = MAX_BAD) -> list[Row]:
        """Return a table's rows as those of a task; raise `InputError` if too many are malformed.

        A row without any column of answers is a prompt for rewards that need none.
        """
        return list(found.each(self.row, most))

    def row(self, raw: Row) -> Row:
        """Return a table's row as one of a task; raise `InputError` if it is malformed."""
        prompt_only = self.answer == "answer" and not (ANSWERS | {"answer"}) & raw.keys()
        # Rows that are Examples already have messages as their prompt and no question.
        asked = "prompt" if self.question not in raw and "prompt" in raw else self.question
        needed = {asked: "question"} | ({} if prompt_only else {self.answer: "answer"})
        needed |= dict.fromkeys(self.keep or (), "keep")
        if lacking := next((name for name in needed if name not in raw), None):
            there, key = ", ".join(map(str, raw)), needed[lacking]
            raise InputError(
                f"no column {lacking!r}, but {there}; name yours in params: `{key}: COLUMN`"
            )
        turns = raw[asked]
        turns = turns if isinstance(turns, list) else [{"role": "user", "content": turns}]
        if wrong := wrong_turns(turns):
            raise InputError(f"column {asked!r}: {wrong}")
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        keep = raw.keys() if self.keep is None else self.keep
        extra = {key: raw[key] for key in keep if key not in (asked, self.answer)}
        if "id" in extra:  # an Example's id is the hash of its content
            extra["source_id"] = extra.pop("id")
        answer = None if raw.get(self.answer) is None else self._gold(raw[self.answer])
        verifier = self.verifier or raw.get("verifier") or "math"
        return extra | {"prompt": turns, "answer": answer, "verifier": verifier}

    def _gold(self, value: Any) -> str:
        """Return the gold answer as text; a number as people write it: 0.00001, not 1e-05."""
        where = f"column {self.answer!r}: "
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InputError(f"{where}expected text or a number, found {value!r}")
        is_number = isinstance(value, float) and math.isfinite(value)
        text = format(Decimal(repr(value)), "f") if is_number else str(value).strip()
        if self.extract == "hashes":  # gsm8k: the solution, then #### and the number
            text = text.rpartition("####")[2].strip() if "####" in text else ""
            text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
        elif self.extract == "boxed":  # MATH: the box of the solution, or several
            try:
                text = ", ".join(boxed_answers(text))
            except ValueError as error:
                raise InputError(f"{where}{error}") from None
        if is_blank(text) or text in ("nan", "inf", "-inf"):
            raise InputError(f"{where}no answer ({self.extract}) in {str(value)[-50:]!r}")
        return text


def _draw(rows: list[Row], name: str, size: int | None, seed: int) -> list[Row]:
    """Set the task of rows that name none; shuffle the rows where only some are wanted."""
    rows = [{"task": name} | row for row in rows]
    return rows if size is None else random.Random(seed).sample(rows, len(rows))


def jsonl(path: str, *, size: int | None = None, seed: int = 0, **columns: Any) -> list[Row]:
    """Read a file of JSON lines; `columns` are `question` (text or messages) and so on.

    A column `verifier` counts unless one is given here; other columns are kept (`keep`: only
    these). Rows without an answer are prompts for rewards that need none, and so are the lines of
    a .txt file, which are plain text unless they begin with `{`. With a `size` the
    rows are drawn by `seed`. Malformed rows are left out and written to the stage's rejects; more
    than 1 % of them raise `InputError`.
    """
    mapping = Columns.named(columns)
    found = read_file(path)
    found.rows = list(found.rows)
    if not found.rows and not found.faults:
        raise InputError(f"{path} is empty: expected one JSON object a line")
    rows = mapping.read(found)
    without = sum(row["answer"] is None for row in rows)
    if 0 < without < len(rows):
        logger.warning("%s: %d of %d rows have no answer", path, without, len(rows))
    return _draw(rows, Path(path).stem, size, seed)


def prompts(prompts: list[str], *, size: int | None = None, seed: int = 0) -> list[Row]:
    """Return texts as questions without answers."""
    return _draw([{"question": text, "answer": None} for text in prompts], "prompts", size, seed)


def hub(
    dataset: str,
    *,
    split: str,
    size: int | None = None,
    seed: int = 0,
    preset: str | None = None,
    config: str | None = None,
    **columns: Any,
) -> list[Row]:
    """Read a data set of the Hub, or a local folder of parquet or JSON lines.

    `dataset` is an id, a folder, or a preset (gsm8k, math, math-500, aime24, aime25,
    open-r1-math); `preset` gives its columns to a copy in another place. Columns as in `jsonl`,
    but only those in `keep` are kept. The data set's own splits count; what it lacks is set aside
    from its train rows by content, and train rows that another of its splits has are left out. A
    single split of another name counts as train.
    """
    preset = dataset if preset is None and dataset in PRESETS else preset
    if preset is not None and preset not in PRESETS:
        raise InputError(f"preset: {preset!r}; {hint(str(preset), PRESETS)}")
    known = {"keep": []} | PRESETS.get(preset or "", {})
    source, own_config = known.pop("dataset", None), known.pop("config", None)
    benchmark = known.pop("benchmark", False)
    if dataset == preset:
        dataset, config = source, config or own_config
    mapping = Columns.named(known | columns)
    parts = _load(dataset, config)
    if benchmark and "test" not in parts:
        parts = {"test": next(iter(parts.values()))}
    whole = split == "all" or (split in parts and split != "train")
    if not whole and "train" not in parts:
        raise InputError(f"{dataset} has no train rows, only {', '.join(parts)}; set `split: all`")
    found = {
        part: mapping.read(FoundRows(Path(dataset, part), [*enumerate(raws, start=1)]), UNREADABLE)
        for part, raws in parts.items()
        if split in (part, "all") or not whole
    }
    rows = list(itertools.chain(*found.values())) if whole else _set_aside(found, split)
    return _draw(rows, preset or Path(dataset).name, size, seed)


def _load(dataset: str, config: str | None) -> dict[str, Iterable[Row]]:
    """Load a data set's splits under our names; raise `InputError` when it cannot be loaded."""
    import datasets

    try:
        parts: Mapping[str, Iterable[Row]] = datasets.load_dataset(dataset, config)
    except Exception as error:  # no network, no such id, gated, unknown config, unreadable files
        advice = (
            "the folder must contain parquet or JSON lines files"
            if Path(dataset).is_dir()
            else "check the id and the network (HF_TOKEN for a private or gated one)"
        )
        raise InputError(f"cannot load {dataset!r}: {str(error)[:300]}; {advice}") from error
    found = {SPLIT_NAMES[name]: part for name, part in parts.items() if name in SPLIT_NAMES}
    if not found and len(parts) > 1:
        raise InputError(f"{dataset} has none of the splits train, validation and test")
    return found or {"train": next(iter(parts.values()))}


def _set_aside(parts: dict[str, list[Row]], split: str) -> list[Row]:
    """Return the train rows that belong to a split by content and are in no other part."""
    others = [row for name, rows in parts.items() if name != "train" for row in rows]
    elsewhere = {same_question(question(row)) for row in others}
    found = []
    for row in parts["train"]:
        asked = question(row)
        member = split_of(asked)
        own = "train" if member in parts else member
        if own == split and same_question(asked) not in elsewhere:
            found.append(row)
    return found


def reasoning_gym(
    dataset: str, *, size: int | None, seed: int, verifier: str = "reasoning_gym", **config: Any
) -> Iterator[Row]:
    """Yield rows of a procedural data set without end; `config` are its own settings.

    The column `entry` is the item as JSON, for the data set's own scorer. Raises `InputError`
    for an unknown data set, an unknown setting, and a value that the data set refuses.
    """
    from reasoning_gym.factory import DATASETS, create_dataset

    if size is None:
        raise InputError(f"{dataset} has no end: give the number of rows as `size`")
    if dataset not in DATASETS:
        known = hint(str(dataset), DATASETS)
        raise InputError(f"reasoning-gym has no data set {dataset!r}; {known}")
    settings = {item.name for item in dataclasses.fields(DATASETS[dataset][1])} - {"seed", "size"}
    refuse_unknown(config, settings, f"{dataset}: ")
    # Some data sets prepare a list as long as `size`, so it is taken in pieces.
    piece = min(max(2 * size, 256), 4096)
    for start in itertools.count(seed, piece):
        try:
            made = create_dataset(dataset, seed=start, size=piece, **config)
            made[0]
        except Exception as error:  # the library's asserts, ValueError, TypeError, IndexError
            raise InputError(f"{dataset} refuses {config}: {error or type(error)}") from error
        for item in (made[index] for index in range(piece)):
            metadata = dict(item["metadata"]) | {"source_dataset": dataset}
            entry = {key: item[key] for key in ("question", "answer")} | {"metadata": metadata}
            yield {
                "question": item["question"],
                "answer": "" if item["answer"] is None else str(item["answer"]),
                "task": dataset,
                "verifier": verifier,
                "entry": json.dumps(entry, ensure_ascii=False, default=str),
            }
