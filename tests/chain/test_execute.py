"""A stage's process group: what a signal does to it, and whose exit code counts."""

import os
import signal
import threading
import time

import pytest

from chainforge.chain.execute import BOUNDED_SPIN, execute, redact_file
from chainforge.core.errors import Stopped

# Dies of a signal at once, as `accelerate launch` does, while what it launched saves its work.
LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2], sys.argv[3]]).wait()
"""
RECIPE = """
import pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
place = pathlib.Path(sys.argv[1])
place.joinpath("began").touch()
while not asked:
    time.sleep(0.01)
time.sleep(float(sys.argv[2]))
place.joinpath("saved").touch()
"""


def send_when(path, *numbers):
    """Send this process signals, half a second apart, once a file is there."""

    def send():
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    threading.Thread(target=send, daemon=True).start()


def launch(place, seconds):
    words = ["python", "-c", LAUNCHER, RECIPE, str(place), str(seconds)]
    return execute(words, place / "log.txt", lambda: None)


def test_a_stage_may_save_after_its_launcher_has_died(tmp_path):
    send_when(tmp_path / "began", signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"):
        launch(tmp_path, 1)
    assert (tmp_path / "saved").exists()


def test_a_second_signal_does_not_wait(tmp_path):
    send_when(tmp_path / "began", signal.SIGTERM, signal.SIGTERM)
    started = time.monotonic()
    with pytest.raises(Stopped, match="SIGTERM"):
        launch(tmp_path, 60)
    assert time.monotonic() - started < 30
    assert not (tmp_path / "saved").exists()


TORCHRUN = """
  rank      : 1 (local_rank: 1)
  exitcode  : {} (pid: 12)
Root Cause (first observed failure):
  rank      : 0 (local_rank: 0)
  exitcode  : {} (pid: 11)
"""


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ("", 7, 7),
        ("", 1, 1),
        ("Command '[...]' returned non-zero exit status 2.", 1, 2),
        ("Command '[...]' returned non-zero exit status 3.", 1, 3),
        ("Command '[...]' returned non-zero exit status 143.", 1, 143),
        (TORCHRUN.format(143, 143), 1, 143),
        (TORCHRUN.format(143, 1), 1, 1),  # the one that failed, not the one that it ended
        (TORCHRUN.format(-15, 2), 1, 2),
    ],
)
def test_the_recipes_exit_code_is_seen_through_its_launcher(tmp_path, words, code, expected):
    command = ["python", "-c", f"import sys; print({words!r}); sys.exit({code})"]
    assert execute(command, tmp_path / "log.txt", lambda: None) == expected


def test_what_a_launcher_wrote_is_redacted(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "c0f'fee\"c0f")
    log = tmp_path / "log.txt"
    log.write_bytes(b"\xff kept " + b"c0f'fee\"c0f" + b"\nof a launcher " + b"c0f'fee\"c0f" + b"\n")
    redact_file(log, start=7)
    assert log.read_bytes() == b"\xff kept [SOME_TOKEN]\nof a launcher [SOME_TOKEN]\n"


@pytest.mark.parametrize(("name", "found"), [("GOMP_SPINCOUNT", "9"), ("OMP_WAIT_POLICY", "None")])
def test_threads_of_a_stage_on_the_cpu_spin_a_bounded_time(tmp_path, monkeypatch, name, found):
    for variable in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(variable, raising=False)
    command = ["python", "-c", "import os; print(os.environ.get('GOMP_SPINCOUNT'))"]
    log = tmp_path / "log.txt"
    execute(command, log, lambda: None, on_cpu=True)
    monkeypatch.setenv(name, "9")  # the user's own setting stays alone
    execute(command, log, lambda: None, on_cpu=True)
    printed = [line for line in log.read_text().splitlines() if not line.startswith("$")]
    assert printed == [*BOUNDED_SPIN.values(), found]
