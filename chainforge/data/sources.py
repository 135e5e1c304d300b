"""The built-in tasks `jsonl`, `hub` and `reasoning_gym`: functions that yield rows of questions."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from chainforge.core.errors import InputError, hint
from chainforge.core.jsonl import Row, question
from chainforge.core.transcript import is_blank
from chainforge.data.rows import SHARE, FoundRows, read_file, same_question, settle, wrong_turns
from chainforge.rewards.answers import boxed_answers

EXTRACTS = ("text", "hashes", "boxed")
# Under these names data sets keep the gold answer (a file that has one was meant to have answers)
# and the question.
ANSWERS = frozenset(
    re.findall(
        r"\w+",
        "solution answers final_answer gold target label ground_truth expected expected_answer "
        "output reference",
    )
)
QUESTIONS = ("question", "problem", "prompt", "instruction", "input", "query", "text")
PRESETS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8")
)
# The names under which data sets keep their own splits.
SPLIT_NAMES = {name: name for name in ("train", "validation", "test")}
SPLIT_NAMES |= dict.fromkeys(("valid", "val", "dev"), "validation")
# Of a published data set some rows have no answer that can be read; more than this is a mistake.
UNREADABLE = 0.1
TEST_PERCENT, VALIDATION_PERCENT = 20, 5


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


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where a table keeps what an Example needs."""

    question: str = "question"
    answer: str = "answer"
    prompt: str | None = None
    verifier: str | None = None
    extract: str = "text"
    keep: list[str] | None = None

    def __post_init__(self) -> None:
        if self.extract not in EXTRACTS:
            raise InputError(
                f"extract: expected one of {', '.join(EXTRACTS)}, found {self.extract!r}"
            )

    def read(self, found: FoundRows, most: float) -> list[Row]:
        """Return a table's rows as those of a task; raise `InputError` if too many are malformed.

        A table without any column of answers contains prompts for rewards that need none.
        """
        names = {self.answer, *ANSWERS}
        prompts_only = self.answer == "answer" and not any(
            names & raw.keys() for _, raw in found.rows
        )
        rows: list[Row] = []
        for number, raw in found.rows:
            try:
                rows.append(self.row(raw, prompts_only))
            except InputError as error:
                found.faults.append((number, str(error)))
        settle(found.path, found.faults, len(rows) + len(found.faults), most)
        return rows

    def row(self, raw: Row, prompts_only: bool = False) -> Row:
        """Return a table's row as one of a task; raise `InputError` if it is malformed."""
        # Rows that are Examples already have messages and no question.
        messages = self.prompt or ("prompt" if self.question not in raw and "prompt" in raw else "")
        asked = messages or self.question
        needed = {"prompt" if messages else "question": asked}
        needed |= {} if prompts_only else {"answer": self.answer}
        for key, name in [*needed.items(), *(("keep", name) for name in self.keep or ())]:
            if name not in raw:
                there = ", ".join(map(str, raw))
                raise InputError(
                    f"no column {name!r}, but {there}; name yours in params, as `{key}:`"
                )
        # A prompt may be a text, too: `{"prompt": "Explain entanglement"}`.
        is_text = not messages or isinstance(raw[asked], str)
        turns = [{"role": "user", "content": raw[asked]}] if is_text else raw[asked]
        if wrong := wrong_turns(turns):
            raise InputError(f"column {asked!r}: {wrong}")
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        keep = raw.keys() if self.keep is None else self.keep
        extra = {key: raw[key] for key in keep if key not in (asked, self.answer)}
        if "id" in extra:  # an Example's id is the hash of its content
            extra["source_id"] = extra.pop("id")
        answer = raw.get(self.answer)
        verifier = self.verifier or raw.get("verifier") or "math"
        answer = None if answer is None else self._gold(answer)
        return extra | {"prompt": turns, "answer": answer, "verifier": verifier}

    def _gold(self, value: Any) -> str:
        """Return the gold answer as text."""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InputError(f"column {self.answer!r}: expected text or a number, found {value!r}")
        text = _plain(value) if isinstance(value, float) else str(value).strip()
        shown = repr(value) if len(str(value)) < 60 else f"...{str(value)[-50:]!r}"
        if self.extract == "hashes":  # gsm8k: the solution, then #### and the number
            text = text.rpartition("####")[2].strip() if "####" in text else ""
            text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
        elif self.extract == "boxed":  # MATH: the box of the solution, or several
            try:
                text = ", ".join(boxed_answers(text))
            except ValueError as error:
                raise InputError(f"column {self.answer!r}: {error} in {shown}") from None
        if is_blank(text) or text in ("nan", "inf", "-inf"):
            raise InputError(f"column {self.answer!r}: no answer ({self.extract}) in {shown}")
        return text


def _plain(value: float) -> str:
    """Write a number of JSON as people do: 0.00001, not 1e-05."""
    written = repr(value)
    small = "e" in written and abs(int(written.partition("e")[2])) <= 30
    return format(Decimal(written), "f") if small else written


def _draw(rows: list[Row], name: str, size: int | None, seed: int) -> list[Row]:
    """Name the rows' task; put them in random order where only some are wanted (files are sorted).

    A column `task` of their own wins.
    """
    rows = [{"task": name} | row for row in rows]
    return rows if size is None else random.Random(seed).sample(rows, len(rows))


def jsonl(
    path: str,
    *,
    size: int | None = None,
    seed: int = 0,
    max_bad_rows: float = SHARE,
    **columns: Any,
) -> list[Row]:
    """Read a file of JSON lines; `columns` are `question` (or `prompt`, messages) and so on.

    A column `verifier` counts unless one is given here; other columns are kept (`keep`: only
    these). A file without answers contains prompts for rewards that need none. With a `size` the
    rows are drawn by `seed`. Malformed rows, and rows with the `id` of an earlier one, are left out
    and written to the stage's rejects; more than the share `max_bad_rows` raises `InputError`.
    """
    mapping = _columns("jsonl", columns, ("path", "max_bad_rows"))
    found = read_file(path, unique="id")
    if not found.rows and not found.faults:
        raise InputError(f"{path} is empty: expected one JSON object a line")
    return _draw(mapping.read(found, max_bad_rows), Path(path).stem, size, seed)


def _columns(source: str, given: dict[str, Any], others: Iterable[str], **preset: Any) -> Columns:
    """Return the columns that are given; raise `InputError` for a name that is no column's."""
    known = [item.name for item in dataclasses.fields(Columns)]
    for key in given:
        if key not in known:
            raise InputError(f"{source} takes no param {key!r}; {hint(key, [*known, *others])}")
    return Columns(**(preset | given))


def hub(
    dataset: str,
    *,
    split: str,
    size: int | None = None,
    seed: int = 0,
    preset: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    source_split: str | None = None,
    **columns: Any,
) -> list[Row]:
    """Read a data set of the Hub, or a local folder of parquet or JSON lines.

    `dataset` is an id, a folder, or a preset (gsm8k, math, math-500, aime24, aime25,
    open-r1-math); `preset` gives its columns to a copy in another place. Columns as in `jsonl`,
    but only those in `keep` are kept. The data set's own splits count; what it lacks is set aside
    from its train rows by content, and train rows that another of its splits has are left out.
    `source_split` takes one split of the data set as if it were all of it.
    """
    preset = dataset if preset is None and dataset in PRESETS else preset
    if preset is not None and preset not in PRESETS:
        raise InputError(f"preset: {preset!r}; {hint(str(preset), PRESETS)}")
    chosen = dict(PRESETS.get(preset or "", {}))
    source, own_config = chosen.pop("dataset", None), chosen.pop("config", None)
    benchmark = chosen.pop("benchmark", False)
    if dataset == preset:
        dataset, config = source, config or own_config
    others = ("dataset", "preset", "config", "revision", "source_split")
    mapping = _columns("hub", columns, others, **({"keep": []} | chosen))
    parts = _splits(dataset, load_dataset(dataset, config, revision), source_split)
    if benchmark and "test" not in parts:
        parts = {"test": next(iter(parts.values()))}
    if split in parts and split != "train":
        parts = {split: parts[split]}
    rows: dict[str, list[Row]] = {}
    for part, raws in parts.items():
        found = FoundRows(Path(dataset, part), list(enumerate(raws, start=1)))
        rows[part] = mapping.read(found, UNREADABLE)
    return _draw(_members(dataset, rows, split), preset or Path(dataset).name, size, seed)


def load_dataset(
    dataset: str, config: str | None = None, revision: str | None = None
) -> Mapping[str, Iterable[Row]]:
    """Load all splits of a data set; raise `InputError` when it cannot be loaded."""
    import datasets

    folder = Path(dataset)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(dataset)
        else:
            loaded = datasets.load_dataset(dataset, config, revision=revision)
    except Exception as error:  # no network, no such id, gated, unknown config, unreadable files
        advice = (
            "the folder must contain parquet or JSON lines files"
            if folder.is_dir()
            else "check the id and the network (HF_TOKEN for a private or gated one), or download "
            "it and give the folder's path"
        )
        reason = str(error).strip()[:300]
        raise InputError(f"cannot load {dataset!r}: {reason}; {advice}") from error
    return loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def _splits(
    dataset: str, parts: Mapping[str, Iterable[Row]], source_split: str | None
) -> dict[str, Iterable[Row]]:
    """Return the parts of a data set under our names for splits."""
    if source_split is not None:
        if source_split not in parts:
            raise InputError(
                f"{dataset} has no split {source_split!r}; {hint(source_split, parts)}"
            )
        return {"train": parts[source_split]}
    found = {SPLIT_NAMES[name]: part for name, part in parts.items() if name in SPLIT_NAMES}
    if not found:
        names = ", ".join(parts)
        raise InputError(f"{dataset} has the splits {names}: choose one as `source_split`")
    return found


def _members(dataset: str, parts: dict[str, list[Row]], split: str) -> list[Row]:
    """Return the rows of a split: the data set's own, or set aside from train by content."""
    if split == "all":
        return [row for rows in parts.values() for row in rows]
    if split in parts and split != "train":
        return parts[split]
    if "train" not in parts:
        raise InputError(
            f"{dataset} has no train rows, only {', '.join(parts)}: name what to divide as "
            "`source_split`, or use `split: all`"
        )
    others = [row for name, rows in parts.items() if name != "train" for row in rows]
    elsewhere = {same_question(question(row)) for row in others}

    def wanted(row: Row) -> bool:
        member = split_of(question(row))
        own = "train" if member in parts else member
        return own == split and same_question(question(row)) not in elsewhere

    return [row for row in parts["train"] if wanted(row)]


def reasoning_gym(
    dataset: str, *, size: int | None, seed: int, verifier: str = "reasoning_gym", **config: Any
) -> Iterator[Row]:
    """Yield rows of a procedural data set without end; `config` are its own settings.

    The column `entry` is the item as JSON, for the data set's own scorer. Raises `InputError`
    for an unknown data set, an unknown setting, and a value that the data set refuses.
    """
    if size is None:
        raise InputError(f"{dataset} has no end: give the number of rows as `size`")
    _check_settings(dataset, config)
    # Some data sets prepare a list as long as `size`, so it is taken in pieces.
    piece = min(max(2 * size, 256), 4096)
    for start in itertools.count(seed, piece):
        made = _create(dataset, start, piece, config)
        if start == seed and verifier == "reasoning_gym":
            _check_scorer(dataset, made)
        for index in range(piece):
            item = made[index]
            yield {
                "question": item["question"],
                "answer": "" if item["answer"] is None else str(item["answer"]),
                "task": dataset,
                "verifier": verifier,
                "entry": _entry(item, dataset),
            }


def _check_settings(dataset: str, config: dict[str, Any]) -> None:
    """Raise `InputError` for a data set or setting that reasoning-gym does not have."""
    from reasoning_gym.factory import DATASETS

    if dataset == "composite":
        raise InputError("composite: list its data sets as tasks of their own instead")
    if dataset not in DATASETS:
        known = hint(str(dataset), DATASETS)
        raise InputError(f"reasoning-gym has no data set {dataset!r}; {known}")
    settings = {item.name for item in dataclasses.fields(DATASETS[dataset][1])} - {"seed", "size"}
    for key in config:
        if key not in settings:
            raise InputError(f"{dataset} has no setting {key!r}; {hint(key, settings)}")


def _create(dataset: str, seed: int, size: int, config: dict[str, Any]) -> Any:
    """Make a data set; raise `InputError` with the library's words about its settings."""
    from reasoning_gym.factory import create_dataset

    try:
        made = create_dataset(dataset, seed=seed, size=size, **config)
        made[0]
    except Exception as error:  # the library's asserts, ValueError, TypeError, IndexError
        raise InputError(f"{dataset} refuses {config}: {error or type(error).__name__}") from error
    return made


def _entry(item: Mapping[str, Any], dataset: str) -> str:
    """Return an item as JSON; its metadata names the data set, which owns the scorer."""
    metadata = dict(item["metadata"]) | {"source_dataset": dataset}
    kept = {"question": item["question"], "answer": item["answer"], "metadata": metadata}
    return json.dumps(kept, ensure_ascii=False, default=str)


def _check_scorer(dataset: str, made: Any) -> None:
    """Raise `InputError` if a data set's scorer rejects its own answer once the entry was JSON.

    A few compare with tuples (arc_agi, rearc), which JSON turns into lists.
    """
    item = made[0]
    if item["answer"] is None:
        return
    entry = json.loads(_entry(item, dataset))
    if made.score_answer(item["answer"], entry) < made.score_answer(item["answer"], item):
        raise InputError(
            f"{dataset}: its own scorer cannot read entries from JSON; add `verifier: exact` to "
            "params"
        )
