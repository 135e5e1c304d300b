"""`push_to_hub: true` in a training stage: once it is signed, and as `chainforge export` does it.

TRL's own upload sends `training_args.bin`, a pickle that holds the token, and makes a public
repository before anything is trained. So TRL is told not to push, and the finished stage is sent:
its adapter where it has one, else its model, private unless `hub_private_repo: false`. A data stage
sends its rows (`hub_dataset_id`) in the same way. Until it is sent `upload.json` says what is to
be done, so that a stage that was killed meanwhile is sent when it is run again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainforge.core.artifacts import UPLOAD, read_json
from chainforge.core.errors import InputError
from chainforge.core.upload import check_id, push, token

if TYPE_CHECKING:
    from chainforge.generate.builder import BuildArgs
    from chainforge.train.stage import Stage

logger = logging.getLogger(__name__)


def take_over(training_args: Any, model_args: Any, stage: Stage) -> None:
    """Have the stage uploaded by ChainForge and not by TRL; raise `InputError` where it cannot be.

    To be called before the trainer is made, which would make the repository.
    """
    if training_args.hub_token is not None:
        raise InputError("hub_token: a token goes into no file; set HF_TOKEN in the environment")
    if not training_args.push_to_hub:
        return
    identity = training_args.hub_model_id
    if identity is None:
        raise InputError("push_to_hub: say where to, as `hub_model_id: me/my-model`")
    check_id(identity, "hub_model_id")
    strategy = str(getattr(training_args.hub_strategy, "value", training_args.hub_strategy))
    if "checkpoint" in strategy:
        raise InputError(f"hub_strategy: {strategy}: checkpoints stay here; leave it out")
    if model_args.use_peft and not _base_on_hub(model_args, stage):
        raise InputError(
            "push_to_hub: the adapter would go on a model that is only here, as the stage starts "
            f"from {model_args.model_name_or_path}; leave push_to_hub out, and when the stage is "
            f"done send the merged model: chainforge export {stage.directory} --what model --to "
            f"{identity}"
        )
    token()
    training_args.push_to_hub = False
    private = training_args.hub_private_repo is not False
    stage.upload = {"what": None, "to": identity, "private": private}


def _base_on_hub(model_args: Any, stage: Stage) -> bool:
    """Whether the adapter that the stage leaves goes on a model of the Hub."""
    start = stage.policy
    if start is None:
        return not Path(model_args.model_name_or_path).exists()
    merged = start.source.adapter is not None and start.adapter == "merge"
    return not merged and not Path(start.source.model).exists()


def send_rows(stage: Stage, output: BuildArgs) -> None:
    """Have a data stage's rows uploaded once it is signed, if its settings say so."""
    if output.push_to_hub:
        private = output.hub_private
        stage.upload = {"what": "dataset", "to": output.hub_dataset_id, "private": private}


def send(directory: Path) -> None:
    """Upload a signed stage where its `upload.json` says so, and remove that: it is tried once.

    An `InputError` says that the stage is done all the same.
    """
    order = directory / UPLOAD
    if not order.exists():
        return
    from chainforge.train.package import CARD, pack

    asked = read_json(order)
    what, identity, private = asked["what"], asked["to"], asked["private"]
    if what is None:
        what = "adapter" if (directory / "adapter").is_dir() else "model"
    try:
        package = pack(directory, what, title=identity, upload=True, online=True)
        message = f"Add the {what} that ChainForge made"
        done = push(package.files, identity, package.kind, private=private, message=message)
    except InputError as error:
        order.unlink()
        public = "" if private else " --public"
        raise InputError(
            f"push_to_hub: {error}\n  {directory} is done; send it with: chainforge export "
            f"{directory} --what {what} --to {identity}{public}"
        ) from None
    order.unlink()
    for note in package.notes:
        logger.warning("%s", note)
    seen = "private" if done.private else "public"
    logger.info("uploaded %d files and %s to %s (%s)", len(package.files) - 1, CARD,
                done.address, seen)  # fmt: skip
