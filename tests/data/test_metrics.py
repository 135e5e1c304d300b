"""Measures count the right rows: first samples for accuracy, all of them for pass@k and maj@k."""

import pytest

from chainforge.core.errors import InputError
from chainforge.core.statistics import mcnemar, wilson
from chainforge.data.metrics import compare, measure, summarize


def row(identity, sample, correct, **extra):
    extracted = "right" if correct else f"wrong {sample}"
    verdict = {"correct": correct, "lenient_correct": bool(correct), "extracted": extracted}
    values = {"id": identity, "sample": sample, "formatted": True, "tokens": 10}
    return values | {"finish_reason": "stop", "task": "sums"} | verdict | extra


def test_prompts_without_an_answer_have_no_accuracy():
    answered = [row("a", 0, True, answer="4"), row("b", 0, False, answer="5")]
    open_ended = [row("c", 0, None, answer=None), row("d", 0, None, answer=None, task="chat")]
    result = measure("final", answered + open_ended)
    assert (result["n"], result["general"]["n"]) == (2, 2)
    assert (result["strict"]["mean"], result["unjudged"]) == (0.5, 0)
    assert set(result["tasks"]) == {"sums"}
    assert "general" not in measure("final", answered)
    assert compare("a", answered + open_ended, "b", answered)["difference"] == 0
    alone = measure("final", open_ended)
    assert (alone["n"], alone["strict"], alone["lenient"], alone["format"]) == (2, None, None, 1.0)
    assert not {"macro", "pass_at_k", "unjudged", "general"} & alone.keys()
    with pytest.raises(InputError, match="no row has an answer"):
        compare("a", open_ended, "b", open_ended)


def test_rewards_are_averaged_and_compared_on_the_prompts_that_they_apply_to():
    def scored(shift):
        values = [0.0, 1.0, 3.0, None]
        return [
            row(str(n), sample, None, answer=None, rewards={"judge": value and value + shift})
            for n, value in enumerate(values)
            for sample in range(2)
        ]

    results = summarize({"a": scored(0), "b": scored(0.5)})
    (first, _), (pair,) = results["models"], results["reward_pairs"]
    assert results["pairs"] == []
    assert first["rewards"]["judge"] | {"low": 0, "high": 0} == {
        "mean": pytest.approx(4 / 3), "low": 0, "high": 0, "n": 3}  # fmt: skip
    assert first["rewards"]["judge"]["low"] < 0 < first["rewards"]["judge"]["high"]
    assert (pair["reward"], pair["n"]) == ("judge", 3)
    assert pair["difference"] == pytest.approx(1 / 3)
    assert pair["low"] < 1 / 3 < pair["high"]
    assert 0.1 < pair["p"] < 0.3


def test_accuracy_counts_the_first_sample_of_each_prompt():
    rows = [
        row("a", 1, False),
        row("a", 0, True, tokens=20),
        row("b", 0, False, lenient_correct=True, formatted=False, finish_reason="length"),
        row("b", 1, True),
        row("c", 0, None, tokens=None),
        row("c", 1, None, finish_reason="length"),
        row("d", 0, True, task="chains"),
        row("d", 1, True, task="chains"),
    ]
    result = measure("final", rows)
    expected = {
        "name": "final", "n": 4, "strict": {"mean": 0.5, **interval(2, 4)}, "format": 0.75,
        "truncated": 0.25, "tokens_mean": pytest.approx(40 / 3), "unjudged": 1,
        "samples_per_prompt": 2,
    }  # fmt: skip
    assert {key: result[key] for key in expected} == expected
    assert result["lenient"]["mean"] == 0.75
    assert result["pass_at_k"] == {"1": pytest.approx((0.5 + 0.5 + 0 + 1) / 4), "2": 0.75}
    assert result["maj_at_k"]["1"] == 0.5
    assert result["tokens_per_solved"] == pytest.approx(40 / 3 / 0.5)
    chains, sums = result["tasks"]["chains"], result["tasks"]["sums"]
    assert result["macro"]["strict"]["mean"] == pytest.approx((1 + 1 / 3) / 2)  # tasks count alike
    assert measure("m", [row("a", 0, False)])["tokens_per_solved"] is None
    assert chains["strict"] == {"mean": 1.0, **interval(1, 1)}
    assert (chains["n"], sums["n"]) == (1, 3)
    assert (chains["pass_at_k"]["2"], sums["pass_at_k"]["2"]) == (1.0, pytest.approx(2 / 3))


def interval(successes, n):
    low, high = wilson(successes, n)
    return {"low": low, "high": high}


def test_language_is_that_of_readable_reasoning_alone():
    form = "<reasoning_process>{}</reasoning_process>\n<summary>4</summary>"
    texts = [form.format("two and two"), form.format("two and 二加二一"), "二加二"]
    rows = [row(str(i), 0, True, completion=text) for i, text in enumerate(texts)]
    assert measure("m", rows)["language"] == pytest.approx((1 + 1 / 2) / 2)
    assert measure("m", rows, language="zh")["language"] == pytest.approx((0 + 1 / 2) / 2)
    assert measure("m", rows, transcript="think")["language"] is None


def test_k_doubles_up_to_the_samples_of_every_prompt_and_equal_answers_vote_as_one():
    for samples, steps in (((1,), "1"), ((2,), "1 2"), ((6,), "1 2 4 6"), ((8, 2), "1 2")):
        rows = [row(str(p), i, i == 0) for p, count in enumerate(samples) for i in range(count)]
        result = measure("m", rows)
        assert list(result["pass_at_k"]) == list(result["maj_at_k"]) == steps.split()
    rows = [row("a", i, i > 0) for i in range(3)]
    assert measure("m", rows)["maj_at_k"] == {"1": 0.0, "2": 0.0, "3": 1.0}
    # Only well-formed samples vote.
    rows[0] |= {"formatted": False, "lenient_correct": True, "extracted": "right"}
    assert measure("m", rows)["maj_at_k"] == {"1": 0.0, "2": 1.0, "3": 1.0}


def test_comparison_pairs_by_id_whatever_the_order():
    a = [row("x", 0, False), row("y", 0, True), row("z", 0, False)]
    b = [row("z", 0, True), row("x", 0, True), row("y", 0, True)]
    pair = compare("cold", a, "final", b)
    assert (pair["from"], pair["to"]) == ("cold", "final")
    assert pair["difference"] == pytest.approx(2 / 3)
    assert pair["low"] <= pair["difference"] <= pair["high"]
    assert pair["p"] == mcnemar(0, 2)
    with pytest.raises(InputError, match=r"same prompts.*'y'"):
        compare("cold", a[:1], "final", b[1:])
    with pytest.raises(InputError, match="model empty"):
        measure("empty", [])
    models = {name: [row("x", 0, name != "base")] for name in ("base", "cold", "final")}
    result = summarize(models)
    assert [model["name"] for model in result["models"]] == list(models)
    pairs = [(pair["from"], pair["to"]) for pair in result["pairs"]]
    assert pairs == [("base", "cold"), ("cold", "final")]  # each with the one before it
    assert summarize({"base": models["base"]})["pairs"] == []
