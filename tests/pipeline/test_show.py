"""Showing a chain: its lineage and states, for people and for machines."""

import json


def test_the_table_shows_lineage_and_state_within_80_columns(workplace):
    workplace.run(until="cold")
    workplace.configure(
        "cold", steps=4, a_setting_with_a_very_long_name="and quite a long value too"
    )
    text = workplace.chainforge("show", "chain.yaml")
    assert all(len(line) <= 80 for line in text.splitlines())
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "done" in lines["traces"]
    assert "base, traces" in lines["cold"]
    assert "stale" in lines["cold"]
    assert "to run" in lines["reason"]


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
    assert (reason["state"], reason["signed"]) == ("to run", None)


def test_a_chain_that_never_ran_can_be_shown(workplace):
    assert workplace.chainforge("show", "chain.yaml").count("to run") == 3
    assert not (workplace.folder / "runs").exists()
