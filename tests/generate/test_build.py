"""From scored samples to a data set that opens, trains and says where its rows are from."""

import sys

import pyarrow.parquet as pq
import pytest
import yaml
from planted import Maker

from chainforge.core.artifacts import read_json, read_manifest
from chainforge.core.errors import InputError
from chainforge.core.jsonl import read_rows, write_rows
from chainforge.data.datasets import DataArgs, sft_mixture
from chainforge.data.filters import FilterArgs, SelectionArgs
from chainforge.data.pool import Pool, measure
from chainforge.data.select import decide, match_pairs, select_rows
from chainforge.generate.build import BuildArgs, Rows, build, pooled, preview


def pool(prompts=30, samples=6, seed=0):
    """Return samples of which some are wrong, truncated, repeated or loop."""
    make = Maker(seed)
    rng = make.rng
    rows = []
    for prompt in range(prompts):
        question, answer = make.question() + f" ({prompt})", str(prompt)
        for index in range(samples):
            right = rng.random() < 0.6
            rows.append(
                make.row(
                    make.looping() if rng.random() < 0.1 else make.reasoning(1),
                    question,
                    answer,
                    index,
                    task=f"task {prompt % 3}",
                    correct=right,
                    reward=right + 0.2,
                    extracted=answer if right else "?",
                    finish_reason="length" if rng.random() < 0.1 else "stop",
                    model="policy",
                    stage="picks",
                    sampling={"temperature": 1.0, "seed": rng.randrange(9)},
                )
            )
    return rows


def made(tmp_path, rows, selection=None, texts=None, **settings):
    selection = selection or SelectionArgs(max_per_prompt=2)
    return build(Rows(rows), tmp_path, selection, texts or FilterArgs(), BuildArgs(**settings))


def test_what_is_left_behind(tmp_path):
    from datasets import load_dataset

    held_out = tmp_path / "held_out.jsonl"
    rows = pool()
    write_rows(held_out, [{"question": rows[0]["prompt"][0]["content"]}])
    selection = SelectionArgs(max_per_prompt=2, decontaminate=[str(held_out)])
    funnel = made(tmp_path, rows, selection, preference_pairs=1)
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
    assert len(kept) == funnel["kept"] == len(sft_mixture(DataArgs([str(tmp_path)]))[0])
    assert kept[0]["completion"][0]["role"] == "assistant"
    pairs = load_dataset(folder, "pairs", split="train", cache_dir=str(tmp_path / "cache"))
    assert len(pairs) == funnel["pairs"] > 10


def test_the_card_says_where_the_rows_are_from(tmp_path):
    (tmp_path / "reason").mkdir()
    (tmp_path / "reason/manifest.json").touch()
    rows = [row | {"model": f"{tmp_path}/reason/model"} for row in pool()]
    funnel = made(tmp_path, rows, preference_pairs=1, dataset_license="mit")
    card = (tmp_path / "dataset/README.md").read_text()
    _, head, text = card.split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["license"] == "mit"
    assert head["size_categories"] == ["n<1K"]
    assert [config["config_name"] for config in head["configs"]] == ["default", "pairs"]
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


def test_pairs_set_right_against_wrong_of_one_prompt(tmp_path):
    rows = pool()
    made(tmp_path, rows, SelectionArgs(select="all"), preference_pairs=2)
    import pyarrow.parquet as pq

    pairs = pq.read_table(tmp_path / "dataset/pairs/train.parquet").to_pylist()
    by_text = {(row["id"], row["completion"]): row for row in rows}
    used = []
    for pair in pairs:
        good = by_text[pair["id"], pair["chosen"][0]["content"]]
        bad = by_text[pair["id"], pair["rejected"][0]["content"]]
        assert good["correct"]
        assert bad["correct"] is False
        assert bad["finish_reason"] == good["finish_reason"] == "stop"
        assert pair["prompt"] == good["prompt"]
        used += [(pair["id"], good["sample"]), (pair["id"], bad["sample"])]
    assert len(set(used)) == len(used)
    with pytest.raises(InputError, match="preference_pairs: expected 0"):
        match_pairs(None, -1)


def test_pairs_are_alike_in_length():

    make = Maker()
    rows = [
        make.row(question="q?", answer="1", index=i, correct=i < 1, tokens=tokens, extracted="1")
        for i, tokens in enumerate([100, 10, 300, 90, 500])
    ]
    args = SelectionArgs()
    assert match_pairs(decide(measure(rows, args), args), 1) == [(0, 3)]


def test_dpo_trains_on_the_pairs(tmp_path, tiny_model, tokenizer):
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    made(tmp_path, pool(), preference_pairs=1)
    pairs = load_dataset(
        str(tmp_path / "dataset"), "pairs", split="train", cache_dir=str(tmp_path / "cache")
    )
    args = DPOConfig(
        str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        save_strategy="no", report_to="none", max_length=512,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = DPOTrainer(tiny_model, args=args, train_dataset=pairs, processing_class=tokenizer)
    assert trainer.train().global_step == 3


def test_files_give_what_rows_in_memory_give(tmp_path, monkeypatch):
    rows = pool(prompts=60)
    write_rows(tmp_path / "a.jsonl", rows[:100])
    write_rows(tmp_path / "b.jsonl", rows[100:])
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    selection = SelectionArgs(max_per_prompt=2, near_duplicates=0.9, max_rows=40)
    expected = select_rows(rows, selection, 1, FilterArgs())
    monkeypatch.setattr("chainforge.data.pool.PART", 20_000)
    for alone in (2**40, 0):  # in this process, and in several
        monkeypatch.setattr("chainforge.data.pool.ALONE", alone)
        out = tmp_path / f"out-{alone}"
        out.mkdir()
        funnel = build(Pool(files), out, selection, FilterArgs(), BuildArgs(), seed=1)
        assert funnel == expected.funnel
        kept = [row for row in read_rows(out / "samples.jsonl") if row["drop"] is None]
        assert [(r["id"], r["completion"]) for r in kept] == [
            (r["id"], r["completion"]) for r in expected.kept
        ]


def test_bad_rows_of_a_pool_are_left_out_and_counted(tmp_path):
    rows = pool(prompts=40)
    path = tmp_path / "samples.jsonl"
    write_rows(path, rows)
    with open(path, "ab") as file:
        file.write(
            b'{"id": 7, "completion": "x"}\n{"id": "a", "completion": null}\nnull\n{"id": "t'
        )
    args = BuildArgs(max_bad_rows=0.05)
    table = preview(pooled([str(tmp_path)], args), SelectionArgs(), FilterArgs())
    assert table.title == "240 samples of 40 prompts"
    with pytest.raises(
        InputError, match=r"(?s)4 of 244 rows are malformed.*line 241: id: expected"
    ):
        preview(pooled([str(tmp_path)], BuildArgs()), SelectionArgs(), FilterArgs())


def test_a_dry_run_leaves_nothing(tmp_path, monkeypatch, recipe_main, capsys):
    rows = pool()
    write_rows(tmp_path / "samples.jsonl", rows)
    before = sorted(tmp_path.iterdir())
    flags = ["--pool", str(tmp_path), "--dry_run", "--output_dir", str(tmp_path / "out")]
    recipe_main("reject", *flags, "--max_per_prompt", "2", "--min_reward", "0.5")
    out = capsys.readouterr().out
    funnel = select_rows(
        rows, SelectionArgs(max_per_prompt=2, min_reward=0.5), 42, FilterArgs()
    ).funnel
    for reason, count in funnel["dropped"].items():
        assert any(reason in line and f" {count} " in line for line in out.splitlines()), reason
    assert f" {funnel['kept']} " in out
    assert sorted(tmp_path.iterdir()) == before


def test_reject_selects_from_a_pool_with_the_scores_it_has(tmp_path, recipe_main):
    rows = pool()
    write_rows(tmp_path / "samples.jsonl", rows)
    out = tmp_path / "out"
    recipe_main(
        "reject", "--pool", str(tmp_path), "--rescore", "false", "--output_dir", str(out),
        "--preference_pairs", "1",
    )  # fmt: skip
    manifest = read_manifest(out)
    funnel = read_json(out / "funnel.json")
    assert funnel["in"] == len(rows) == funnel["kept"] + sum(funnel["dropped"].values())
    assert {"dataset/README.md", "dataset/train.parquet", "dataset/pairs/train.parquet"} <= set(
        manifest.outputs
    )
    assert manifest.metrics["kept"] == funnel["kept"]


@pytest.fixture
def recipe_main(monkeypatch):
    """Run a recipe's main in this process."""
    import importlib.util
    from pathlib import Path

    def run(name, *argv):
        path = Path(__file__).parents[2] / "recipes" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"recipe_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
        module.main()

    return run


def test_an_empty_completion_is_a_dropped_row(tmp_path):
    rows = pool(4, 2)
    for row, text in zip(rows, ["", " \n", "\u200b", "<think>"], strict=False):
        row |= {"completion": text, "finish_reason": "stop", "correct": None, "formatted": False}
    anything = SelectionArgs(require_correct=False, require_format=False, select="all")
    funnel = made(tmp_path, rows, anything, FilterArgs(max_repetition=None))
    assert funnel["dropped"]["empty"] == 3
    assert funnel["kept"] + sum(funnel["dropped"].values()) == len(rows)
    marked = read_rows(tmp_path / "samples.jsonl")
    assert [row["drop"] for row in marked[:4]] == ["empty", "empty", "empty", None]
    assert len(sft_mixture(DataArgs([str(tmp_path)]))[0]) == funnel["kept"] > 0
