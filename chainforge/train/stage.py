"""Open a stage's directory, and sign it with `manifest.json` when the work is done.

Until then `stage.json` has the settings and inputs, so that a later run resumes with the same ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chainforge import __version__
from chainforge.core import artifacts, process
from chainforge.core.artifacts import LOCK, MANIFEST, PROGRESS, STARTED, UPLOAD, Manifest
from chainforge.core.config import given, resolved
from chainforge.core.errors import InputError
from chainforge.core.jsonl import replacing, writing
from chainforge.core.paths import written_for
from chainforge.core.secrets import redact
from chainforge.data.rows import rejects_in

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
WORKING_FILES = {"log.txt", LOCK, PROGRESS, STARTED, MANIFEST, UPLOAD}
RUN_ID, TENSORBOARD = "wandb-run-id.txt", "tensorboard"  # of trackers
UNSIGNED = WORKING_FILES | {"checkpoints", TENSORBOARD, RUN_ID}


def is_main_process() -> bool:
    """Return whether this is the first process of its launch, which does the writing."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass
class Stage(Manifest):
    """An open stage: what will be its manifest, and where it works."""

    directory: Path = Path()
    policy: Any = None  # a training stage's `Start`: how its policy is opened and saved

    def path(self, name: str) -> Path:
        """Return the path of a file of this stage."""
        return self.directory / name

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Write `progress.json`, which `run`, `show` and the report read."""
        if is_main_process():
            value = {"done": done, "total": total, "unit": unit, "note": note}
            with replacing(self.path(PROGRESS), durable=False) as temporary:
                temporary.write_text(json.dumps(value), encoding="utf-8")


@contextlib.contextmanager
def open_stage(
    recipe: str,
    output_dir: str | None,
    *configs: Any,
    inputs: Mapping[str, str] | None = None,
    seed: int = 42,
    shared: bool = False,
    push: Callable[[Path], None] | None = None,
) -> Iterator[Stage]:
    """Open a stage's directory for work; sign it when the work succeeds.

    `configs` are the parsed dataclasses, saved in `config.yaml`; `inputs` maps roles to paths or
    Hub ids; with `shared` every process of a launch writes into the directory; `push` is called
    with the directory once it is signed. Exits with code 0 when the same stage is done already;
    raises `InputError` when the directory is in use or contains something else.
    """
    if not output_dir:
        raise InputError("output_dir is required, as --output_dir DIRECTORY")
    main, settings = is_main_process(), given(sys.argv[1:])
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    # The first process hashes its inputs, unless `chainforge run` has just done so.
    thorough = main and process.CHAIN_VARIABLE not in os.environ
    prints = {
        role: artifacts.input_fingerprint(reference, thorough=thorough)
        for role, reference in (inputs or {}).items()
    }
    stage = Stage(
        recipe=recipe,
        fingerprint=artifacts.fingerprint(recipe, settings, prints, script),
        given=artifacts.canonical(settings),
        inputs=prints,
        seed=seed,
        config=resolved(*configs),
        directory=Path(output_dir),
    )
    started = time.monotonic()
    with artifacts.lock(stage.directory) if main else contextlib.nullcontext():
        if _is_done(stage):
            logger.info("%s is done already; delete it to run it again", stage.directory)
            if push and main:
                push(stage.directory)
            raise SystemExit(0)
        if main:
            _begin(stage)
        while shared and not stage.path(STARTED).exists():
            time.sleep(0.1)
        working_in = rejects_in if main else process.working_in
        with writing(stage.directory), working_in(stage.directory):
            yield stage
            if main:
                stage.seconds = round(stage.seconds + time.monotonic() - started, 1)
                _sign(stage)
                if push:
                    push(stage.directory)


def _is_done(stage: Stage) -> bool:
    """Return whether the stage is done; raise `InputError` for another one, or a damaged one."""
    manifest = artifacts.read_manifest(stage.directory)
    if manifest is None:
        return False
    if manifest.fingerprint != stage.fingerprint:
        raise _other_settings(stage, "a finished stage", manifest)
    if damaged := artifacts.damage(stage.directory, manifest):
        raise InputError(
            f"{stage.directory} contains a finished stage with a damaged file ({damaged[0]}); "
            "delete it to run it again"
        )
    return True


def _begin(stage: Stage) -> None:
    """Write `stage.json` and `config.yaml`, unless the directory contains something else."""
    names = {path.name for path in stage.directory.iterdir()}
    if before := artifacts.read_manifest(stage.directory, STARTED):
        if before.fingerprint != stage.fingerprint:
            raise _other_settings(stage, "an unfinished stage", before)
        logger.info("%s: resuming an unfinished stage", stage.directory)
        stage.seconds = before.seconds
        with contextlib.suppress(OSError):  # a killed part took until its last report
            began, told = (stage.path(name).stat().st_mtime for name in (STARTED, PROGRESS))
            stage.seconds = round(before.seconds + max(0.0, told - began), 1)
    elif foreign := sorted(names - WORKING_FILES):
        raise InputError(
            f"{stage.directory} is not empty and not a stage's (it contains {foreign[0]}); "
            "give another --output_dir"
        )
    keys = ("recipe", "fingerprint", "given", "inputs", "seconds")
    value = {key: getattr(stage, key) for key in keys}
    artifacts.write_json(stage.path(STARTED), value)
    config = written_for(stage.config, stage.directory)
    text = redact(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    stage.path("config.yaml").write_text(text, encoding="utf-8")


def _other_settings(stage: Stage, what: str, there: Manifest) -> InputError:
    """Return the error that names what differs from the stage in the directory."""
    from chainforge.core.run_dir import differences

    inputs = {role: ("the input", made) for role, made in stage.inputs.items()}
    return InputError(
        f"{stage.directory} already contains {what} with different settings ("
        f"{'; '.join(differences(there, stage.given, inputs))}); "
        "give another --output_dir, or delete it"
    )


def _sign(stage: Stage) -> None:
    """Write the manifest, and before it `upload.json` if the stage is to be uploaded."""
    stage.path(UPLOAD).unlink(missing_ok=True)
    if stage.config.get("push_to_hub"):
        settings = {key: value for key, value in stage.config.items() if key.startswith("hub_")}
        artifacts.write_json(stage.path(UPLOAD), settings)
    files = (path for path in sorted(stage.directory.rglob("*")) if path.is_file())
    names = [path.relative_to(stage.directory) for path in files]
    signed = [name.as_posix() for name in names if name.parts[0] not in UNSIGNED]
    if any(stage.directory.glob("judge-*.jsonl")):
        from chainforge.generate.judge import with_judges

        spending = with_judges(stage.directory, stage.metrics.get("spending"))
        stage.metrics["spending"] = spending
    stage.outputs, stage.states = artifacts.sign_for(stage.directory, signed)
    stage.versions, stage.device = versions(), device()
    manifest = {field.name: getattr(stage, field.name) for field in dataclasses.fields(Manifest)}
    Manifest(**manifest).write(stage.directory)
    # Only now is it safe to remove what a run would resume from.
    if stage.policy and "checkpoints" not in stage.policy.save:
        shutil.rmtree(stage.path("checkpoints"), ignore_errors=True)


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    found = {"chainforge": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device() -> str:
    """Return the name of the device that did the work."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"cpu ({os.cpu_count()} cores)"
