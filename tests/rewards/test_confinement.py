# ruff: noqa: SIM115
"""What the kernel takes from a verifying process: attack code runs there, and gets nowhere."""

import ctypes
import errno
import os
import socket
import subprocess
import sys

import pytest

from chainforge.rewards.confinement import _CALLS, _HARMLESS_IF, confine, gaps

pytestmark = pytest.mark.skipif(sys.platform != "linux" or gaps() != [], reason="other kernel")

SECRET = "hf_" + "s" * 30


@pytest.fixture
def place(tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    return tmp_path


def confined(act, *given):
    """Run `act` in a forked, confined process; return what it said, or how it ended."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "nothing"
        try:
            confine(1024**3)
            said = f"did it: {act(*given)}"
        except BaseException as error:
            said = type(error).__name__
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read().decode()
    os.waitpid(pid, 0)
    return said


ATTACKS = {
    "write": lambda place: open(place / "new", "w").write("x"),
    "remove": lambda place: os.remove(place / "secret"),
    "rename": lambda place: os.rename(place / "secret", place / "moved"),
    "directory": lambda place: os.mkdir(place / "new"),
    "read": lambda place: open(place / "secret").read(),
    "home": lambda place: os.listdir(os.path.expanduser("~")),
    "parent's environment": lambda place: open(f"/proc/{os.getppid()}/environ").read(),
    "parent's files": lambda place: os.listdir(f"/proc/{os.getppid()}/fd"),
    "socket": lambda place: socket.socket(),
    "pair": lambda place: socket.socketpair(),
    "fork": lambda place: os.fork(),
    "execute": lambda place: os.execv("/bin/true", ["true"]),
    "run": lambda place: subprocess.run(["true"]),
    "thread": lambda place: __import__("threading").Thread(target=print).start(),
    "kill": lambda place: os.kill(os.getppid(), 0),
    "limits": lambda place: __import__("resource").setrlimit(0, (1, 1)),
    "user": lambda place: os.setuid(65534),
    "timer": lambda place: __import__("signal").setitimer(0, 0),
    "memory": lambda place: len(bytearray(2 * 1024**3)),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_fails(place, attack):
    said = confined(ATTACKS[attack], place)
    assert not said.startswith(("did it", "nothing")), said
    assert [path.name for path in place.iterdir()] == ["secret"]
    assert (place / "secret").read_text() == SECRET


def test_a_home_beneath_pythons_prefix_is_not_read(place, monkeypatch):
    for name in ("prefix", "base_prefix", "exec_prefix", "base_exec_prefix"):
        monkeypatch.setattr(sys, name, str(place))
    assert confined(ATTACKS["read"], place) == "PermissionError"


def test_no_other_call_of_the_kernel_is_allowed():
    def sweep():
        libc = ctypes.CDLL(None, use_errno=True)
        # Every number but the allowed ones, and 335 and 336, which only the kernel's probes use.
        for number in sorted({*range(470)} - allowed - {335, 336}):
            libc.syscall(number, 0, 0, 0, 0, 0, 0)
            if ctypes.get_errno() != errno.EPERM:
                return number
            ctypes.set_errno(0)
        return "none"

    names = [name.encode() for name in (*_CALLS.split(), *_HARMLESS_IF)]
    allowed = set(map(ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name, names))
    assert confined(sweep) == "did it: none"


def test_verifying_still_works_and_imports_late():
    import torch  # noqa: F401  its `torch.classes` is a module whose path cannot be listed

    def verify():
        import fractions
        import xml.dom.minidom  # not loaded before

        return fractions.Fraction(1, 3) + bool(xml.dom.minidom) - 1

    assert confined(verify) == "did it: 1/3"
