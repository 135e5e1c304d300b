import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chainforge.core import process
from chainforge.core.errors import Failed, InputError, Stopped


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("seed: no number"), 2, "error: seed: no number\n"),
        (Stopped("by max_usd"), 3, "stopped: by max_usd\n"),
        (Stopped("by SIGTERM", 143), 143, "stopped: by SIGTERM\n"),
        (KeyboardInterrupt(), 128 + signal.SIGINT, "stopped: by SIGINT\n"),
        (Failed("nothing was learnt"), 1, "failed: nothing was learnt\n"),
        (OSError(28, "No space left on device"), 1, "failed: no room to write a file"),
        (KeyError("x"), 1, "Traceback"),
    ],
)
def test_a_recipe_ends_with_one_message_and_its_own_code(capsys, error, code, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as leaving:
        process.run(main)
    assert leaving.value.code == code
    text = capsys.readouterr().err
    assert text.startswith(words)
    assert ("Traceback" in text) == isinstance(error, KeyError)


SCRATCH = """
import pathlib, sys
from chainforge.core.process import scratch
folder = scratch(pathlib.Path(sys.argv[1]))
(folder / "rows.arrow").touch()
print(folder, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_scratch_folder_is_removed_when_its_process_ends(tmp_path, number):
    words, pipe = [sys.executable, "-c", SCRATCH, str(tmp_path / "cache")], subprocess.PIPE
    process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True)
    folder = Path(process.stdout.readline().strip())
    assert (folder.parent, folder.joinpath("rows.arrow").exists()) == (tmp_path / "cache", True)
    if number:
        process.send_signal(number)
    process.communicate("")
    deadline = time.monotonic() + 60
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not folder.exists()
