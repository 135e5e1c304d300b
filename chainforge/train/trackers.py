"""Show the stages of a chain as runs of one project in a tracker (`report_to`).

TRL and transformers report. A stage adds the names: the project is the chain, the run
`<chain>/<stage>`. Names that the user has set, in the settings or the environment, stay.
"""

from __future__ import annotations

import netrc
import os
import secrets
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import read_json
from chainforge.core.errors import InputError, hint
from chainforge.core.run_dir import CHAIN
from chainforge.core.secrets import read_secret
from chainforge.train.stage import RUN_ID, TENSORBOARD, is_main_process


def name_run(training: Any, directory: Path) -> None:
    """Set the names of a stage's run in a TRL configuration and in the environment."""
    file = directory.resolve().parent / CHAIN
    chain = read_json(file).get("name") if file.is_file() else None
    training.run_name = training.run_name or (f"{chain}/" if chain else "") + directory.name
    if chain:
        if training.project == training.__dataclass_fields__["project"].default:
            training.project = chain
        os.environ.setdefault("WANDB_PROJECT", training.project)
        os.environ.setdefault("TRACKIO_PROJECT", training.project)
    if "wandb" in training.report_to and is_main_process():
        path = directory / RUN_ID  # a resumed stage resumes its run, as trackio does by itself
        if not path.is_file():
            path.write_text(f"{secrets.token_hex(4)}\n", encoding="utf-8")
        os.environ.setdefault("WANDB_RUN_ID", path.read_text(encoding="utf-8").strip())
        os.environ.setdefault("WANDB_RESUME", "allow")
    if TENSORBOARD in training.report_to:
        # One folder for each run: TensorBoard would draw several in one as one line.
        given = os.environ.get("TENSORBOARD_LOGGING_DIR")
        folder = Path(given, training.run_name) if given else directory / TENSORBOARD
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)


def check_trackers(trackers: list[str]) -> None:
    """Raise `InputError` for a tracker that is not known, not installed, or has no key."""
    from transformers.integrations import integration_utils as known

    for name in trackers:
        if name not in known.INTEGRATION_TO_CALLBACK:
            names = sorted(known.INTEGRATION_TO_CALLBACK)
            raise InputError(f"report_to: no tracker {name!r}; {hint(name, names)}")
        there = getattr(known, f"is_{name}_available", None)
        if there is not None and not there():
            raise InputError(f"report_to: {name} is not installed; pip install {name}")
    if "wandb" in trackers and not _reaches_wandb():
        raise InputError("report_to: wandb has no key: set WANDB_API_KEY, or run `wandb login`")


def _reaches_wandb() -> bool:
    """Return whether wandb needs no key, or has one in the environment or from `wandb login`."""
    if os.environ.get("WANDB_MODE", "online") != "online" or read_secret("WANDB_API_KEY"):
        return True
    try:
        return bool(netrc.netrc(os.environ.get("NETRC")).authenticators("api.wandb.ai"))
    except (OSError, netrc.NetrcParseError):
        return False
