"""Build a data set from the scored samples of collect or reject: filter, select, write.

A stage leaves `samples.jsonl` (every sample with `drop` and `drop_detail`), `dataset/` (the kept
rows with their card) and `funnel.json`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import yaml

from chainforge import __version__
from chainforge.core import artifacts
from chainforge.core.config import resolved
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, line_of, move, replacing, row_of
from chainforge.core.secrets import is_secret_key
from chainforge.data.decontaminate import COVERAGE, N
from chainforge.data.filters import FilterArgs, SelectionArgs
from chainforge.data.rows import lines_of
from chainforge.data.select import Marks, Pool, Selection, many_rows, match_pairs, read_pool, shared
from chainforge.data.sft_dataset import pair_of
from chainforge.data.tasks import columns_of, raw_columns, texts, type_of
from chainforge.generate.rollouts import score_samples
from chainforge.generate.shards import shards_of
from chainforge.rewards.reward import RewardArgs, load_rewards

if TYPE_CHECKING:
    import pyarrow as pa

SCRATCH, DATASET = ".scratch", "train.parquet"
ROW_GROUP = 50_000  # rows of a parquet file that a reader decodes at once
TEMPLATE = Path(__file__).with_name("card.md.jinja")
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}


@dataclass
class BuildArgs:
    """How the data set is scored, licensed and uploaded."""

    rescore: bool = field(
        default=True,
        metadata={
            "help": "Score a pool's samples again with these rewards. false uses the scores that "
            "they have, which is much faster for millions of rows."
        },
    )
    dataset_license: str = field(
        default="other", metadata={"help": "Licence on the card, as the Hub abbreviates it."}
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Upload dataset/ when it is done; the token is HF_TOKEN."}
    )
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Where to, as owner/name."})
    hub_private: bool = field(
        default=True, metadata={"help": "Make the repository private, where it is new."}
    )


def open_pool(
    paths: list[str], args: BuildArgs, rewarding: RewardArgs
) -> tuple[list[Row] | Pool, Row]:
    """Return existing samples, scored again with `rescore`, and their origin."""
    if not args.rescore:
        pool = Pool(paths)
        return pool, {"pool": pool.stages}
    rows = read_pool(paths)
    rewards = load_rewards(rewarding, set().union(*rows))
    rows = score_samples(rows, rewarding.transcript, rewards)
    return rows, {"pool": dict(Counter(row["pooled_from"] for row in rows))}


@many_rows()
def build(
    rows: list[Row] | Pool,
    directory: Path,
    selection: SelectionArgs,
    filters: FilterArgs,
    args: BuildArgs,
    seed: int = 0,
    *,
    lost: Mapping[str, int] | None = None,
    report: Row | None = None,
    sections: Callable[[list[Row]], dict[str, str]] | None = None,
) -> dict[str, Any]:
    """Select from scored samples (`rows`), write everything to `directory`, and return the funnel.

    `lost` counts answers without a sample, by reason; `report` is added to the funnel, `sections`
    makes further sections of the card of the kept rows. Raises `InputError` when no row is kept.
    """
    scratch, samples = directory / SCRATCH, directory / "samples.jsonl"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir(parents=True)
    try:
        pool = Pool.of(rows, scratch) if isinstance(rows, list) else rows
        work = Builder(pool, selection, filters, seed, scratch)
        with shared(work, pool.processes) as each:
            funnel, marks = work.decide(each)
            types, counts = _write_samples(samples, scratch, each("write", marks))
            funnel["in"] += sum((lost or {}).values())
            funnel["dropped"] = {**(lost or {}), **funnel["dropped"]}
            funnel |= report or {}
            if selection.preference_pairs and funnel["kept"]:
                pairs = match_pairs(_read(samples), selection.preference_pairs)
                funnel["pairs"] = save_pairs(pairs, directory / "pairs")
            artifacts.write_json(directory / "funnel.json", funnel)
            if not funnel["kept"]:
                raise InputError(_why_none(funnel, samples))
            schema = _merged(types, work.column)
            tables = each("table", ((part, schema) for part, one in enumerate(types) if one))
            file = save_dataset(tables, directory / "dataset", scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    settings = resolved(selection, filters)
    settings |= {"max_per_prompt": selection.max_per_prompt, "select": selection.select}
    more = sections([row for row in _read(samples) if row["drop"] is None]) if sections else {}
    card = _card(counts, funnel, settings, args.dataset_license, more)
    with replacing(file.with_name("README.md")) as temporary:
        temporary.write_text(card, encoding="utf-8")
    return funnel


# Arrow's types of columns, None for one that must be text; counts of kept rows for the card.
Types = dict[str, Any]
Counts = dict[str, Counter[Any]]


class Builder(Selection):
    """A selection whose parts are written where they are marked."""

    def write(self, marks: Marks) -> tuple[Types, Counts]:
        """Write the marked samples of a part, and its kept rows as columns."""
        part, marked = marks[0], list(self.marked(marks))
        with open(self.folder / f"samples-{part}", "wb") as file:
            _append(file, b"".join(map(line_of, marked)))
        kept = [row for row in marked if row["drop"] is None]
        columns = _columns(kept)
        self.store(f"columns-{part}", columns)
        return {name: type_of(name, values) for name, values in columns.items()}, _counts(kept)

    def column(self, name: str) -> list[Any]:
        """Return a column of the kept rows of all parts."""
        parts = (self.stored(f"columns-{part}") for part in range(len(self.pool.parts)))
        return [value for columns in parts for value in columns.get(name, ())]

    def table(self, task: tuple[int, Types]) -> pa.Table:
        """Return the kept rows of a part with columns of some types."""
        import pyarrow as pa

        part, schema = task
        columns, made = self.stored(f"columns-{part}"), {}
        for name, type in schema.items():
            values = columns.get(name, [None] * len(columns["id"]))
            made[name] = pa.array(values, type) if type else pa.array(texts(values), pa.string())
        return pa.table(made)


def _merged(parts: Sequence[Types], column: Callable[[str], list[Any]]) -> Types:
    """Return the type of each column, given those of its parts; as of all values at once."""
    import pyarrow as pa

    merged = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        types = {part[name] for part in parts if name in part} - {pa.null()}
        # Whether Arrow finds one type for parts of several is seen only from the values.
        merged[name] = types.pop() if len(types) == 1 else type_of(name, column(name))
    return merged


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Return kept Samples as columns for SFT: texts are messages, models have no local paths."""
    whole = [row | dict(zip(("prompt", "completion"), pair_of(row), strict=True)) for row in rows]
    for row in whole:
        if isinstance(row.get("model"), str):
            row["model"] = public(row["model"])
    return raw_columns(whole)


def _write_samples(
    path: Path, scratch: Path, parts: Iterable[tuple[Types, Counts]]
) -> tuple[list[Types], list[Counts]]:
    """Join the parts of the marked samples as they come; return what is known of the kept rows."""
    types, counts = [], []
    with open(scratch / path.name, "wb") as file:
        for part, (type, count) in enumerate(parts):
            written = scratch / f"samples-{part}"
            _append(file, written.read_bytes())
            written.unlink()
            types.append(type)
            counts.append(count)
    move(scratch / path.name, path)
    for shard in shards_of(path):  # of single processes
        shard.unlink()
    return types, counts


def _append(file: BinaryIO, data: bytes) -> None:
    """Write at a file's end into room that is allocated first: on some disks 8 times as fast."""
    with contextlib.suppress(OSError, AttributeError):  # not on every file system, nor on macOS
        os.posix_fallocate(file.fileno(), file.tell(), len(data))
    file.write(data)


def save_dataset(tables: Iterable[pa.Table], folder: Path, scratch: Path) -> Path:
    """Write tables of one schema to `folder`/train.parquet, which appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = iter(tables)
    group = [next(tables)]
    with pq.ParquetWriter(scratch / DATASET, group[0].schema) as writer:
        for table in tables:
            if sum(map(len, group)) >= ROW_GROUP:
                writer.write_table(pa.concat_tables(group))
                group = []
            group.append(table)
        writer.write_table(pa.concat_tables(group))
    folder.mkdir(exist_ok=True)
    move(scratch / DATASET, folder / DATASET)
    return folder / DATASET


def save_pairs(pairs: Sequence[tuple[Row, Row]], folder: Path) -> int:
    """Write pairs to `folder`/train.parquet, as DPOTrainer reads them; return their number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not pairs:
        words = "no prompt has both a kept sample and a worse one; sample more of each prompt"
        raise InputError(f"preference_pairs: {words} (num_samples)")
    rows = []
    for sides in pairs:
        row = {name: sides[0].get(name) for name in ("id", "task", "answer", "source")}
        for name, sample in zip(("chosen", "rejected"), sides, strict=True):
            row["prompt"], row[name] = pair_of(sample)
            row |= {f"{name}_{key}": sample.get(key) for key in ("sample", "reward")}
        rows.append(row)
    folder.mkdir(exist_ok=True)
    with replacing(folder / DATASET) as temporary:
        pq.write_table(pa.table(columns_of(rows)), temporary)
    return len(rows)


def _read(samples: Path) -> Iterator[Row]:
    return (row_of(line) for _, line in lines_of(samples))


def _why_none(funnel: Row, samples: Path) -> str:
    """Return why no row is kept: the commonest reason, and an example."""
    (reason, count), *_ = Counter(row["drop"] for row in _read(samples)).most_common()
    row = next(row for row in _read(samples) if row["drop"] == reason)
    return (
        f"no row was kept; {count:,} of {funnel['in']:,} are dropped as {reason} "
        f"({row['drop_detail']}). One of them, where {str(row.get('answer'))[:60]!r} is right: "
        f"{row['completion'][:200]!r}. funnel.json has all reasons"
    )


def _counts(rows: Sequence[Row]) -> Counts:
    """Count in kept rows what the card tells of them."""
    given = [row["sampling"] for row in rows if isinstance(row.get("sampling"), dict)]
    # Without what differs from row to row.
    sampled = (code({k: v for k, v in one.items() if k != "seed"}) for one in given)
    return {
        "writers": _combinations(rows, "source", "model", "stage"),
        "sampled": Counter(sampled),
        "tasks": _combinations(rows, "task"),
        "verdicts": Counter(row.get("correct") for row in rows),
        "tokens": Counter(row["tokens"] for row in rows if row.get("tokens") is not None),
    }


def _card(
    parts: Sequence[Counts],
    funnel: Row,
    settings: Row,
    license: str,
    sections: Mapping[str, str],
) -> str:
    """Return the card of the kept rows: what they are, who wrote them, and where the others went.

    `parts` are counts of these rows, `settings` those of selection and filters; `sections` are
    further ones, Markdown by title.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    count: Counts = {name: Counter() for name in parts[0]}
    for part in parts:
        for name, counts in part.items():
            count[name].update(counts)
    kept = funnel["kept"]
    head = DatasetCardData(
        license=license,
        task_categories=["text-generation"],
        size_categories=[next((name for most, name in SIZES.items() if kept < most), "n>1M")],
        tags=["chainforge", "reasoning", "synthetic"],
        configs=[{"config_name": "default", "data_files": "train.parquet", "default": True}],
    )
    shown = yaml.safe_dump(public_settings(settings), sort_keys=False, allow_unicode=True)
    card = DatasetCard.from_template(
        head,
        template_path=str(TEMPLATE),
        version=__version__,
        rows=kept,
        funnel=funnel,
        writers=count["writers"].most_common(),
        sampled=count["sampled"].most_common(5),
        sections=sections,
        funnel_table=funnel_table(funnel),
        settings=shown.replace("```", "'''"),
        checked=funnel.get("decontamination"),
        evaluations=[code(public(str(one))) for one in settings.get("decontaminate") or ()],
        coverage=COVERAGE,
        run=N,
        tasks=count["tasks"].most_common(),
        verdicts=count["verdicts"],
        lengths=sorted(count["tokens"].elements()),
        public=public,
    )
    return str(card)


def funnel_table(funnel: Mapping[str, Any]) -> str:
    """Return how many are left after each filter, in the order of the filters."""
    left = funnel["in"]
    lines = ["| filter | samples dropped | left |", "|---|---:|---:|", f"| all | | {left:,} |"]
    for reason, count in funnel["dropped"].items():
        left -= count
        lines.append(f"| `{code(reason)}` | {count:,} | {left:,} |")
    lines.append(f"| **kept** | | **{funnel['kept']:,}** |")
    return "\n".join(lines)


def code(value: Any) -> str:
    """Return text for a code span: on one line, with nothing that would end it."""
    return " ".join(str(value).replace("`", "'").replace("|", "/").split())


def counted(rows: Sequence[Row], *columns: str) -> list[tuple[tuple[str, ...], int]]:
    """Return each combination of values in some columns, with its number of rows."""
    return _combinations(rows, *columns).most_common()


def _combinations(rows: Sequence[Row], *columns: str) -> Counter[tuple[str, ...]]:
    return Counter(tuple(code(row.get(name)) for name in columns) for row in rows)


_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_STAGE_PARTS = ("model", "adapter", "dataset")
_SIGNS = ("manifest.json", "stage.json")  # files of a stage's directory


def public(path: str) -> str:
    """Return a path as others may read it: of an absolute one only the end.

    A stage's `model/` keeps the stage's name.
    """
    outside = path.startswith(("/", "~")) or ".." in Path(path).parts
    if not outside:
        return path
    place = Path(os.path.normpath(path))
    name = place.name if place.name not in ("", "..", "~") else "elsewhere"
    stage = place.expanduser().parent
    if name in _STAGE_PARTS and any((stage / file).is_file() for file in _SIGNS):
        return f"{stage.name}/{name}"
    return name


def public_settings(value: Any) -> Any:
    """Return settings as others may read them: no key or token, and paths as `public` has them."""
    if isinstance(value, Mapping):
        return {key: public_settings(one) for key, one in value.items() if not is_secret_key(key)}
    if isinstance(value, list | tuple):
        return [public_settings(one) for one in value]
    if not isinstance(value, str):
        return value
    if "\n" not in value and (value.count("/") > 1 or value.startswith(("../", "~/"))):
        value = public(value)
    return _USER_IN_URL.sub("", value).replace(f"{Path.home()}/", "~/")
