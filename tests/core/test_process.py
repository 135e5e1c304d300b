import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chainforge.core import process
from chainforge.core.errors import Failed, InputError, Stopped
from chainforge.core.process import check_started


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("seed: no number"), 2, "error: seed: no number\n"),
        (Stopped("by max_usd"), 3, "stopped: by max_usd\n"),
        (Stopped("by SIGTERM", 143), 143, "stopped: by SIGTERM\n"),
        (KeyboardInterrupt(), 128 + signal.SIGINT, "stopped: by SIGINT\n"),
        (Failed("nothing was learnt"), 1, "failed: nothing was learnt\n"),
        (OSError(28, "No space left on device"), 1, "failed: no room to write a file, probably"),
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


ROOT = Path(__file__).parents[2]
LAUNCHED = {"ACCELERATE_DYNAMO_MODE": "default"}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "outside"),
    [
        ({}, {}),  # plain python
        (MEETING, {}),  # plain python in a shell that names a meeting point
        (LAUNCHED, {}),  # asked for one
        (LAUNCHED | MEETING | {"WORLD_SIZE": "2"}, {}),  # torchrun
        (LAUNCHED | MEETING | {"PMI_SIZE": "2"}, {}),  # mpirun
        (LAUNCHED | MEETING, MEETING),  # asked for one, in a shell that names a meeting point
    ],
)
def test_what_was_asked_for_was_started(environment, outside):
    check_started(environment, outside)


def test_accelerate_on_the_cpu_is_found_out(tmp_path):
    script = tmp_path / "recipe.py"
    script.write_text(
        "from chainforge.core import process\nprocess.run(lambda: print('at work', flush=True))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
    done = subprocess.run(
        [*command, "--num_processes", "2", str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "started one" in done.stderr
    assert "returned non-zero exit status 2." in done.stderr
    assert "at work" not in done.stdout
