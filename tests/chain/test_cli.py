"""The command line: help, versions, exit codes, and how soon it answers."""

import json
import subprocess
import sys

import chainforge
from chainforge.chain.spec import find_chain
from chainforge.core.paths import shipped


def test_help_and_version(workplace):
    text = workplace.chainforge("--help")
    for command in ("plan", "run", "show", "check", "doctor", "report", "merge", "export", "new"):
        assert command in text
    assert workplace.chainforge("--version").strip() == f"chainforge {chainforge.__version__}"


def test_a_misspelt_command_or_option_is_wrong_input(workplace):
    assert "plan" in workplace.chainforge("plna", "chain.yaml", expect=2)
    workplace.chainforge("plan", "chain.yaml", "--jsn", expect=2)
    workplace.chainforge("run", expect=2)


def test_wrong_input_is_one_message(workplace):
    workplace.chain["stages"][1]["model"] = "bsae"
    workplace.save()
    for command in ("plan", "run", "show"):
        text = workplace.chainforge(command, "chain.yaml", expect=2)
        assert text.startswith("error: chain.yaml: stage cold_start: ")
        assert "did you mean 'base'" in text
    assert not (workplace.folder / "runs").exists()


def test_a_run_ends_with_the_table_and_the_report(gated):
    gated.chain["stages"][1].pop("gate")
    gated.save()
    for _ in range(2):
        text = gated.chainforge("run", "chain.yaml")
        assert "all 3 stages are done" in text
        flat = " ".join(text.replace("\u00a0", " ").split())
        assert "20 held-out rows" in flat
        assert "cold_start 60.0 (38.7 to 78.1)" in flat
        assert "base cold_start +50.0" in flat
        assert text.rstrip().endswith("report: runs/fake/report.html")
        assert all(len(line) <= 80 for line in text.splitlines())


def test_a_report_and_a_shipped_chain_are_found_by_name(workplace):
    workplace.run(until="traces")
    assert workplace.chainforge("report", "runs/fake").strip() == "runs/fake/report.html"
    assert "no such run" in workplace.chainforge("report", "runs/none", expect=2)
    assert find_chain("quickstart") == shipped("recipes") / "quickstart/chain.yaml"
    assert "did you mean 'quickstart'" in workplace.chainforge("plan", "quikstart", expect=2)


def test_planning_needs_no_torch(workplace):
    code = (
        "import sys\n"
        "from chainforge import cli\n"
        "from chainforge.chain import plan, run, show\n"
        "from chainforge.chain.spec import load_chain\n"
        "plan.plan_chain(load_chain('chain.yaml'), 'runs')\n"
        "run.run_chain(load_chain('chain.yaml'), 'runs')\n"
        "import json; print(json.dumps(sorted(sys.modules)))"
    )
    workplace.run()
    words, options = [sys.executable, "-c", code], {"capture_output": True, "text": True}
    done = subprocess.run(words, cwd=workplace.folder, check=True, **options)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "transformers", "trl", "datasets", "scipy", "matplotlib"}


def test_the_report_is_watched_from_another_terminal(workplace, monkeypatch):
    chain = workplace.start("run", "chain.yaml", FAKE_STOP_AT="cold_start:2")
    workplace.wait_for_rows("cold_start", 2)
    watching = workplace.start("report", "runs/fake", "--watch")
    assert watching.stdout.readline() == "runs/fake/report.html\n"
    assert watching.stdout.readline() == "1 of 3 stages done, cold_start running 2 of 3 steps\n"
    assert "while the chain runs" in workplace.report()
    chain.kill()
    chain.communicate()
    out, err = watching.communicate(timeout=60)
    assert (watching.returncode, err) == (0, "")
    assert out.splitlines()[-1].endswith("not running")
    assert "while the chain runs" not in workplace.report()
