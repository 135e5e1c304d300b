"""What a stage was made from, told by its manifest and by those of the stages around it."""

import shutil

import finished as runs
import pytest

from chainforge.core.artifacts import read_json, write_json
from chainforge.core.errors import InputError
from chainforge.hub.cards import measurements
from chainforge.hub.lineage import base_of, lineage, roots


@pytest.fixture
def run(made, tmp_path):
    """The finished run, to be spoilt."""
    return shutil.copytree(made, tmp_path / "moved/full")


def names(folder):
    return [stage.name for stage in lineage(folder)]


def test_a_moved_run_is_known_by_its_fingerprints(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    student = lineage(run / "student")
    oldest = ["traces", "cold", "reason", "picks", "mixed", "final", "lessons", "student"]
    assert [stage.name for stage in student] == oldest
    assert {stage.directory.parent for stage in student} == {run}
    took = {role: (one.kind, one.name) for role, one in student[-1].took.items()}
    assert took == {"model": ("hub", "Qwen/Qwen2.5-0.5B"), "data.0": ("stage", "lessons")}
    begin = base_of(lineage(run / "final"))
    assert (begin.kind, begin.name.rpartition("/")[2]) == ("path", "begin")
    assert base_of(lineage(run / "traces")) is None
    assert {one.name for one in roots(student)} == {begin.name, "Qwen/Qwen2.5-0.5B"}


def test_a_stage_of_another_run_is_found_where_the_path_leads(made, tmp_path):
    runs.stage(tmp_path / "alone", "sft", model=made / "final/model")
    assert names(tmp_path / "alone")[-3:] == ["mixed", "final", "alone"]


def test_what_is_gone_or_was_made_again_is_left_as_its_path(run):
    shutil.rmtree(run / "picks")
    assert names(run / "mixed") == ["traces", "mixed"]
    assert lineage(run / "mixed")[-1].took["data.0"].kind == "path"
    (run / "mixed/manifest.json").write_text('{"name": "of another program"}')
    assert names(run / "final") == ["final"]
    assert base_of(lineage(run / "final")).name.endswith("mixed/model")


def test_an_evaluation_counts_by_the_model_and_not_by_its_name(run):
    """By hand, after the chain, beside the run, under another name."""
    runs.stage(run.parent / "gsm8k", "evaluate", measured={"mine": run / "final/model"})
    own, beside = measurements(lineage(run / "final"))
    assert (own.name, own.own) == ("scores", {"final"})
    assert (beside.name, beside.own) == ("gsm8k", {"mine"})
    assert [row["name"] for row in own.rows] == ["base", "cold", "reason", "mixed", "final"]


@pytest.mark.parametrize("key", ["fingerprint", "finished"])
def test_a_model_that_was_made_again_was_not_measured(run, key):
    manifest = read_json(run / "final/manifest.json")
    write_json(run / "final/manifest.json", manifest | {key: "2999-01-01T00:00:00Z"})
    assert measurements(lineage(run / "final")) == []


def test_figures_that_nobody_signed_are_not_told(run):
    path = run / "scores/results.json"
    path.write_text(path.read_text().replace("0.1", "0.9"))
    with pytest.raises(InputError, match=r"results.json is not what the stage signed"):
        measurements(lineage(run / "final"))
    write_json(run / "picks/funnel.json", {"in": 1, "kept": 1, "dropped": {}})
    with pytest.raises(InputError, match="run picks again"):
        lineage(run / "picks")[-1].signed("funnel.json")
