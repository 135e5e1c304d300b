"""Showing a chain: its lineage and states, for people and for machines."""

import json


def table(text):
    """Return the lines of the lineage, by stage."""
    lines = [line.rstrip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.endswith("─"))
    rows = lines[start + 1 : lines.index("", start)]
    return {line.split()[0]: line for line in rows}


def test_the_table_shows_lineage_and_state_within_80_columns(workplace):
    workplace.run(until="cold")
    workplace.configure(
        "cold", steps=4, a_setting_with_a_very_long_name="and quite a long value too"
    )
    text = workplace.chainforge("show", "chain.yaml")
    assert all(len(line) <= 80 for line in text.splitlines())
    lines = table(text)
    assert "done" in lines["traces"]
    assert "base, traces" in lines["cold"]
    assert "stale" in lines["cold"]
    assert "pending" in lines["reason"]
    why = " ".join(text.partition("stale, and made again by the next run:")[2].split())
    assert why.startswith("cold a_setting_with_a_very_long_name: not set -> and quite a long value")
    assert "steps: 3 -> 4" in why


def test_json_says_what_the_table_says_and_more(workplace):
    workplace.run(until="cold")
    shown = json.loads(workplace.chainforge("show", "chain.yaml", "--json"))
    assert shown["name"] == "fake"
    assert shown["running"] is None
    traces, cold, reason = shown["stages"]
    assert (cold["from"], cold["state"], cold["metrics"]) == (
        ["base", "traces"],
        "done",
        {"steps": 3},
    )
    assert cold["signed"] == cold["fingerprint"]
    assert traces["from"] == []
    assert (reason["state"], reason["signed"], reason["log"]) == ("pending", None, [])


def test_a_stage_at_work_shows_its_progress_and_a_failed_one_its_log(workplace):
    chain = workplace.start("run", "chain.yaml", FAKE_STOP_AT="cold:2")
    workplace.wait_for_rows("cold", 2)
    text = workplace.chainforge("show", "chain.yaml")
    assert "running" in table(text)["cold"]
    assert "67%, 2 of 3" in table(text)["cold"]
    assert f"process {chain.pid} on" in text
    stages = json.loads(workplace.chainforge("show", "chain.yaml", "--json"))["stages"]
    assert (stages[1]["state"], stages[1]["progress"]["done"]) == ("running", 2)
    assert 0 <= stages[1]["seconds"] < 600
    assert "while the chain runs" in workplace.report(write=True)
    chain.kill()
    chain.communicate()

    text = workplace.chainforge("run", "chain.yaml", expect=1, FAKE_FAIL="cold")
    assert "report: runs/fake/report.html" in text
    assert "the loss is not a number" in workplace.report()
    text = workplace.chainforge("show", "chain.yaml")
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "failed" in table(text)["cold"]
    assert "after 3 of 3 steps" in " ".join(text.split())
    assert "cold failed; runs/fake/cold/log.txt ends:" in text
    assert text.rstrip().endswith("failed: RuntimeError: the loss is not a number")
    stages = json.loads(workplace.chainforge("show", "chain.yaml", "--json"))["stages"]
    assert [stage["state"] for stage in stages] == ["done", "failed", "pending"]
    assert stages[1]["log"][-1] == "failed: RuntimeError: the loss is not a number"


def test_a_chain_that_never_ran_can_be_shown(workplace):
    assert workplace.chainforge("show", "chain.yaml").count("pending") == 3
    assert not (workplace.folder / "runs").exists()
