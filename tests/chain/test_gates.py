"""Gates: a model that is not good enough stops the chain, and nothing else does."""

import json
import re

import pytest

from chainforge.chain import show
from chainforge.chain.plan import as_text, plan_chain
from chainforge.chain.run import GateFailed
from chainforge.chain.spec import load_chain
from chainforge.core.errors import InputError
from chainforge.core.statistics import mcnemar
from chainforge.data.metrics import summarize
from chainforge.report.gates import Gate, judge, read_gates


def test_a_failed_gate_stops_the_chain_until_it_is_passed_or_ignored(gated):
    text = gated.chainforge("run", "chain.yaml", expect=1)
    assert "accuracy of cold is 0.600, below the required 0.7" in text
    assert "--ignore-gates" in text
    assert "Traceback" not in text
    # What was measured stands; only what comes after waits.
    assert gated.states() == {"cold": "done", "scores": "done", "reason": "pending"}
    with pytest.raises(GateFailed):
        gated.run()
    assert "gate          accuracy of cold at least 0.7" in as_text(
        load_chain("chain.yaml"), "runs", plan_chain(load_chain("chain.yaml"), "runs")
    )
    failed_in_every_view(gated)
    before = gated.fingerprint("scores")
    text = gated.chainforge("run", "chain.yaml", "--ignore-gates")
    assert "gate not passed, ignored: accuracy of cold is 0.600" in text
    gated.chain["stages"][1]["gate"] = [{"metric": "accuracy", "min": 0.5}, {"beats": "base"}]
    gated.save()
    assert set(gated.states().values()) == {"done"}  # a gate is no setting of the stage
    text = gated.chainforge("run", "chain.yaml")
    assert "gate passed: accuracy of cold is 0.600" in text
    assert "gate passed: cold beats base: +50.0 points" in text
    assert gated.fingerprint("scores") == before
    assert "gate passed" in gated.report()
    assert "gate not passed" not in gated.report()


def failed_in_every_view(gated):
    """`show`, its JSON and the report name the gate that is not passed, and what it found."""
    chain = load_chain("chain.yaml")
    steps = plan_chain(chain, "runs")
    cold, scores, reason = show.to_json(chain, "runs", steps)["stages"]
    found = "accuracy of cold is 0.600, below the required 0.7"
    assert cold["gate"] is None
    assert scores["gate"] == {"passed": [], "failed": [found]}
    assert [stage["state"] for stage in (cold, scores, reason)] == ["done", "done", "pending"]
    text = " ".join(gated.chainforge("show", "chain.yaml").split())
    assert "scores measure base, cold done" in text
    assert f"scores: gate not passed; --ignore-gates continues anyway {found}" in text
    page = " ".join(re.sub("<[^>]*>", " ", gated.report()).split())
    assert f"scores: gate not passed {found}" in page
    assert "done gate not passed" in page
    (gated.folder / "runs/fake/scores/results.json").rename("away.json")
    assert "cannot be judged" in show.rows(steps)[1]["gate"]["failed"][0]
    (gated.folder / "away.json").rename("runs/fake/scores/results.json")


def test_from_a_later_stage_takes_what_is_before_as_it_is(gated):
    with pytest.raises(GateFailed):
        gated.run()
    gated.run(from_="reason")
    assert gated.states()["reason"] == "done"


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
        (Gate("b", metric="accuracy", low=0.5), False, "0.400, below the required 0.5"),
        (Gate("c", metric="tokens", high=9), False, "10.0, above the allowed 9"),
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
    found = judge([gate], measured)
    assert (len(found.passed), len(found.failed)) == (passed, not passed)
    assert words in (found.passed + found.failed)[0].replace("\u00a0", " ")


def test_the_p_of_a_gate_is_mcnemars(measured):
    p = mcnemar(0, 4)
    assert judge([Gate("c", beats="b", p=p * 1.001)], measured).passed
    assert judge([Gate("c", beats="b", p=p)], measured).failed


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
        ({"metric": "accuracy", "min": 0.5, "max": 0.2}, "nothing is between"),
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


def test_the_file_and_the_stage_of_a_wrong_gate_are_named(gated):
    gated.chain["stages"][0]["gate"] = {"metric": "accuracy", "min": 0.2}
    gated.save()
    with pytest.raises(InputError, match=r"chain\.yaml: stage cold: key 'gate': only a stage"):
        load_chain("chain.yaml")
