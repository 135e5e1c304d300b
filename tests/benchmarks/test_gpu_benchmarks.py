"""The GPU benchmarks run at toy size on a CPU, and say when there is no GPU."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def on_the_path():
    """Benchmarks are scripts: they import each other from their own folder."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("case", ["trl", "static", "shipped", "chainforge"])
def test_a_grpo_step_is_split_into_its_parts(case):
    import gpu_grpo

    row = gpu_grpo.run_case("toy", case, steps=2, toy=True)
    assert {"generate", "rewards", "train", "rest"} <= set(row["parts"])
    assert row["tokens_a_step"] == 12 * 8
    assert row["parts"]["generate"] > 0
    assert row["seconds_a_step"] == pytest.approx(sum(row["parts"].values()))


def test_sft_tells_tokens_from_padding_and_the_losses_are_equal():
    import gpu_sft

    names = ("trl", "padding-free", "packing", "lora", "shipped")
    rows = {name: gpu_sft.run_case("toy", name, steps=2, toy=True) for name in names}
    assert rows["trl"]["loss"] == pytest.approx(rows["padding-free"]["loss"], rel=1e-4)
    assert rows["trl"]["tokens"] == rows["padding-free"]["tokens"]
    assert rows["lora"]["trained_parameters"] < rows["trl"]["trained_parameters"]
    assert all(row["tokens_per_second"] > 0 for row in rows.values())


def test_shares_are_of_what_the_device_can_do():
    import gpu_cases as gpu
    import gpu_grpo

    parameters, cache = gpu.weights_of("Qwen2.5-0.5B")
    assert parameters == 494_032_768
    assert cache == 12_288
    most = gpu.limits()
    assert most["flops"] > 0
    row = {"model": "toy", "case": "trl", "prompt": 8, "completion": 12, "completions": 8,
           "parts": {"generate": 1.0, "train": 1.0}}  # fmt: skip
    assert 0 < gpu_grpo.shares(row, most)["share_of_multiplying"] < 1


def test_the_shipped_settings_are_held_against_the_fastest():
    import gpu_cases as gpu

    rows = [{"model": "m", "case": case, "tokens_per_second": rate}
            for case, rate in (("trl", 10.0), ("shipped", 15.0), ("static", 20.0))]  # fmt: skip
    found = gpu.verdict(rows, lambda row: True)
    assert found["met"] is False
    assert found["measured"] == "m: 15 tokens/s, 0.75 of the fastest (static), 1.50x TRL's defaults"
    assert gpu.verdict(rows, lambda row: row["case"] != "static")["met"] is True
    assert gpu.verdict(rows[:1], lambda row: True)["met"] is None


@pytest.mark.parametrize("words", [["gpu_grpo"], ["gpu_sft"], ["memory", "--gpu"]])
def test_without_a_gpu_they_say_so(words, monkeypatch):
    import gpu_cases as gpu

    if gpu.has_gpu():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="no GPU here: nothing was measured"):
        import_module(words[0]).main()
