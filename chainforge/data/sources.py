"""The built-in task `hub`: data sets of the Hub, and local copies of them."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

from chainforge.core.errors import InputError, hint
from chainforge.core.jsonl import Row, question
from chainforge.data.splits import same_question, split_of
from chainforge.data.tables import Columns, convert, draw, listed

logger = logging.getLogger(__name__)

# `benchmark`: all of it is test rows, whatever its publisher calls its only split.
PRESETS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "dataset": "openai/gsm8k",
        "config": "main",
        "extract": "hashes",
        "verifier": "numeric",
    },
    "math": {
        "dataset": "DigitalLearningGmbH/MATH-lighteval",
        "question": "problem",
        "answer": "solution",
        "extract": "boxed",
        "keep": ["level", "type"],
    },
    "math-500": {
        "dataset": "HuggingFaceH4/MATH-500",
        "question": "problem",
        "keep": ["level", "subject"],
        "benchmark": True,
    },
    "aime24": {
        "dataset": "HuggingFaceH4/aime_2024",
        "question": "problem",
        "verifier": "numeric",
        "benchmark": True,
    },
    "aime25": {
        "dataset": "yentinglin/aime_2025",
        "config": "default",
        "question": "problem",
        "verifier": "numeric",
        "benchmark": True,
    },
    "open-r1-math": {
        "dataset": "open-r1/OpenR1-Math-220k",
        "config": "default",
        "question": "problem",
        "keep": ["problem_type"],
    },
}

# The names under which data sets keep their own splits.
OWN_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}

# Of a published data set some rows have no answer that can be read; more than this is a mistake.
UNREADABLE = 0.1


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
    from its train rows by content, and train rows that stand in another of its splits are left out.
    `source_split` takes one split of the data set as if it were all of it.
    """
    preset = dataset if preset is None and dataset in PRESETS else preset
    if preset is not None and preset not in PRESETS:
        raise InputError(f"preset: {preset!r}; {hint(str(preset), PRESETS)}")
    known = [item.name for item in dataclasses.fields(Columns)]
    for key in columns:
        if key not in known:
            raise InputError(f"hub takes no param {key!r}; {hint(key, known)}")
    chosen = dict(PRESETS.get(preset or "", {}))
    source, own_config = chosen.pop("dataset", None), chosen.pop("config", None)
    benchmark = chosen.pop("benchmark", False)
    if dataset == preset:
        dataset, config = source, config or own_config
    mapping = Columns(**({"keep": []} | chosen | columns))
    parts = _load(dataset, config, revision, source_split)
    if benchmark and "test" not in parts:
        parts = {"test": next(iter(parts.values()))}
    if split in parts and split != "train":
        parts = {split: parts[split]}
    name = preset or Path(dataset).name
    rows = {
        part: [{"task": name} | row for row in _readable(dataset, part, raws, mapping)]
        for part, raws in parts.items()
    }
    return draw(_members(dataset, rows, split), size, seed)


def _load(
    dataset: str, config: str | None, revision: str | None, source_split: str | None
) -> dict[str, Any]:
    """Return the parts of a data set under our names for splits."""
    import datasets

    folder = Path(dataset)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(dataset)
        else:
            loaded = datasets.load_dataset(dataset, config, revision=revision)
    except Exception as error:  # no network, no such id, gated, unknown config, unreadable files
        advice = (
            "the folder must hold parquet or JSON lines files"
            if folder.is_dir()
            else "check the id and the network (HF_TOKEN for a private or gated one), or download "
            "it and give the folder's path"
        )
        raise InputError(
            f"cannot load {dataset!r}: {str(error).strip()[:300]}; {advice}"
        ) from error
    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    if source_split is not None:
        if source_split not in parts:
            raise InputError(
                f"{dataset} has no split {source_split!r}; {hint(source_split, parts)}"
            )
        return {"train": parts[source_split]}
    known = {name: ours for ours, names in OWN_NAMES.items() for name in names}
    found = {known[name]: part for name, part in parts.items() if name in known}
    if not found:
        names = ", ".join(parts)
        raise InputError(f"{dataset} has the splits {names}: choose one as `source_split`")
    return found


def _readable(dataset: str, part: str, raws: Any, columns: Columns) -> list[Row]:
    """Return the rows of one part; those whose answer cannot be read are counted and left out."""
    labelled = ((f"{part}[{index}]", raw) for index, raw in enumerate(raws))
    rows, wrong = convert(labelled, columns, columns.without_answers(itertools.islice(raws, 1)))
    if len(wrong) > UNREADABLE * (len(rows) + len(wrong)):
        total = len(rows) + len(wrong)
        raise InputError(f"{dataset}: {len(wrong)} of {total} rows cannot be read:{listed(wrong)}")
    if wrong:
        logger.warning(
            "%s: left out %d rows that cannot be read:%s", dataset, len(wrong), listed(wrong)
        )
    return rows


def _members(dataset: str, parts: dict[str, list[Row]], split: str) -> list[Row]:
    """Return the rows of a split: the data set's own, or set aside from train by content."""
    if split == "all":
        return [row for rows in parts.values() for row in rows]
    if split in parts and split != "train":
        return parts[split]
    if "train" not in parts:
        raise InputError(f"{dataset} has no train rows, only {', '.join(parts)}: name what to "
                         "divide as `source_split`, or use `split: all`")  # fmt: skip
    lacking = {"validation", "test"} - parts.keys()
    elsewhere = {
        same_question(question(row)) for name in parts if name != "train" for row in parts[name]
    }

    def wanted(row: Row) -> bool:
        member = split_of(question(row))
        own = member if member in lacking else "train"
        return own == split and same_question(question(row)) not in elsewhere

    return [row for row in parts["train"] if wanted(row)]
