"""Push a data set to the Hub: the folder with its card as it lies on disk, private unless told."""

from __future__ import annotations

from pathlib import Path

from chainforge.core import upload
from chainforge.core.errors import InputError


def check_push(push: bool, identity: str | None) -> None:
    """Raise `InputError`, before any work, when a push could not go anywhere."""
    if not push:
        if identity is not None:
            raise InputError("hub_dataset_id is given, but push_to_hub is not true")
        return
    if identity is None:
        raise InputError("push_to_hub: say where to, as `hub_dataset_id: me/my-data`")
    upload.check_id(identity, "hub_dataset_id")
    upload.token()


def push_folder(folder: Path, identity: str, *, private: bool) -> str:
    """Upload a data set's folder; return its address. Files that are hidden stay here."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    files = {name.as_posix(): folder / name for name in shown}
    message = "Add the rows that ChainForge selected"
    return upload.push(files, identity, "dataset", private=private, message=message).address
