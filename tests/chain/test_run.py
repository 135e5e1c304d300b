"""Running a chain: what is done is skipped, what is stale made again, what was cut resumed."""

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from hubserver import HubServer

from chainforge.chain.run import _TimeLeft
from chainforge.core.artifacts import UPLOAD, write_json


def gone(number: int) -> bool:
    """Wait a while for a process to end."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(number)
        for _ in range(400):
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.05)
        return False
    return True


def test_a_chain_runs_and_then_has_nothing_to_do(workplace):
    text = workplace.chainforge("run", "chain.yaml", "--set", "cold_start.steps=5", "--until", "rl")
    assert "loss 0.20" in text
    assert "report: runs/fake/report.html" in text
    assert "cold_start" in workplace.report()
    before = {name: workplace.rows(name) for name in ("traces", "cold_start", "rl")}
    assert len(before["cold_start"]) == 5
    second = workplace.chainforge("run", "chain.yaml", "--set", "cold_start.steps=5")
    assert "all 3 stages are done" in second
    assert "running" not in second
    assert {name: workplace.rows(name) for name in before} == before
    log = (workplace.folder / "runs/fake/cold_start/log.txt").read_text()
    assert log.startswith("$ python count.py --config cold_start.yaml")


def test_what_is_stale_or_damaged_is_made_again_and_the_old_result_removed(workplace):
    workplace.run()
    for name in ("cold_start.old-1", "cold_start.old-of-mine"):  # the first by a run that was cut
        (workplace.folder / "runs/fake" / name).mkdir()
    untouched = workplace.rows("traces")
    workplace.configure("cold_start", steps=4)
    assert "steps: 3 -> 4" in workplace.chainforge("run", "chain.yaml")
    assert len(workplace.rows("cold_start")) == 4
    assert workplace.rows("traces") == untouched
    left = [path.name for path in (workplace.folder / "runs/fake").glob("*.old-*")]
    assert left == ["cold_start.old-of-mine"]
    (workplace.folder / "runs/fake/cold_start/model/config.json").unlink()
    assert "model/config.json is missing" in workplace.plan()["cold_start"].why[0]
    assert "is missing" in workplace.chainforge("run", "chain.yaml")
    assert set(workplace.states().values()) == {"done"}
    shutil.copytree("runs", "copy", copy_function=shutil.copyfile)  # with new times
    assert {step.state for step in workplace.plan("copy").values()} == {"done"}
    (workplace.folder / "copy/fake/cold_start/samples.jsonl").write_text("")
    step = workplace.plan("copy")["cold_start"]
    assert step.state == "stale"
    assert "samples.jsonl is not what was signed" in step.why[0]


def test_an_old_result_survives_a_failure_and_comes_back_with_its_settings(workplace):
    workplace.run()
    before = workplace.rows("cold_start")
    workplace.configure("cold_start", steps=4)
    workplace.chainforge("run", "chain.yaml", expect=1, FAKE_FAIL="cold_start")
    assert workplace.states()["cold_start"] == "failed"
    workplace.configure("cold_start", steps=3)
    assert "is used again" in workplace.chainforge("run", "chain.yaml")
    assert workplace.rows("cold_start") == before
    assert set(workplace.states().values()) == {"done"}


def flip_unseen(path):
    """Flip a bit, and give the file its time back, as bit rot does."""
    state, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_flipped_bit_is_found_once_a_run_and_the_stage_is_rerun(workplace):
    workplace.run()
    model = workplace.folder / "runs/fake/cold_start/model/config.json"
    whole = model.read_bytes()
    flip_unseen(model)
    words = ["--output_dir", "mine", "--model_name_or_path", "runs/fake/cold_start/model"]
    command = [sys.executable, "count.py", *words]
    by_hand = subprocess.run(command, capture_output=True, text=True)
    assert by_hand.returncode == 2
    assert "model/config.json is not what was signed" in by_hand.stderr
    refused = workplace.chainforge("run", "chain.yaml", "--from", "rl", expect=2)
    assert "cold_start is needed, but model/config.json is not what was signed" in refused
    text = workplace.chainforge("run", "chain.yaml")
    assert "stale: runs/fake/cold_start/model/config.json is not what was signed" in text
    assert model.read_bytes() == whole
    assert "stale" not in workplace.chainforge("run", "chain.yaml")


def test_a_stage_that_was_killed_resumes_and_ends_like_an_undisturbed_one(workplace):
    chain = workplace.start("run", "chain.yaml", FAKE_STOP_AT="cold_start:2")
    recipe = workplace.wait_for_rows("cold_start", 2)
    os.kill(recipe, signal.SIGKILL)
    _, err = chain.communicate(timeout=30)
    assert chain.returncode == 1
    assert "SIGKILL" in err
    shown = workplace.chainforge("show", "chain.yaml")
    assert "failed: was ended by SIGKILL (out of memory?)" in shown
    assert "log.txt" in err
    assert workplace.states() == {"traces": "done", "cold_start": "failed", "rl": "pending"}
    assert workplace.plan()["cold_start"].why == ["from 2 rows"]
    workplace.run()
    processes = [row["process"] for row in workplace.rows("cold_start")]
    assert processes[:2] == [recipe, recipe]
    assert processes[2] != recipe
    undisturbed = {name: workplace.fingerprint(name) for name in ("cold_start", "rl")}
    workplace.run(runs="again")
    for name, fingerprint in undisturbed.items():
        manifest = (workplace.folder / "again/fake" / name / "manifest.json").read_text()
        assert fingerprint in manifest


@pytest.mark.parametrize("steps", [3, 5])
def test_killing_the_chain_leaves_nothing_running_and_other_settings_start_again(workplace, steps):
    chain = workplace.start("run", "chain.yaml", FAKE_STOP_AT="cold_start:2")
    recipe = workplace.wait_for_rows("cold_start", 2)
    text = workplace.chainforge("run", "chain.yaml", expect=2)  # refused while the first works
    assert f"in use by process {chain.pid} on" in text
    chain.kill()
    chain.communicate()
    assert gone(recipe)
    workplace.configure("cold_start", steps=steps)
    if steps != 3:
        assert workplace.states()["cold_start"] == "pending"
        assert "set aside" in workplace.plan()["cold_start"].why[0]
    workplace.run()
    rows = workplace.rows("cold_start")
    assert [row["step"] for row in rows] == list(range(steps))
    assert (rows[0]["process"] == recipe) == (steps == 3)


def test_what_a_kill_kept_from_being_sent_is_sent(workplace, tmp_path):
    workplace.run()
    order = workplace.folder / "runs/fake/cold_start" / UPLOAD
    write_json(order, {"hub_model_id": "me/cold_start", "hub_private_repo": True})
    with HubServer() as hub:
        text = workplace.chainforge("run", "chain.yaml", **hub.environment(tmp_path / "hf"))
        assert json.loads(hub.files("me/cold_start")["config.json"]) == {"steps": 3}
    assert "all 3 stages are done" in text
    assert not order.exists()


STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), STOPS)
def test_a_stop_reaches_the_stage_and_says_how_to_resume(workplace, number, code):
    chain = workplace.start("run", "chain.yaml", FAKE_STOP_AT="cold_start:2")
    recipe = workplace.wait_for_rows("cold_start", 2)
    chain.send_signal(number)
    _, err = chain.communicate(timeout=30)
    assert chain.returncode == code
    assert "run the same command again" in err
    assert gone(recipe)
    workplace.run()


def test_how_a_stage_ends_is_one_message_and_the_chains_exit_code(workplace):
    # A scheduler may signal the processes of a job one by one, the stage before the chain.
    text = workplace.chainforge("run", "chain.yaml", expect=143, FAKE_SIGNAL="cold_start")
    assert "stopped: stage cold_start by SIGTERM after step 2 of 3" in text
    assert workplace.states()["cold_start"] == "resumable"
    text = workplace.chainforge("run", "chain.yaml", expect=1, FAKE_FAIL="cold_start")
    assert "failed: RuntimeError: the loss is not a number" in text
    assert "runs/fake/cold_start/log.txt" in text
    assert workplace.states()["rl"] == "pending"
    workplace.configure("cold_start", wrong="three")
    text = workplace.chainforge("run", "chain.yaml", expect=2)
    assert "error: stage cold_start: steps: three\n  line 3: not a number" in text
    assert not (workplace.folder / "runs/fake/cold_start/manifest.json").exists()
    del workplace.chain["launch"]  # and the same through accelerate
    workplace.save()
    text = workplace.chainforge("run", "chain.yaml", "--from", "cold_start", expect=2)
    assert "error: stage cold_start: steps: three" in text
    assert "CalledProcessError" not in text


def test_force_and_from_choose_what_runs(workplace):
    workplace.run(until="cold_start")
    before = workplace.rows("cold_start")
    workplace.run(force=True, from_="cold_start", until="cold_start")
    assert workplace.rows("cold_start") != before
    before = workplace.rows("cold_start")
    workplace.configure("cold_start", steps=9)
    text = workplace.chainforge("run", "chain.yaml", "--from", "rl", "--seed", "8")
    assert "the stages from rl on are done" in text
    assert workplace.rows("cold_start") == before
    assert "--seed 8" in (workplace.folder / "runs/fake/rl/log.txt").read_text()
    for words, found in (
        (("--from", "rl", "--runs", "new"), "cold_start is needed, but it is not done"),
        (("--from", "cold_strat"), "did you mean 'cold_start'"),
        (("--from", "rl", "--until", "cold_start"), "nothing to run"),
        (("--runs", "chain.yaml"), "chain.yaml is a file"),
    ):
        assert found in workplace.chainforge("run", "chain.yaml", *words, expect=2)


def test_a_folder_that_is_no_stage_is_left_alone(workplace):
    mine = workplace.folder / "runs/fake/cold_start/thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    text = workplace.chainforge("run", "chain.yaml", expect=2)
    assert "thesis.txt" in text
    assert mine.read_text() == "years of work"


def test_a_secret_reaches_no_file_and_no_terminal(workplace):
    """One in the chain is refused unseen; one that a library prints is left out of the log."""
    value = "s3cr3t-of-mine"
    (workplace.folder / "cold_start.yaml").write_text(f"steps: 3\nhub_token: {value}\n")
    for words in (("run", "chain.yaml"), ("plan", "chain.yaml")):
        text = workplace.chainforge(*words, expect=2)
        assert "cold_start.yaml: hub_token: a secret must not be in a file" in text
        assert value not in text
    assert not list(workplace.folder.glob("runs/**/log.txt"))
    workplace.configure("cold_start", steps=3)
    words = ("--set", f"cold_start.hub_token={value}")
    assert value not in workplace.chainforge("run", "chain.yaml", *words, expect=2)
    script = workplace.folder / "count.py"
    spill = "print(repr(os.environ['DB_PASS']))\n    os.write(2, os.environb[b'DB_PASS'])\n"
    raising = "raise RuntimeError(os.environ['DB_PASS'])"
    text = script.read_text().replace("def main():", f"def main():\n    {spill}    {raising}")
    script.write_text(text)
    text = workplace.chainforge("run", "chain.yaml", expect=1, DB_PASS=f"{value}\nand-more-of-it")
    assert "RuntimeError: [DB_PASS]" in text
    found = [path for path in workplace.folder.rglob("*") if path.is_file()]
    assert workplace.folder / "runs/fake/report.html" in found
    for data in (text.encode(), *(path.read_bytes() for path in found)):
        assert value.encode() not in data.replace(b"hub_token: " + value.encode(), b"")
        assert b"and-more-of-it" not in data


LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, 'inner.py', *sys.argv[1:]])"
SAVING = """
        def save(number, frame):
            time.sleep(8)
            open(stage.path("saved"), "w").close()
            sys.exit(128 + number)
        import signal
        signal.signal(signal.SIGTERM, save)
        path = stage.path("samples.jsonl")
"""


@pytest.mark.parametrize("killed", ["the launcher", "the chain"])
def test_a_stage_whose_launcher_was_killed_saves_and_is_not_signed(workplace, killed):
    script = workplace.folder / "count.py"
    mark = '        path = stage.path("samples.jsonl")\n'
    (workplace.folder / "inner.py").write_text(script.read_text().replace(mark, SAVING[1:]))
    script.write_text(LAUNCHER)
    chain = workplace.start("run", "chain.yaml", FAKE_STOP_AT="traces:2")
    recipe = workplace.wait_for_rows("traces", 2)
    launcher = psutil.Process(recipe).ppid()
    os.kill(launcher if killed == "the launcher" else chain.pid, signal.SIGKILL)
    second = workplace.chainforge("run", "chain.yaml", expect=2)  # while it saves
    assert "in use by process" in second
    assert f"process {recipe} " in second or killed == "the launcher"
    chain.communicate(timeout=60)
    assert gone(recipe)
    assert (workplace.folder / "runs/fake/traces/saved").exists()
    assert (workplace.folder / "runs/fake/traces/stage.json").exists()
    assert not (workplace.folder / "runs/fake/traces/manifest.json").exists()


def test_a_terminal_that_is_closed_stops_a_stage_in_good_order(workplace):
    master, terminal = pty.openpty()
    chain = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, termios, chainforge.cli as cli\n"
         "fcntl.ioctl(0, termios.TIOCSCTTY, 0); cli.main()", "run", "chain.yaml"],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        cwd=workplace.folder, env=os.environ | {"FAKE_STOP_AT": "cold_start:2"},
    )  # fmt: skip
    os.close(terminal)
    recipe = workplace.wait_for_rows("cold_start", 2)
    os.close(master)
    assert chain.wait(timeout=60) == 129
    assert gone(recipe)
    assert workplace.states()["cold_start"] == "resumable"


FULL = {
    "report": ("report", "runs/fake"),
    "new": ("new", "mine", "--from", "custom"),
    "export": ("export", "runs/fake/cold_start", "--what", "model", "--to", "./out"),
    "a first run": ("run", "chain.yaml", "--runs", "first"),
    "a run": ("run", "chain.yaml", "--force"),
}


@pytest.mark.parametrize("words", FULL.values(), ids=FULL)
def test_a_full_disk_is_one_message_and_leaves_no_half_files(workplace, words):
    """The kernel refuses files beyond 100 bytes, as it does on a full disk."""
    workplace.run(until="cold_start")
    (workplace.folder / "runs/fake/cold_start/model/model.safetensors").write_bytes(bytes(500))
    (workplace.folder / "runs/fake/cold_start/manifest.json").unlink()
    (workplace.folder / "runs/fake/cold_start/stage.json").unlink()
    words = [word.replace("fake/cold_start", "fake/cold_start/model") for word in words]
    before = set(workplace.folder.rglob("*"))
    code = (
        "import resource, sys; import chainforge.cli as cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); cli.main()"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no room to write" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    made = {path.name for path in set(workplace.folder.rglob("*")) - before}
    assert not [name for name in made if name.endswith((".tmp", ".part"))]
    assert not made & {"mine", "out"}


def test_the_time_left_is_that_of_what_this_run_has_done():
    left = _TimeLeft()
    told = [left(done, 40, now) for done, now in ((20, 0), (20, 10), (22, 12), (30, 20), (40, 30))]
    assert told == ["", "", "about 18 s left", "about 10 s left", ""]
    assert left(2, 40, 40) == ""  # begun again
