"""Send a finished stage to the Hub: `push_to_hub: true` in its settings.

TRL's own upload is not used: it sends `training_args.bin`, a pickle that holds the token, and
creates a public repository before anything is trained.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import UPLOAD, read_json
from chainforge.core.errors import InputError

logger = logging.getLogger(__name__)


def check_push(settings: Any, start: Any = None) -> None:
    """Raise `InputError` for a push that would fail after the work is done.

    `settings` are a stage's that have `push_to_hub`; `start` is the `Start` of one that trains.
    """
    from chainforge.hub.upload import check_id, token

    if getattr(settings, "hub_token", None) is not None:
        raise InputError("hub_token: no token belongs in a file; set HF_TOKEN in the environment")
    if not settings.push_to_hub:
        return
    key = "hub_model_id" if hasattr(settings, "hub_model_id") else "hub_dataset_id"
    identity = getattr(settings, key)
    if identity is None:
        raise InputError(f"push_to_hub: set the repository, as `{key}: me/my-name`")
    check_id(identity, key)
    if start is not None and start.lora is not None:
        merged = start.source.adapter is not None and start.adapter == "merge"
        if merged or Path(start.source.model).exists():
            raise InputError(
                f"push_to_hub: the adapter's base, {start.reference}, is not on the Hub; leave it "
                f"out and send the merged model: chainforge export {settings.output_dir} --what "
                f"model --to {identity}"
            )
    token()


def push_signed(directory: Path) -> None:
    """Upload a finished stage as its `upload.json` says, and remove that file: it is tried once.

    The stage stays done whatever happens; an `InputError` says how to send it by hand.
    """
    order = directory / UPLOAD
    if not order.exists():
        return
    from chainforge.hub.evidence import add_evidence
    from chainforge.hub.export import pack
    from chainforge.hub.upload import push

    asked = read_json(order)
    identity = asked.get("hub_model_id") or asked["hub_dataset_id"]
    private = False not in (asked.get("hub_private"), asked.get("hub_private_repo"))
    what = "adapter" if (directory / "adapter").is_dir() else "model"
    what = "dataset" if "hub_dataset_id" in asked else what
    try:
        package = pack(directory, what, title=identity, upload=True)
        add_evidence(package.files, what, package.stages)
        address, seen = push(package.files, identity, what, private=private)
    except InputError as error:
        order.unlink()
        raise InputError(
            f"push_to_hub: {error}\n  {directory} is done; send it with: chainforge export "
            f"{directory} --what {what} --to {identity}{'' if private else ' --public'}"
        ) from None
    order.unlink()
    logger.info("uploaded to %s (%s)", address, "private" if seen else "public")
