"""The ceremony around a stage: open its directory, work, sign it.

What a stage leaves counts only once `manifest.json` is there. Until then the directory says in
`stage.json` what it is being made from, so that a later run goes on with the same settings and
never with others.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from chainforge import __version__
from chainforge.core import artifacts, process
from chainforge.core.artifacts import HOLDER, LOCK, MANIFEST, PROGRESS, STARTED, UPLOAD, Manifest
from chainforge.core.config import given, resolved
from chainforge.core.disk import writing
from chainforge.core.errors import InputError, Stopped
from chainforge.core.paths import written_for
from chainforge.core.secrets import redact
from chainforge.data.salvage import rejects_in
from chainforge.train.trackers import RUN_ID, TENSORBOARD

if TYPE_CHECKING:
    from chainforge.train.methods import Start

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
WORKING_FILES = {"log.txt", LOCK, HOLDER, PROGRESS, STARTED, MANIFEST, UPLOAD}
UNSIGNED = {"checkpoints", TENSORBOARD, RUN_ID}


@dataclass
class RunArgs:
    """What a stage needs that no TRL configuration gives it."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Directory of the stage; everything it leaves is there."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of everything that is drawn."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The policy: a directory or a Hub id."}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision of the policy: auto, float32, bfloat16, float16. auto is as saved, "
            "but vLLM makes bfloat16 of float32."
        },
    )


def is_main_process() -> bool:
    """True in the one process of a launch that writes."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass
class Stage:
    """An open stage: where it works, what it is made from, what it has measured."""

    recipe: str
    directory: Path
    fingerprint: str
    given: dict[str, Any]
    inputs: dict[str, str]
    seed: int
    config: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    policy: Start | None = None  # how its policy was opened, where it trains one

    def path(self, name: str) -> Path:
        """Return the path of a file of this stage."""
        return self.directory / name

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Leave word of how far the stage is."""
        if is_main_process():
            artifacts.report_progress(self.directory, done, total, unit, note)


@contextlib.contextmanager
def open_stage(
    recipe: str,
    output_dir: str | None,
    *configs: Any,
    inputs: Mapping[str, str] | None = None,
    seed: int = 42,
    shared: bool = False,
    push: Callable[[Path], None] = lambda directory: None,
) -> Iterator[Stage]:
    """Open a stage's directory for work; sign it when the work ends well.

    `configs` are the parsed dataclasses, kept in `config.yaml`; `inputs` maps roles to paths or
    Hub ids; `shared` says that every process of a launch writes into the directory, and not only
    the first; `push` is called with the directory once it is signed, or when it was signed before.
    Exits with code 0 when the same stage is done already; raises `InputError` when the
    directory is in use, holds a stage made otherwise, or is not a stage's.
    """
    if not output_dir:
        raise InputError("output_dir: say where the stage may write, as --output_dir DIRECTORY")
    directory = Path(output_dir)
    settings = given(sys.argv[1:])
    prints = {
        role: artifacts.input_fingerprint(reference, thorough=_looks_closely())
        for role, reference in (inputs or {}).items()
    }
    stage = Stage(
        recipe=recipe,
        directory=directory,
        fingerprint=artifacts.fingerprint(recipe, settings, prints, _script()),
        given=artifacts.canonical(settings),
        inputs=prints,
        seed=seed,
        config=resolved(*configs),
    )
    started = time.monotonic()
    with artifacts.lock(directory) if is_main_process() else contextlib.nullcontext():
        _leave_if_done(stage, push)
        if is_main_process():
            _begin(stage)
        elif shared:
            _wait_for_main(stage)
        with writing(directory):
            with rejects_in(directory) if is_main_process() else contextlib.nullcontext():
                yield stage
            if process.orphaned():
                raise Stopped(
                    "by SIGTERM: what launched this process has ended; run the same command again",
                    128 + signal.SIGTERM,
                )
            if is_main_process():
                _sign(stage, time.monotonic() - started)
            if stage.policy and "checkpoints" not in stage.policy.save:
                shutil.rmtree(stage.path("checkpoints"), ignore_errors=True)
            if is_main_process():
                push(directory)


def _script() -> str | None:
    """Return the script that this process runs."""
    return getattr(sys.modules.get("__main__"), "__file__", None)


def _looks_closely() -> bool:
    """Whether this process hashes its inputs: the first, unless the chain has done so just now."""
    return is_main_process() and process.CHAIN not in os.environ


def _leave_if_done(stage: Stage, push: Callable[[Path], None]) -> None:
    manifest = artifacts.read_manifest(stage.directory)
    if manifest is None:
        return
    if manifest.fingerprint == stage.fingerprint:
        if damaged := artifacts.damage(stage.directory, manifest):
            raise InputError(
                f"{stage.directory} holds a finished stage of which {damaged[0]}; delete it to run "
                "it again"
            )
        if is_main_process():
            push(stage.directory)
        logger.info("%s is done already; delete it to run it again", stage.directory)
        raise SystemExit(0)
    raise InputError(
        f"{stage.directory} holds a finished stage made otherwise "
        f"({_difference(manifest.given, manifest.inputs, stage)}); "
        "give another --output_dir, or delete it"
    )


def _begin(stage: Stage) -> None:
    """Mark the directory as this stage's, unless it is somebody else's."""
    marker = stage.path(STARTED)
    if before := artifacts.read_started(stage.directory):
        if before["fingerprint"] != stage.fingerprint:
            raise InputError(
                f"{stage.directory} holds an unfinished stage with other settings "
                f"({_difference(before['given'], before['inputs'], stage)}); "
                "give another --output_dir, or delete it"
            )
        logger.info("%s: going on with an unfinished stage", stage.directory)
    elif foreign := [
        path.name for path in stage.directory.iterdir() if path.name not in WORKING_FILES
    ]:
        raise InputError(
            f"{stage.directory} is not empty and not a stage's (it holds {sorted(foreign)[0]}); "
            "give another --output_dir"
        )
    value = {"recipe": stage.recipe, "fingerprint": stage.fingerprint}
    artifacts.write_json(marker, value | {"given": stage.given, "inputs": stage.inputs})
    with open(stage.path("config.yaml"), "w", encoding="utf-8") as file:
        config = written_for(stage.config, stage.directory)
        file.write(redact(yaml.safe_dump(config, sort_keys=False, allow_unicode=True)))


def _wait_for_main(stage: Stage) -> None:
    """Wait until the first process has made the directory this stage's."""
    marker = stage.path(STARTED)
    while not marker.exists() or artifacts.read_json(marker)["fingerprint"] != stage.fingerprint:
        time.sleep(0.1)


def _difference(given_before: dict[str, Any], inputs_before: dict[str, str], stage: Stage) -> str:
    words = artifacts.changes(given_before, stage.given)
    words += [
        f"the input {role} changed"
        for role in sorted(inputs_before.keys() | stage.inputs.keys())
        if inputs_before.get(role) != stage.inputs.get(role)
    ]
    return "; ".join(words) or "code or a file that the settings name changed"


def _sign(stage: Stage, seconds: float) -> None:
    """Write the manifest: from now on the stage is done, and only to be sent, if at all."""
    if stage.config.get("push_to_hub"):
        settings = {key: value for key, value in stage.config.items() if key.startswith("hub_")}
        artifacts.write_json(stage.path(UPLOAD), settings)
    else:  # a run that was cut had other settings
        stage.path(UPLOAD).unlink(missing_ok=True)
    names = [
        path.relative_to(stage.directory).as_posix()
        for path in sorted(stage.directory.rglob("*"))
        if path.is_file()
        and path.relative_to(stage.directory).parts[0] not in WORKING_FILES | UNSIGNED
    ]
    outputs, states = artifacts.sign_for(stage.directory, names)
    Manifest(
        recipe=stage.recipe,
        fingerprint=stage.fingerprint,
        given=stage.given,
        inputs=stage.inputs,
        outputs=outputs,
        config=stage.config,
        metrics=stage.metrics,
        versions=versions(),
        device=device(),
        seed=stage.seed,
        seconds=round(seconds, 1),
        notes=stage.notes,
        states=states,
    ).write(stage.directory)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"chainforge": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device() -> str:
    """Name the device that did the work."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"cpu ({os.cpu_count()} cores)"
