"""Build a data set from the scored samples of collect or reject: filter, select, write.

A stage leaves `samples.jsonl` (every sample with `drop` and `drop_detail`), `dataset/` (the kept
rows with their card) and `funnel.json`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from chainforge import __version__
from chainforge.core import artifacts
from chainforge.core.config import resolved
from chainforge.core.errors import InputError
from chainforge.core.jsonl import Row, replacing
from chainforge.core.secrets import is_secret_key
from chainforge.data.decontaminate import COVERAGE, N
from chainforge.data.filters import FilterArgs, SelectionArgs
from chainforge.data.select import many_rows, read_pool, select
from chainforge.data.sft_dataset import pair_of
from chainforge.data.tasks import columns_of
from chainforge.generate.rollouts import score_samples
from chainforge.generate.shards import merge
from chainforge.rewards.reward import RewardArgs, load_rewards

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


def open_pool(paths: list[str], args: BuildArgs, rewarding: RewardArgs) -> tuple[list[Row], Row]:
    """Return existing samples, scored again with `rescore`, and their origin."""
    rows = read_pool(paths)
    if args.rescore:
        rewards = load_rewards(rewarding, set().union(*rows))
        rows = score_samples(rows, rewarding.transcript, rewards)
    return rows, {"pool": dict(Counter(row["pooled_from"] for row in rows))}


@many_rows()
def build(
    rows: list[Row],
    directory: Path,
    selection: SelectionArgs,
    filters: FilterArgs,
    args: BuildArgs,
    seed: int = 0,
    *,
    lost: Mapping[str, int] | None = None,
    report: Row | None = None,
    sections: Callable[[list[Row]], dict[str, str]] = lambda kept: {},
) -> dict[str, Any]:
    """Select from scored samples (`rows`), write everything to `directory`, and return the funnel.

    `lost` counts answers without a sample, by reason; `report` is added to the funnel, `sections`
    makes further sections of the card. Raises `InputError` when no row is kept.
    """
    marked, funnel = select(rows, selection, filters, seed)
    merge(directory / "samples.jsonl", marked)
    kept = [row for row in marked if row["drop"] is None]
    funnel["in"] += sum((lost or {}).values())
    funnel["dropped"] = {**(lost or {}), **funnel["dropped"]}
    funnel |= report or {}
    artifacts.write_json(directory / "funnel.json", funnel)
    if not kept:
        raise InputError(_why_none(funnel, marked))
    settings = resolved(selection, filters)
    settings |= {"max_per_prompt": selection.max_per_prompt, "select": selection.select}
    card = _card(kept, funnel, settings, args.dataset_license, sections(kept))
    with replacing(save_dataset(kept, directory / "dataset").with_name("README.md")) as temporary:
        temporary.write_text(card, encoding="utf-8")
    return funnel


def save_dataset(rows: Sequence[Row], path: str | Path) -> Path:
    """Write kept Samples to `path`/train.parquet, ready for SFT and `datasets.load_dataset`.

    The file appears whole or not at all. Text completions become messages, as for SFT; the model
    that wrote a row is named without this machine's paths.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rows:
        raise InputError(f"{path}: no row was kept; funnel.json says where the rows went")
    whole = [row | dict(zip(("prompt", "completion"), pair_of(row), strict=True)) for row in rows]
    for row in whole:
        if isinstance(row.get("model"), str):
            row["model"] = public(row["model"])
    file = Path(path) / "train.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        pq.write_table(pa.table(columns_of(whole)), temporary)
    return file


def _why_none(funnel: Row, marked: list[Row]) -> str:
    """Return why no row is kept: the commonest reason, and an example."""
    (reason, count), *_ = Counter(row["drop"] for row in marked).most_common()
    row = next(row for row in marked if row["drop"] == reason)
    return (
        f"no row was kept; {count:,} of {funnel['in']:,} are dropped as {reason} "
        f"({row['drop_detail']}). One of them, where {str(row.get('answer'))[:60]!r} is right: "
        f"{row['completion'][:200]!r}. funnel.json has all reasons"
    )


def _card(
    rows: Sequence[Row], funnel: Row, settings: Row, license: str, sections: Mapping[str, str]
) -> str:
    """Return the card of the kept rows: what they are, who wrote them, and where the others went.

    `settings` are those of selection and filters; `sections` are further ones, Markdown by title.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    head = DatasetCardData(
        license=license,
        task_categories=["text-generation"],
        size_categories=[next((name for most, name in SIZES.items() if len(rows) < most), "n>1M")],
        tags=["chainforge", "reasoning", "synthetic"],
        configs=[{"config_name": "default", "data_files": "train.parquet", "default": True}],
    )
    shown = yaml.safe_dump(public_settings(settings), sort_keys=False, allow_unicode=True)
    given = [row["sampling"] for row in rows if isinstance(row.get("sampling"), dict)]
    # Without what differs from row to row.
    common = Counter(code({k: v for k, v in one.items() if k != "seed"}) for one in given)
    card = DatasetCard.from_template(
        head,
        template_path=str(TEMPLATE),
        version=__version__,
        rows=len(rows),
        funnel=funnel,
        writers=counted(rows, "source", "model", "stage"),
        sampled=common.most_common(5),
        sections=sections,
        funnel_table=funnel_table(funnel),
        settings=shown.replace("```", "'''"),
        checked=funnel.get("decontamination"),
        evaluations=[code(public(str(one))) for one in settings.get("decontaminate") or ()],
        coverage=COVERAGE,
        run=N,
        tasks=counted(rows, "task"),
        verdicts=Counter(row.get("correct") for row in rows),
        lengths=sorted(row["tokens"] for row in rows if row.get("tokens") is not None),
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
    return Counter(tuple(code(row.get(name)) for name in columns) for row in rows).most_common()


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
