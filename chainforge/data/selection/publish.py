"""Push a data set to the Hub: the folder with its card as it lies on disk, private unless told."""

from __future__ import annotations

import os
import re
from pathlib import Path

from chainforge.core.errors import InputError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_push(push: bool, identity: str | None) -> None:
    """Raise `InputError`, before any work, when a push could not go anywhere."""
    if not push:
        if identity is not None:
            raise InputError("hub_dataset_id is given, but push_to_hub is not true")
        return
    if identity is None:
        raise InputError("push_to_hub: say where to, as `hub_dataset_id: me/my-data`")
    if not _ID.fullmatch(identity):
        raise InputError(f"hub_dataset_id: expected owner/name, found {identity!r}")
    if not os.environ.get("HF_TOKEN"):
        raise InputError("push_to_hub: HF_TOKEN is not set; the token comes from there alone")


def push_folder(folder: Path, identity: str, *, private: bool) -> str:
    """Upload a data set's folder; return its address. Files that are hidden stay here."""
    from huggingface_hub import HfApi

    api = HfApi(token=os.environ["HF_TOKEN"])
    address = api.create_repo(identity, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=identity,
        repo_type="dataset",
        folder_path=folder,
        commit_message="Add the rows that ChainForge selected",
        ignore_patterns=[".*", "**/.*"],
    )
    return str(address)
