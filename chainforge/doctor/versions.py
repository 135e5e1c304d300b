"""The installed libraries against those that were tested together."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from packaging.version import InvalidVersion, Version

from chainforge.doctor.findings import Context, Finding
from chainforge.rewards.confinement import gaps

# Least, tested. Tests hold them to pyproject.toml and constraints.txt.
PACKAGES = {
    "torch": ("2.6", "2.13.0"),
    "transformers": ("5.23", "5.23.0"),
    "trl": ("1.16", "1.16.0"),
    "peft": ("0.21", "0.21.2"),
    "accelerate": ("1.15", "1.15.0"),
    "datasets": ("5.2", "5.2.0"),
    "bitsandbytes": ("0.50", "0.50.2"),
}
PYTHON = "3.11"


def check_versions(context: Context) -> Iterator[Finding]:
    """Compare what is installed with what is needed, and with what was tested."""
    if Version(platform.python_version()) < Version(PYTHON):
        yield Finding("error", "versions", f"Python {PYTHON} or newer is needed")
    fine = []
    for name, (least, tested) in PACKAGES.items():
        try:
            found = importlib.metadata.version(name)
            version = Version(found)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("error", "versions", f"{name} is not installed: pip install .")
            continue
        except InvalidVersion:
            yield Finding("warning", "versions", f"{name} {found}: {tested} was tested")
            continue
        if version < Version(least):
            words = f"{name} {found} is too old: pip install '{name}>={least}'"
            yield Finding("error", "versions", words)
        elif version.release[:2] != Version(tested).release[:2]:
            words = (
                f"{name} {found} was not tested; {tested} was: pip install -c constraints.txt ., "
                "or watch the first steps"
            )
            yield Finding("warning", "versions", words)
        else:
            fine.append(f"{name} {found}")
    if fine:
        yield Finding("ok", "versions", ", ".join(fine))


def check_machine(context: Context) -> Iterator[Finding]:
    """Return what this machine has, and warn where a chain asks for GPUs that are not here."""
    machine = context.machine
    gpus = ", ".join(f"{size / 2**30:.0f} GiB" for size in machine.gpus)
    words = f"{len(machine.gpus)} GPUs ({gpus})" if machine.gpus else "no GPU"
    text = f"{words}, {machine.cores} cores, {machine.memory / 2**30:.0f} GiB of memory"
    yield Finding("ok", "machine", text)
    if machine.gpus:
        return
    for stage in context.training:
        if not stage.settings["use_cpu"]:
            words = "there is no GPU here, and without `use_cpu: true` the stage asks for one"
            yield Finding("warning", "machine", words, stage.name)


def check_judges(context: Context) -> Iterator[Finding]:
    """Return which kernel limits hold the processes in which answers are judged."""
    possible = gaps()
    if not possible:
        words = "judged without network, writing, new processes or other programs' secrets"
        yield Finding("ok", "answers", f"{words} (seccomp, Landlock)")
        return
    words = (
        f"this machine cannot take {', '.join(possible)} from the processes that judge answers. "
        "No answer is evaluated, so this is the second defence; it needs Linux 5.13 with seccomp "
        "and Landlock, and libseccomp (apt install libseccomp2)"
    )
    yield Finding("warning", "answers", words)
