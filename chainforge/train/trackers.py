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
from urllib.parse import urlsplit

from chainforge.core.artifacts import read_json
from chainforge.core.errors import InputError, hint
from chainforge.core.secrets import read_secret

CHAIN = "chain.json"  # beside the stages; `run` writes it
RUN_ID = "wandb-run-id.txt"  # trackio resumes the run of the same name by itself
TENSORBOARD = "tensorboard"  # the folder in the stage that its curves are written to


def name_run(training: Any, directory: Path) -> None:
    """Set the names of a stage's run in a TRL configuration and in the environment.

    Does nothing without a tracker. Raises `InputError` for a tracker that is not installed.
    """
    trackers = asked_for(training.report_to)
    if not trackers:
        return
    check_trackers(trackers)
    chain = chain_of(directory)
    name = f"{chain}/{directory.name}" if chain else directory.name
    training.run_name = training.run_name or name
    if chain:
        if training.project == training.__dataclass_fields__["project"].default:
            training.project = chain
        os.environ.setdefault("WANDB_PROJECT", training.project)
        os.environ.setdefault("TRACKIO_PROJECT", training.project)
    if "wandb" in trackers and int(os.environ.get("RANK", "0")) == 0:
        _continue_run(directory)
    if TENSORBOARD in trackers:
        given = os.environ.get("TENSORBOARD_LOGGING_DIR")
        # One folder for each run: TensorBoard would draw several in one as one line.
        folder = Path(given, training.run_name) if given else directory / TENSORBOARD
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)


def asked_for(report_to: str | list[str] | None) -> list[str]:
    """Return the trackers that `report_to` names; none for `all`, those that are installed."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    return [] if names in (["none"], ["all"]) else names


def check_trackers(trackers: list[str]) -> None:
    """Raise `InputError` for a tracker that is not known or not installed."""
    from transformers.integrations import integration_utils as known

    for name in trackers:
        if name not in known.INTEGRATION_TO_CALLBACK:
            names = sorted(known.INTEGRATION_TO_CALLBACK)
            raise InputError(f"report_to: no tracker {name!r}; {hint(name, names)}")
        there = getattr(known, f"is_{name}_available", None)
        if there is not None and not there():
            raise InputError(f"report_to: {name} is not installed; pip install {name}")
    if "wandb" in trackers and not _reaches_wandb():
        raise InputError(
            "report_to: wandb has no key: set WANDB_API_KEY, run `wandb login`, or set "
            "WANDB_MODE=offline"
        )


def _reaches_wandb() -> bool:
    """Return whether wandb needs no key, or has one in the environment or from `wandb login`."""
    if os.environ.get("WANDB_MODE", "online").lower() not in ("online", "shared"):
        return True
    if read_secret("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(host and logins.authenticators(host))


def _continue_run(directory: Path) -> None:
    """Let wandb resume the stage's run when the stage is resumed."""
    path = directory / RUN_ID
    if not path.is_file():
        path.write_text(f"{secrets.token_hex(4)}\n", encoding="utf-8")
    os.environ.setdefault("WANDB_RUN_ID", path.read_text(encoding="utf-8").strip())
    os.environ.setdefault("WANDB_RESUME", "allow")


def chain_of(directory: Path) -> str | None:
    """Return the name of the chain that a stage's directory belongs to."""
    path = directory.resolve().parent / CHAIN
    chain = read_json(path) if path.is_file() else None
    return str(chain["name"]) if isinstance(chain, dict) and chain.get("name") else None
