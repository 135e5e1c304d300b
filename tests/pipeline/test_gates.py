"""Gates: a model that is not good enough stops the chain, and nothing else does."""

import json

import pytest

from chainforge.core.errors import InputError
from chainforge.core.statistics import mcnemar
from chainforge.data.measures import summarize
from chainforge.pipeline.chain import load_chain
from chainforge.pipeline.gates import Gate, judge, read_gates
from chainforge.pipeline.plan import as_text, plan_chain
from chainforge.pipeline.run import GateShut

MEASURE = '''
"""Measure models that got as many of twenty rows right as `right` says."""
import sys
from pathlib import Path

from chainforge.core import process
from chainforge.core.artifacts import write_json
from chainforge.core.config import given
from chainforge.data.measures import summarize
from chainforge.training.stage import open_stage


def rows(right):
    return [{"id": str(i), "sample": 0, "correct": i < right} for i in range(20)]


def main():
    settings = given(sys.argv[1:])
    inputs = {f"models.{m.partition('=')[0]}": m.partition("=")[2] for m in settings["models"]}
    with open_stage("measuring", settings["output_dir"], inputs=inputs) as stage:
        judged = {name: rows(right) for name, right in settings["right"].items()}
        write_json(stage.path("results.json"), summarize(judged))


if __name__ == "__main__":
    process.run(main)
'''


@pytest.fixture
def place(workplace):
    """Two trained stages with a measurement between them, whose gate says if the second starts."""
    (workplace.folder / "measure.py").write_text(MEASURE)
    workplace.chain["stages"] = [
        {"name": "cold", "recipe": "count.py", "config": "cold.yaml", "model": "base"},
        {
            "name": "scores",
            "recipe": "measure.py",
            "models": ["base", "cold"],
            "set": {"right": {"base": 2, "cold": 12}},
            "gate": {"metric": "accuracy", "min": 0.7},
        },
        {"name": "reason", "recipe": "count.py", "config": "reason.yaml", "model": "cold"},
    ]
    workplace.save()
    return workplace


def test_a_shut_gate_stops_the_chain_until_it_is_opened_or_ignored(place):
    text = place.chainforge("run", "chain.yaml", expect=1)
    assert "accuracy of cold is 0.600, below the 0.7 that it must reach" in text
    assert "--ignore-gates" in text
    assert "Traceback" not in text
    # What was measured stands; only what comes after waits.
    assert place.states() == {"cold": "done", "scores": "done", "reason": "to run"}
    with pytest.raises(GateShut):
        place.run()
    assert "gate          accuracy of cold at least 0.7" in as_text(
        load_chain("chain.yaml"), "runs", plan_chain(load_chain("chain.yaml"), "runs")
    )
    before = place.fingerprint("scores")
    text = place.chainforge("run", "chain.yaml", "--ignore-gates")
    assert "gate not passed, ignored: accuracy of cold is 0.600" in text
    place.chain["stages"][1]["gate"] = [{"metric": "accuracy", "min": 0.5}, {"beats": "base"}]
    place.save()
    assert set(place.states().values()) == {"done"}  # a gate is no setting of the stage
    text = place.chainforge("run", "chain.yaml")
    assert "gate passed: accuracy of cold is 0.600" in text
    assert "gate passed: cold beats base: +50.0 points" in text
    assert place.fingerprint("scores") == before


def test_from_a_later_stage_takes_what_is_before_as_it_is(place):
    with pytest.raises(GateShut):
        place.run()
    place.run(from_="reason")
    assert place.states()["reason"] == "done"


def rows(model, right, n=20, tokens=10):
    return [
        {"id": str(i), "sample": s, "correct": i < right, "tokens": tokens, "model": model}
        for i in range(n)
        for s in range(2)
    ]


@pytest.fixture
def measured(tmp_path):
    """What an evaluation of three models leaves, only neighbours compared."""
    judged = {name: rows(name, right) for name, right in (("a", 0), ("b", 8), ("c", 12))}
    (tmp_path / "results.json").write_text(json.dumps(summarize(judged)))
    lines = [json.dumps(row) for part in judged.values() for row in part]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("gate", "passed", "words"),
    [
        (Gate("c", metric="accuracy", low=0.6), True, "accuracy of c is 0.600"),
        (Gate("b", metric="accuracy", low=0.5), False, "0.400, below the 0.5"),
        (Gate("c", metric="tokens", high=9), False, "10.0, above the 9"),
        (Gate("c", metric="tokens", low=5, high=11), True, "10.0"),
        (Gate("c", metric="truncated", high=0), True, "0.000"),
        (Gate("c", metric="macro", low=0.5), True, "0.600"),
        (Gate("c", metric="pass@2", low=0.5), True, "0.600"),
        (Gate("a", metric="tokens_per_solved", high=1000), False, "no value"),
        (Gate("c", beats="b"), False, "p must be below 0.05"),
        (Gate("c", beats="b", p=0.2), True, "+20.0 points against b"),
        (Gate("c", beats="a"), True, "+60.0 points against a"),  # not compared by the stage
        (Gate("b", beats="c"), False, "it is not better"),
    ],
)
def test_a_gate_says_what_it_found(measured, gate, passed, words):
    opened, shut = judge([gate], measured)
    assert (len(opened), len(shut)) == (passed, not passed)
    assert words in (opened + shut)[0].replace("\u00a0", " ")


def test_the_p_of_a_gate_is_mcnemars(measured):
    p = mcnemar(0, 4)
    assert judge([Gate("c", beats="b", p=p * 1.001)], measured)[0]
    assert judge([Gate("c", beats="b", p=p)], measured)[1]


@pytest.mark.parametrize(
    ("gate", "found"),
    [
        ({"metric": "acuracy", "min": 0.2}, "did you mean 'accuracy'"),
        ({"metric": ["accuracy"], "min": 0.2}, "no metric"),
        ({"metric": "pass@0", "min": 0.2}, "no metric 'pass@0'"),
        ({"metric": "accuracy"}, "needs a `min`, a `max` or both"),
        ({"metric": "accuracy", "min": "much"}, "min must be a number"),
        ({"metric": "accuracy", "min": float("nan")}, "min must be a number"),
        ({"metric": "accuracy", "min": True}, "min must be a number"),
        ({"metric": "accuracy", "min": 0.5, "max": 0.2}, "nothing lies between"),
        ({"metric": "accuracy", "min": 0.2, "p": 0.05}, "`p` goes with `beats`"),
        ({"metric": "accuracy", "min": 0.2, "model": "colt"}, "did you mean 'cold'"),
        ({"beats": "bass"}, "did you mean 'base'"),
        ({"beats": "cold"}, "cannot beat itself"),
        ({"beats": "base", "min": 0.2}, "go with `metric`"),
        ({"beats": "base", "p": 5}, "p is 5"),
        ({"beats": "base", "metric": "accuracy"}, "not both"),
        ({"metric": "accuracy", "minimum": 0.2}, "unknown key 'minimum'"),
        ({}, "needs `metric` or `beats`"),
        ("accuracy > 0.2", "expected {metric"),
    ],
)
def test_a_gate_that_nothing_can_pass_is_refused_before_anything_runs(gate, found):
    with pytest.raises(InputError, match="key 'gate'") as caught:
        read_gates(gate, ("base", "cold"))
    assert found in str(caught.value)


def test_the_file_and_the_stage_of_a_wrong_gate_are_named(place):
    place.chain["stages"][0]["gate"] = {"metric": "accuracy", "min": 0.2}
    place.save()
    with pytest.raises(InputError, match=r"chain\.yaml: stage cold: key 'gate': only a stage"):
        load_chain("chain.yaml")
    del place.chain["stages"][0]["gate"]
    place.chain["stages"][1]["gate"] = {"metric": "pass@3", "min": 0.2}
    place.chain["stages"][1]["set"]["num_samples"] = 6
    place.save()
    with pytest.raises(InputError, match=r"stage scores: .* no pass@3, but pass@1, .*pass@6"):
        place.plan()
