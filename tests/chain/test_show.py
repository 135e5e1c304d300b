"""Showing a chain: its lineage and states, for people and for machines."""

import json


def table(text):
    """Return the lines of the lineage, by stage."""
    lines = [line.rstrip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.endswith("─"))
    rows = lines[start + 1 : lines.index("", start)]
    return {line.split()[0]: line for line in rows}


def test_lineage_and_states_are_shown_within_80_columns(workplace):
    assert workplace.chainforge("show", "chain.yaml").count("pending") == 3
    assert not (workplace.folder / "runs").exists()
    workplace.run(until="cold_start")
    shown = json.loads(workplace.chainforge("show", "chain.yaml", "--json"))
    assert (shown["name"], shown["running"]) == ("fake", None)
    traces, cold_start, rl = shown["stages"]
    assert (cold_start["from"], cold_start["state"]) == (["base", "traces"], "done")
    assert cold_start["metrics"] == {"steps": 3}
    assert cold_start["signed"] == cold_start["fingerprint"]
    assert traces["from"] == []
    assert (rl["state"], rl["signed"], rl["log"]) == ("pending", None, [])
    long = {"a_setting_with_a_very_long_name": "and quite a long value too"}
    workplace.configure("cold_start", steps=4, **long)
    text = workplace.chainforge("show", "chain.yaml")
    assert all(len(line) <= 80 for line in text.splitlines())
    lines = table(text)
    assert "done" in lines["traces"]
    assert "base, traces" in lines["cold_start"]
    assert "stale" in lines["cold_start"]
    assert "pending" in lines["rl"]
    why = " ".join(text.partition("cold_start stale:")[2].split())
    assert why.startswith("a_setting_with_a_very_long_name: not set -> and quite a long value")
    assert "steps: 3 -> 4" in why


def test_a_stage_at_work_shows_its_progress_and_a_failed_one_its_log(workplace):
    chain = workplace.start("run", "chain.yaml", FAKE_STOP_AT="cold_start:2")
    workplace.wait_for_rows("cold_start", 2)
    text = workplace.chainforge("show", "chain.yaml")
    assert "running" in table(text)["cold_start"]
    assert "2 of 3" in text
    assert f"process {chain.pid} on" in text
    stages = json.loads(workplace.chainforge("show", "chain.yaml", "--json"))["stages"]
    assert (stages[1]["state"], stages[1]["progress"]["done"]) == ("running", 2)
    assert "while the chain runs" in workplace.report(write=True)
    chain.kill()
    chain.communicate()

    text = workplace.chainforge("run", "chain.yaml", expect=1, FAKE_FAIL="cold_start")
    assert "report: runs/fake/report.html" in text
    assert "the loss is not a number" in workplace.report()
    text = workplace.chainforge("show", "chain.yaml")
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "failed" in table(text)["cold_start"]
    assert "cold_start failed:" in text
    assert text.rstrip().endswith("failed: RuntimeError: the loss is not a number")
    stages = json.loads(workplace.chainforge("show", "chain.yaml", "--json"))["stages"]
    assert [stage["state"] for stage in stages] == ["done", "failed", "pending"]
    assert stages[1]["log"][-1] == "failed: RuntimeError: the loss is not a number"
