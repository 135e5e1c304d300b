"""Results of several seeds become one, that says how much the seed matters."""

import json

import pytest
import scipy.stats

from chainforge.cli import main
from chainforge.core.artifacts import write_json
from chainforge.core.errors import InputError
from chainforge.core.run_dir import read_run
from chainforge.data.metrics import summarize
from chainforge.report.html import write_report
from chainforge.report.seeds import merge_results

RIGHT = {1: (40, 60), 2: (44, 70), 3: (36, 62)}  # of 100 rows, by seed: cold_start and rl_final


def evaluation(place, seed, right, **settings):
    """Leave a results.json as `evaluate` does."""
    judged = {
        name: [
            {"id": str(i), "sample": 0, "correct": i < count, "tokens": 10 * seed, "task": "sums"}
            for i in range(100)
        ]
        for name, count in zip(("cold_start", "rl_final"), right, strict=True)
    }
    said = {"sampling": {"temperature": 1.0}, "seed": seed, "tasks": [{"fn": "x"}]} | settings
    write_json(place / "results.json", summarize(judged) | {"settings": said})
    (place / "config.yaml").write_text("seed: 1\n")
    return place


@pytest.fixture
def runs(tmp_path):
    for seed, right in RIGHT.items():
        evaluation(tmp_path / f"seed-{seed}/fake/eval", seed, right)
    return tmp_path


def test_what_an_ablation_has_beside_its_results_is_merged(runs):
    for seed in RIGHT:
        file = runs / f"seed-{seed}/fake/eval/results.json"
        found = json.loads(file.read_text())
        found["pairs"][0]["seconds"] = 60.0 * seed
        write_json(file, found | {"failed": {"without sft": "no reward"}})
    merged = merge_results(runs / f"seed-{seed}/fake/eval" for seed in RIGHT)
    assert merged["pairs"][0]["seconds"] == 120
    assert merged["failed"] == {"without sft": "no reward"}


def test_the_mean_over_seeds_has_an_interval_that_knows_of_rows_and_seeds(runs):
    merged = merge_results(runs / f"seed-{seed}/fake/eval" for seed in RIGHT)
    assert [(model["name"], model["n"]) for model in merged["models"]] == [
        ("cold_start", 100),
        ("rl_final", 100),
    ]
    model, (pair,) = merged["models"][0], merged["pairs"]
    strict = model["strict"]
    assert strict["mean"] == pytest.approx(0.40)
    assert strict["seeds"] == {"1": 0.40, "2": 0.44, "3": 0.36}
    assert strict["sd"] == pytest.approx(0.04)
    # Wider than one seed's own, and than Student's t of the seeds alone.
    alone = json.loads((runs / "seed-1/fake/eval/results.json").read_text())["models"][0]["strict"]
    assert strict["low"] < alone["low"] < alone["high"] < strict["high"]
    t = scipy.stats.ttest_1samp([0.40, 0.44, 0.36], 0).confidence_interval()
    assert strict["high"] - strict["low"] > t.high - t.low
    assert model["tokens_mean"] == 20
    assert model["pass_at_k"] == {"1": pytest.approx(0.40)}
    assert model["tasks"]["sums"]["strict"]["mean"] == pytest.approx(0.40)
    assert pair["difference"] == pytest.approx((0.20 + 0.26 + 0.26) / 3)
    assert pair["seeds"] == pytest.approx({"1": 0.2, "2": 0.26, "3": 0.26})
    assert pair["low"] < pair["difference"] < pair["high"]
    assert pair["p"] < 0.01
    assert merged["settings"]["seeds"] == [1, 2, 3]


def test_a_gain_that_the_next_seed_takes_back_is_no_gain(tmp_path):
    for seed, right in ((1, (40, 70)), (2, (60, 40))):
        evaluation(tmp_path / str(seed), seed, right)
    (pair,) = merge_results([tmp_path / "1", tmp_path / "2"])["pairs"]
    assert pair["low"] < 0 < pair["high"]
    assert pair["p"] > 0.5


def test_runs_are_merged_from_the_command_line_into_the_same_form(runs, monkeypatch, capsys):
    places = [str(runs / f"seed-{seed}/fake") for seed in RIGHT]
    out = runs / "all/eval/results.json"
    monkeypatch.setattr("sys.argv", ["chainforge", "merge", *places, "--output", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "mean of 3 seeds" in capsys.readouterr().out
    (out.parent / "config.yaml").write_text("seed: 1\n")
    # The report reads it like any other.
    assert read_run(runs / "all").last_results().results["models"][1]["name"] == "rl_final"
    page = write_report(runs / "all").read_text()
    assert "intervals over 3 seeds" in page
    assert "seed 1, 2, 3" in page


def test_what_is_not_the_same_evaluation_is_refused(runs):
    first = runs / "seed-1/fake"
    with pytest.raises(InputError, match="at least two seeds"):
        merge_results([first, first / "eval"])
    for other, found in (
        (evaluation(runs / "hot", 4, (1, 2), sampling={"temperature": 0.6}), "sampling: .*0.6"),
        (evaluation(runs / "again", 1, (1, 2)), "its seed is 1"),
    ):
        with pytest.raises(InputError, match=found):
            merge_results([first, other])
    results = json.loads((first / "eval/results.json").read_text())
    old = {key: results[key] for key in ("models", "pairs")}
    write_json(runs / "old/results.json", old)
    with pytest.raises(InputError, match="its seed is None"):
        merge_results([first, runs / "old"])
    renamed = json.loads(json.dumps(results).replace('"cold_start"', '"warm"'))
    renamed["settings"]["seed"] = 9
    write_json(runs / "warm/results.json", renamed)
    with pytest.raises(InputError, match="model names: cold_start, rl_final -> warm, rl_final"):
        merge_results([first, runs / "warm"])
    (runs / "empty").mkdir()
    with pytest.raises(InputError, match="holds no stage"):
        merge_results([first, runs / "empty"])
