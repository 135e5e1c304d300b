"""What each stage is worth: one is left out at a time, and the others go on from what there is."""

import json
import re

import pytest

from chainforge.chain.ablate import _variant, ablate
from chainforge.chain.spec import load_chain
from chainforge.core.errors import InputError
from chainforge.core.paths import shipped


@pytest.fixture
def trained(gated):
    """Three stages that train, the second of which needs the first, and what measures them."""
    steps = {"first": {"steps": 4}, "second": {"steps": 6, "needs": 3}, "third": {"steps": 5}}
    before = ["base", *steps]
    stages = [
        {"name": name, "recipe": "count.py", "model": model, "set": settings}
        for (name, settings), model in zip(steps.items(), before, strict=False)
    ]
    judge = {"name": "eval", "recipe": "measure.py", "models": before, "gate": {"beats": "base"}}
    gated.chain["stages"] = [*stages, judge]
    gated.save()
    return gated


def test_each_stage_is_left_out_and_what_cannot_work_is_said(trained):
    runs = trained.folder / "runs"
    found = ablate(load_chain("chain.yaml"), runs)
    # Without a stage, the next one starts from the stage before it. Without the first, it fails.
    accuracy = {model["name"]: model["strict"]["mean"] for model in found["models"]}
    assert accuracy == {"third": 0.75, "without second": 0.45, "without third": 0.5}
    assert found["failed"] == {"without first": "second: it earned no reward in 50 steps"}
    second = found["pairs"][0]
    assert (second["from"], second["to"]) == ("without second", "third")
    assert second["low"] < second["difference"] == 0.3 < second["high"]
    assert (
        second["seconds"] == json.loads((runs / "fake/second/manifest.json").read_text())["seconds"]
    )
    page = " ".join(trained.report().split())
    assert "What each stage is worth" in page
    assert re.search("without first.*it earned no reward in 50 steps", page)
    # Nothing is made twice: not what the whole chain has, nor by the same command again.
    assert (runs / "fake-ablation/without_second/first").samefile(runs / "fake/first")
    assert not (runs / "fake-ablation/without_third").exists()
    made = {path: path.stat().st_mtime_ns for path in runs.rglob("manifest.json")}
    assert "points/hour" in trained.chainforge("ablate", "chain.yaml", "--without", "second")
    assert json.loads((runs / "fake-ablation/results.json").read_text())["pairs"] == [second]
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("manifest.json")} == made


def test_a_stage_that_the_final_model_does_not_need_is_refused(trained):
    trained.chain["stages"][3] |= {"models": ["base", "second"]}
    trained.save()
    with pytest.raises(InputError, match="--without third: second is made without it, from first"):
        ablate(load_chain("chain.yaml"), trained.folder / "runs", ["third"])
    trained.chain["stages"].pop()
    trained.save()
    with pytest.raises(InputError, match=r"chain\.yaml: no stage measures a model"):
        ablate(load_chain("chain.yaml"), trained.folder / "runs")


def test_a_stage_that_writes_rows_alone_is_no_model_to_go_on_from(trained):
    stages = trained.chain["stages"]
    stages[0] = {"name": "rows", "recipe": "count.py"}
    stages[1] |= {"model": "base", "data": "rows"}
    trained.chain["stages"] = [*stages[:3], stages[3] | {"models": ["base", "second", "third"]}]
    trained.save()
    chain = load_chain("chain.yaml")
    for out in ("rows", "second"):
        variant, *_ = _variant(chain, out, "third", chain.stage("eval"))
        assert [stage.model for stage in variant.stages if stage.name == "third"] == ["base"]


@pytest.mark.parametrize(
    ("out", "gone", "stages", "starts"),
    [
        ("cold_start", "cold_start", "traces rl rejection sft2 rl_final eval", {"rl": "base"}),
        ("rl", "rl", "traces cold_start rejection sft2 rl_final eval", {"rejection": "cold_start"}),
        ("rejection", "rejection cold_start rl", "traces sft2 rl_final eval", {"sft2": "base"}),
        # The final RL continues from the first RL model, not from the base.
        ("sft2", "sft2 rejection", "traces cold_start rl rl_final eval", {"rl_final": "rl"}),
        ("traces", "traces cold_start", "rl rejection sft2 rl_final eval", {"rl": "base"}),
        ("rl_final", "rl_final", "", {}),  # what is left has been measured by the chain itself
    ],
)
def test_the_quickstart_is_rewired(out, gone, stages, starts):
    chain = load_chain(shipped("recipes") / "quickstart/chain.yaml")
    variant, final, without = _variant(chain, out, "rl_final", chain.stage("eval"))
    assert without == gone.split()
    assert final == ("rl_final" if out != "rl_final" else "sft2")
    assert [stage.name for stage in variant.stages] == stages.split()
    assert starts.items() <= {stage.name: stage.model for stage in variant.stages}.items()
    sent = {stage.settings.get("push_to_hub") for stage in variant.stages if stage.kind.trains}
    assert sent <= {False}  # the whole chain's model keeps its place there
