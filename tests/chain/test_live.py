"""A running chain's report is kept up to date, and never costs the chain anything."""

import pytest

from chainforge.chain import live
from chainforge.chain.live import LiveReport
from chainforge.core.artifacts import write_json


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "FIRST_SECONDS", 0.0)
    write_json(
        tmp_path / "chain.json", {"name": "x", "stages": [{"name": "cold", "recipe": "sft"}]}
    )
    told: list[str] = []
    one = LiveReport(tmp_path, told.append)
    one.told = told
    return one


def page(report):
    return report.directory / "report.html"


def test_it_is_written_while_a_stage_works_and_not_too_often(report):
    report.begin()
    report.look()
    report._thread.join()
    assert "not started" in page(report).read_text()
    page(report).unlink()
    report.look()  # too soon after the first
    assert report._thread.is_alive() is False
    assert not page(report).exists()
    report.write()
    assert page(report).exists()
    assert report.told == []


def test_a_broken_file_is_told_and_stops_nothing(report):
    (report.directory / "cold").mkdir()
    (report.directory / "cold/metrics.jsonl").write_text("{\n{}\n")
    report.begin()
    report.look()
    report.write()
    assert len(report.told) == 2
    assert all("metrics.jsonl" in text for text in report.told)
    assert not page(report).exists()
