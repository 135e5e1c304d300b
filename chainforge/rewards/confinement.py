"""Confine a verifier process with the kernel's own means: seccomp, Landlock and limits.

Before a verifier process reads a word that a model wrote, it gives up the network, writing, new
processes and signals (seccomp), reading outside Python's own directories (Landlock), and all but
some memory and a few descriptors (limits). No code in it can undo that. Each restriction applies
where the kernel supports it; `chainforge doctor` says what this machine lacks.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

# What Python, numpy and sympy ask of the kernel to compute, and to import a module late. Names
# that an architecture does not have are left out.
_CALLS = """
    read write readv pread64 lseek close fstat stat lstat newfstatat statx access faccessat
    faccessat2 readlink readlinkat getcwd getdents64 poll ppoll select pselect6
    mmap munmap mprotect mremap madvise brk futex membarrier rseq set_robust_list sched_yield
    sched_getaffinity getcpu clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday
    time times getrusage getrlimit sysinfo uname getrandom getpid getppid gettid getuid geteuid
    getgid getegid rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
    exit exit_group
"""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Calls for which an argument, masked, must be 0: flags for writing, and limits to be set.
_HARMLESS_IF = {"open": (1, _WRITING), "openat": (2, _WRITING), "prlimit64": (2, 2**64 - 1)}
_DENY, _ALLOW, _MASKED_EQUAL = 0x50000 | errno.EPERM, 0x7FFF0000, 7  # of <seccomp.h>
_NO_NEW_PRIVILEGES, _DIE_WITH_PARENT = 38, 1  # of <sys/prctl.h>
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446  # Landlock's calls on every architecture
_READING = 0b1100  # of Landlock's rights: files and directories
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")


def confine(memory: int) -> None:
    """Confine this process irrevocably; leave out what the kernel does not support."""
    import resource  # which Windows lacks

    sys.dont_write_bytecode = True
    libc, seccomp = _library(None), _library("libseccomp.so.2")
    if sys.platform == "linux":
        libc.prctl(_DIE_WITH_PARENT, 9, 0, 0, 0)
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        _restrict_files(libc)
    most = {"AS": memory, "CORE": 0, "FSIZE": 0, "NPROC": 0, "NOFILE": 64}
    for name, limit in most.items():
        with suppress(ValueError, OSError, AttributeError):  # macOS lacks some.
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    if seccomp:
        _restrict_calls(seccomp)


def _library(name: str | None) -> Any:
    """Load a library of C, or None where it is not there."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _restrict_files(libc: Any) -> None:
    """Restrict reading, with Landlock, to the directories that Python imports from."""
    version = libc.syscall(_CREATE, None, 0, 1)
    if version < 1:
        return
    files = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}.get(version, 0xFFFF)
    # From version 4 on the network, from 6 on signals and abstract sockets.
    handled = struct.pack("=QQQ", files, 3 * (version >= 4), 3 * (version >= 6))
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = libc.syscall(_CREATE, handled, size, 0)
    for directory in _imported_from():
        with suppress(OSError):
            opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            libc.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", _READING, opened), 0)
            os.close(opened)
    libc.syscall(_RESTRICT, rules, 0)
    os.close(rules)


def _imported_from() -> set[str]:
    """Return Python's own directories and, elsewhere, those of the packages that are loaded.

    The whole prefix is not allowed: a home directory with its tokens may be below it.
    """
    places = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    prefixes = (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)
    own = {*places, *(f"{prefix}/{name}" for prefix in prefixes for name in ("lib", "lib64"))}
    packages = (getattr(module, "__path__", ()) for module in list(sys.modules.values()))
    inside = tuple(f"{directory}/" for directory in own)
    named = (paths for paths in packages if isinstance(paths, Iterable))  # torch.classes has none
    elsewhere = {path for paths in named for path in paths if not path.startswith(inside)}
    return {*own, *_LIBRARIES, *elsewhere}


def _restrict_calls(library: Any) -> None:
    """Allow only `_CALLS`, with seccomp; any other call fails with EPERM."""
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(_DENY))
    for call in (*_CALLS.split(), *_HARMLESS_IF):
        where, mask = _HARMLESS_IF.get(call, (0, 0))
        condition = struct.pack("=IiQQ", where, _MASKED_EQUAL, mask, 0)
        number = library.seccomp_syscall_resolve_name(call.encode())
        library.seccomp_rule_add_array(context, _ALLOW, number, 1 if mask else 0, condition)
    library.seccomp_load(context)


def program(module: str, *arguments: Any) -> list[str]:
    """Return the command that calls `main` of one of our modules with arguments that are literals.

    -P: a file named sympy.py in the working directory is not sympy.
    """
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from {module} import main; main{arguments}"
    return [sys.executable, "-P", "-c", code]


@cache
def gaps() -> list[str]:
    """Return what this machine's kernel cannot deny to a verifier process."""
    with tempfile.TemporaryDirectory() as directory:
        command = program(__name__, directory)
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    return list(json.loads(run.stdout))


def main(directory: str) -> None:
    """Confine this process, then print as JSON what it can still do."""
    attempts: dict[str, Callable[[], object]] = {
        "the network": socket.socket,
        "writing files": lambda: Path(directory, "file").write_text("x"),
        "new processes": lambda: os.waitpid(os.fork() or os._exit(0), 0),
        "reading secrets of other processes": Path(f"/proc/{os.getppid()}/environ").read_bytes,
    }
    confine(2 * 1024**3)
    possible = []
    for name, attempt in attempts.items():
        with suppress(OSError):
            attempt()
            possible.append(name)
    print(json.dumps(possible))  # noqa: T201
