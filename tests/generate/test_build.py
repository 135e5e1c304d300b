"""From scored samples to a data set that opens, trains and says where its rows are from."""

import itertools
import json
import random
import runpy
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from planted import Maker

from chainforge.core.artifacts import read_json, read_manifest
from chainforge.core.errors import InputError
from chainforge.core.jsonl import read_rows, write_rows
from chainforge.data import select
from chainforge.data.filters import FilterArgs, SelectionArgs
from chainforge.data.rows import rejects_in
from chainforge.data.select import read_pool
from chainforge.data.sft_dataset import DataArgs, sft_dataset
from chainforge.generate.build import SCRATCH, BuildArgs, build, open_pool, public, public_settings
from chainforge.rewards.reward import RewardArgs


def pool(prompts=30, samples=6):
    """Return samples of which some are wrong, truncated, repeated or loop."""
    make, rows = Maker(0), []
    chance = make.rng.random
    for prompt, index in itertools.product(range(prompts), range(samples)):
        if not index:
            question = make.question() + f" ({prompt})"
        text = make.looping() if chance() < 0.1 else make.reasoning(1)
        row = make.row(text, question, str(prompt), index, task=f"task {prompt % 3}")
        right = chance() < 0.6
        row |= {"correct": right, "reward": right + 0.2, "extracted": str(prompt) if right else "?"}
        row |= {"finish_reason": "length" if chance() < 0.1 else "stop", "model": "policy"}
        row["sampling"] = {"temperature": 1.0, "seed": make.rng.randrange(9)}
        rows.append(row)
    return rows


def made(tmp_path, rows, selection=None, texts=None, **settings):
    selection = selection or SelectionArgs(max_per_prompt=2)
    return build(rows, tmp_path, selection, texts or FilterArgs(), BuildArgs(**settings))


def test_what_is_left_behind(tmp_path):
    from datasets import load_dataset

    held_out = tmp_path / "held_out.jsonl"
    rows = pool()
    write_rows(held_out, [{"question": rows[0]["prompt"][0]["content"]}])
    selection = SelectionArgs(max_per_prompt=2, decontaminate=[str(held_out)])
    funnel = made(tmp_path, rows, selection)
    assert funnel["in"] == len(rows) == funnel["kept"] + sum(funnel["dropped"].values())
    assert funnel == read_json(tmp_path / "funnel.json")
    assert set(funnel["dropped"]) == {
        "truncated", "wrong", "repetition", "contaminated", "not_selected",
    }  # fmt: skip
    assert funnel["decontamination"]["prompts_dropped"] == 1
    marked = read_rows(tmp_path / "samples.jsonl")
    assert [(row["id"], row["sample"]) for row in marked] == [
        (row["id"], row["sample"]) for row in rows
    ]
    assert sum(row["drop"] is None for row in marked) == funnel["kept"]
    assert all(row["drop"] is None or row["drop_detail"] for row in marked)
    folder = str(tmp_path / "dataset")
    kept = load_dataset(folder, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(kept) == funnel["kept"] == len(sft_dataset(DataArgs([str(tmp_path)]))[0])
    assert kept[0]["completion"][0]["role"] == "assistant"


def test_the_card_says_where_the_rows_are_from(tmp_path):
    (tmp_path / "reason").mkdir()
    (tmp_path / "reason/manifest.json").touch()
    rows = [row | {"model": f"{tmp_path}/reason/model"} for row in pool()]
    funnel = made(tmp_path, rows, dataset_license="mit")
    card = (tmp_path / "dataset/README.md").read_text()
    _, head, text = card.split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["license"] == "mit"
    assert head["size_categories"] == ["n<1K"]
    for reason, count in funnel["dropped"].items():
        assert f"| `{reason}` | {count:,} |" in text
    assert f"**{funnel['kept']:,}**" in text
    for words in ("max_per_prompt: 2", "temperature", "`policy`", "**not** checked", "paraphrase"):
        assert words in text
    assert "'seed'" not in text  # of every row another
    assert "by `reason/model`" in text
    assert str(tmp_path) not in text
    saved = pq.read_table(tmp_path / "dataset/train.parquet")["model"].to_pylist()
    assert set(saved) == {"reason/model"}


def test_bad_rows_of_a_pool_are_left_out_and_counted(tmp_path):
    rows = pool(prompts=80)
    path = tmp_path / "samples.jsonl"
    write_rows(path, rows)
    with open(path, "ab") as file:
        bad = b'{"id": 7, "completion": "x"}\n{"id": "a", "completion": null}\nnull\n{"id": "t'
        file.write(bad)
    assert len(read_pool([str(tmp_path)])) == 480
    with open(path, "ab") as file:
        file.write(b"\nnull")
    with pytest.raises(InputError, match=r"(?s)5 of 485 rows are malformed.*line 481: Expected"):
        read_pool([str(tmp_path)])


def scattered(tmp_path):
    """Write a pool of two stages: scattered prompts, ties, repeats, odd types and bad lines."""
    rng, rows = random.Random(1), []
    for number, row in enumerate(rng.sample(pool(prompts=120), 720)):
        twins = [one for one in rows if one["id"] == row["id"]]
        again = rng.choice(twins or rows or [row]) if rng.random() < 0.4 else row
        row["prompt"] = again["prompt"] if rng.random() < 0.3 else row["prompt"]
        row["completion"] = again["completion"].replace("the", "a", rng.randrange(2))
        row |= {"answer": rng.choice([None, "4"]), "correct": rng.choice([True, True, False, None])}
        row |= {"reward": rng.choice([1, 1.2, None]), "some": [[], [1], [2.5]][number // 300]}
        row |= {"kind": 1 if number < 600 else "one", "late": True} if number > 400 else {}
        rows.append(row | ({"drop": "wrong", "pass_rate": 0.1} if number % 9 == 0 else {}))
    for name, some in (("reason", rows[:500]), ("picks", rows[500:])):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "samples.jsonl", some)
    lines = (tmp_path / "reason/samples.jsonl").read_bytes().splitlines(keepends=True)
    lines[77:77] = [b"\n", b'{"id": 3}\n']
    lines[300:300] = [b"nul\xff\n"]
    (tmp_path / "reason/samples.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(lines))
    write_rows(tmp_path / "exam.jsonl", [{"question": rows[5]["prompt"][-1]["content"]}])
    return [str(tmp_path / "reason"), str(tmp_path / "picks")]


@pytest.mark.parametrize("choice", ["best", "shortest", "diverse", "random", "all"])
def test_parts_and_processes_change_no_byte(tmp_path, monkeypatch, choice):
    """One part in memory, small parts of files, and two processes select and write the same."""
    paths = scattered(tmp_path)
    selection = SelectionArgs(
        max_per_prompt=2, select=choice, near_duplicates=0.6, max_rows=90,
        decontaminate=[str(tmp_path / "exam.jsonl")],
    )  # fmt: skip

    def files(name):
        with rejects_in(tmp_path / name):
            pooled, origin = open_pool(paths, BuildArgs(rescore=False), RewardArgs())
            if name == "memory":
                pooled = read_pool(paths)
            else:
                assert (len(pooled.parts) > 9, pooled.processes) == (True, int(name))
            build(
                pooled, tmp_path / name, selection, FilterArgs(), BuildArgs(), seed=3,
                report={"sampling": origin if name != "memory" else {"pool": {"reason": 500, "picks": 220}}},
            )  # fmt: skip
        folder = tmp_path / name
        assert not (folder / SCRATCH).exists()
        found = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return found, pq.read_table(folder / "dataset/train.parquet")

    (tmp_path / "memory").mkdir()
    expected, table = files("memory")
    assert {"rejects.jsonl", "samples.jsonl", "README.md", "train.parquet"} <= set(expected)
    dropped = json.loads(expected["funnel.json"])["dropped"]
    assert {"contaminated", "duplicate", "near_duplicate", "over_quota", "wrong"} <= set(dropped)
    assert {"duplicate_prompt", "unverified"} <= set(dropped)
    monkeypatch.setattr(select, "PART", 50_000)
    for processes in (1, 2) if choice == "best" else (1,):
        monkeypatch.setattr(select, "cores", lambda: processes)  # noqa: B023
        (tmp_path / str(processes)).mkdir()
        found, made = files(str(processes))
        assert made.equals(table, check_metadata=True)
        for name in expected.keys() - {"train.parquet"}:
            assert found[name] == expected[name], name


KILLED = """
import runpy, sys
from chainforge.data import select
select.PART, select.cores = 20_000, lambda: 2
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_a_killed_build_leaves_nothing_behind_that_looks_done(tmp_path):
    write_rows(tmp_path / "samples.jsonl", pool(prompts=400))
    out, recipe = tmp_path / "out", Path(__file__).parents[2] / "recipes/reject.py"
    command = [sys.executable, "-c", KILLED, str(recipe)]
    command += ["--pool", str(tmp_path / "samples.jsonl")]
    command += ["--rescore", "false", "--output_dir", str(out)]
    process = subprocess.Popen(command)
    while not (out / SCRATCH / "samples-3").exists():
        assert process.poll() is None
        time.sleep(0.001)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert workers
    assert not psutil.wait_procs(workers, timeout=60)[1]
    assert not (out / "samples.jsonl").exists()
    assert not (out / "manifest.json").exists()
    assert list((out / SCRATCH).iterdir())
    subprocess.run(command, check=True)
    signed = set(read_manifest(out).outputs)
    assert signed == {
        "config.yaml", "samples.jsonl", "funnel.json", "dataset/README.md", "dataset/train.parquet",
    }  # fmt: skip
    assert not (out / SCRATCH).exists()
    assert len(read_rows(out / "samples.jsonl")) == 2_400


def test_reject_selects_from_a_pool_with_the_scores_it_has(tmp_path, monkeypatch):
    write_rows(tmp_path / "samples.jsonl", pool())
    out, recipe = tmp_path / "out", Path(__file__).parents[2] / "recipes/reject.py"
    flags = ["--pool", str(tmp_path), "--rescore", "false", "--output_dir", str(out)]
    monkeypatch.setattr("sys.argv", ["reject.py", *flags])
    runpy.run_path(str(recipe), run_name="__main__")
    manifest, funnel = read_manifest(out), read_json(out / "funnel.json")
    assert funnel["in"] == 180 == funnel["kept"] + sum(funnel["dropped"].values())
    assert {"dataset/README.md", "dataset/train.parquet"} <= set(manifest.outputs)
    assert manifest.metrics["kept"] == funnel["kept"]


def test_an_empty_completion_is_a_dropped_row(tmp_path):
    rows = pool(4, 2)
    for row, text in zip(rows, ["", " \n", "\u200b", "<think>"], strict=False):
        row |= {"completion": text, "finish_reason": "stop", "correct": None, "formatted": False}
    anything = SelectionArgs(require_correct=False, require_format=False, select="all")
    funnel = made(tmp_path, rows, anything, FilterArgs(max_repetition=None))
    marked = read_rows(tmp_path / "samples.jsonl")
    assert [row["drop"] for row in marked[:4]] == ["empty", "empty", "empty", None]
    assert len(sft_dataset(DataArgs([str(tmp_path)]))[0]) == funnel["kept"] > 0


def test_of_a_path_from_elsewhere_only_the_end_is_public():
    for path in ("Qwen/Qwen2.5-0.5B", "runs/quickstart/rl_final/model"):
        assert public(path) == path
    for path, shown in (
        ("/home/alice/models/qwen", "qwen"), ("../../alice/base", "base"), ("~/base/", "base"),
        ("~", "elsewhere"), ("/", "elsewhere"), ("/home/alice/mine.py:good", "mine.py:good"),
    ):  # fmt: skip
        assert public(path) == shown


def test_settings_are_shown_without_keys_and_places():
    settings = {
        "rewards": [{"fn": "/home/alice/mine.py:good", "params": {"judge_api_key": "k", "n": 2}}],
        "base_url": "https://alice:word@server/v1",
        "model_init_kwargs": {"token": "t", "dtype": "float32"},
        "pad_token": "<pad>",
        "max_tokens": 5,
        "system_prompt": "/no_think Say it.",
        "notes": f"in {Path.home()}/x",
    }
    assert public_settings(settings) == {
        "rewards": [{"fn": "mine.py:good", "params": {"n": 2}}],
        "base_url": "https://server/v1",
        "model_init_kwargs": {"dtype": "float32"},
        "pad_token": "<pad>",
        "max_tokens": 5,
        "system_prompt": "/no_think Say it.",
        "notes": "in ~/x",
    }
