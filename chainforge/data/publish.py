"""See, before any work, that a data set that is to go to the Hub could go there."""

from __future__ import annotations

from chainforge.core import upload
from chainforge.core.errors import InputError


def check_push(push: bool, identity: str | None) -> None:
    """Raise `InputError` when a push could not go anywhere."""
    if not push:
        if identity is not None:
            raise InputError("hub_dataset_id is given, but push_to_hub is not true")
        return
    if identity is None:
        raise InputError("push_to_hub: say where to, as `hub_dataset_id: me/my-data`")
    upload.check_id(identity, "hub_dataset_id")
    upload.token()
