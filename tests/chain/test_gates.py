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
    assert "accuracy of cold_start is 0.600, below the required 0.7" in text
    assert "--ignore-gates" in text
    assert "Traceback" not in text
    # What was measured stands; only what comes after waits.
    assert gated.states() == {"cold_start": "done", "eval": "done", "rl": "pending"}
    with pytest.raises(GateFailed):
        gated.run()
    assert "gate          accuracy of cold_start at least 0.7" in as_text(
        load_chain("chain.yaml"), "runs", plan_chain(load_chain("chain.yaml"), "runs")
    )
    failed_in_every_view(gated)
    gated.run(from_="rl")  # takes what is before as it is
    assert gated.states()["rl"] == "done"
    before = gated.fingerprint("eval")
    text = gated.chainforge("run", "chain.yaml", "--ignore-gates")
    assert "gate not passed, ignored: accuracy of cold_start is 0.600" in text
    gated.chain["stages"][1]["gate"] = [{"metric": "accuracy", "min": 0.5}, {"beats": "base"}]
    gated.save()
    assert set(gated.states().values()) == {"done"}  # a gate is no setting of the stage
    text = gated.chainforge("run", "chain.yaml")
    assert "gate passed: accuracy of cold_start is 0.600" in text
    assert "gate passed: cold_start beats base: +50.0 points" in text
    assert gated.fingerprint("eval") == before
    assert "gate passed" in gated.report()
    assert "gate not passed" not in gated.report()


def failed_in_every_view(gated):
    """`show`, its JSON and the report name the gate that is not passed, and what it found."""
    chain = load_chain("chain.yaml")
    steps = plan_chain(chain, "runs")
    cold_start, eval, rl = show.to_json(chain, "runs", steps)["stages"]
    found = "accuracy of cold_start is 0.600, below the required 0.7"
    assert cold_start["gate"] is None
    assert eval["gate"] == {"passed": [], "failed": [found]}
    assert [stage["state"] for stage in (cold_start, eval, rl)] == ["done", "done", "pending"]
    text = " ".join(gated.chainforge("show", "chain.yaml").split())
    assert "gate not passed" in text
    assert f"eval done: {found}" in text
    page = " ".join(re.sub("<[^>]*>", " ", gated.report()).split())
    assert f"eval: gate not passed {found}" in page
    assert "done gate not passed" in page
    (gated.folder / "runs/fake/eval/results.json").rename("away.json")
    eval_ = show.to_json(chain, "runs", steps)["stages"][1]
    assert "cannot be judged" in eval_["gate"]["failed"][0]
    (gated.folder / "away.json").rename("runs/fake/eval/results.json")


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
        (Gate("c", metric="accuracy", min=0.6), True, "accuracy of c is 0.600"),
        (Gate("b", metric="accuracy", min=0.5), False, "0.400, below the required 0.5"),
        (Gate("c", metric="tokens", max=9), False, "10.0, above the allowed 9"),
        (Gate("c", metric="tokens", min=5, max=11), True, "10.0"),
        (Gate("c", metric="truncated", max=0), True, "0.000"),
        (Gate("c", metric="macro", min=0.5), True, "0.600"),
        (Gate("c", metric="pass@2", min=0.5), True, "0.600"),
        (Gate("a", metric="tokens_per_solved", max=1000), False, "no value"),
        (Gate("c", beats="b"), False, "with p below 0.05"),
        (Gate("c", beats="b", p=0.2), True, "+20.0 points against b"),
        (Gate("c", beats="a"), True, "+60.0 points against a"),  # not compared by the stage
        (Gate("b", beats="c"), False, "b does not beat c"),
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
        ({"metric": ["accuracy"], "min": 0.2}, "`$.metric`"),
        ({"metric": "pass@0", "min": 0.2}, "no metric 'pass@0'"),
        ({"metric": "accuracy"}, "`min`, `max` or both"),
        ({"metric": "accuracy", "min": "much"}, "`$.min`"),
        ({"metric": "accuracy", "min": float("nan")}, "`$.min`"),
        ({"metric": "accuracy", "min": 0.2, "model": "cold_strat"}, "did you mean 'cold_start'"),
        ({"beats": "bass"}, "did you mean 'base'"),
        ({"beats": "cold_start"}, "cannot beat itself"),
        ({"beats": "base", "min": 0.2}, "or else `beats`"),
        ({"beats": "base", "p": 5}, "`$.p`"),
        ({"metric": "accuracy", "minimum": 0.2}, "unknown key 'minimum'"),
        ({}, "give `metric`"),
        ("accuracy > 0.2", "got `str`"),
    ],
)
def test_a_gate_that_nothing_can_pass_is_refused_before_anything_runs(gate, found):
    with pytest.raises(InputError, match="key 'gate'") as caught:
        read_gates(gate, ("base", "cold_start"))
    assert found in str(caught.value)


def test_the_file_and_the_stage_of_a_wrong_gate_are_named(gated):
    gated.chain["stages"][0]["gate"] = {"metric": "accuracy", "min": 0.2}
    gated.save()
    with pytest.raises(
        InputError, match=r"chain\.yaml: stage cold_start: key 'gate': only a stage"
    ):
        load_chain("chain.yaml")
