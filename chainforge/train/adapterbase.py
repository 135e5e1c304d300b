"""Which model an adapter goes on, as others will find it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chainforge.core import upload as hub
from chainforge.core.artifacts import read_manifest
from chainforge.core.errors import InputError
from chainforge.core.sharing import public
from chainforge.core.upload import HUB_ID
from chainforge.train.lineage import Ancestor, Origin


def find_base(
    folder: Path,
    config: Mapping[str, Any],
    stages: Sequence[Ancestor],
    asked: str | None,
    upload: bool,
    online: bool,
    notes: list[str],
) -> Origin:
    """Return the base of the adapter in `folder`; one of the Hub where it is uploaded.

    `asked` is what the user says that it is. `online` compares that one's weights on the Hub with
    those that were trained on. Adds to `notes` what the user should know.
    """
    own = _as_it_lies(str(config.get("base_model_name_or_path") or ""), stages)
    local = Path(own).is_dir() or not HUB_ID.fullmatch(own)
    if asked is None:
        if local and upload:
            raise InputError(_mend(folder, own))
        if local:
            notes.append(
                f"its base is a folder here, {own}; adapter_config.json says {public(own)!r}. Say "
                "where others find it: --base HUB_ID"
            )
        return Origin("path" if local else "hub", own)
    if not HUB_ID.fullmatch(asked) or (not upload and Path(asked).is_dir()):
        if upload or not Path(asked).is_dir():
            raise InputError(f"base: expected a Hub id, as owner/name, found {asked!r}")
        return Origin("path", asked)
    if not local and asked != own:
        raise InputError(f"base: the adapter was trained on {own}, and would not fit {asked}")
    if local and online:
        _compare(own, asked, notes)
    return Origin("hub", asked)


def _as_it_lies(own: str, stages: Sequence[Ancestor]) -> str:
    """Return where a base that was a stage's model lies now, as the run may have been moved."""
    path = Path(own)
    if not own or path.is_dir():
        return own
    for stage in stages:
        if path.parent.name == stage.name and (stage.directory / path.name).is_dir():
            return str(stage.directory / path.name)
    return own


def _compare(own: str, asked: str, notes: list[str]) -> None:
    """Raise `InputError` when the Hub's model has other weights than those trained on."""
    if not any(Path(own).glob("*.safetensors")):
        notes.append(f"{own} is gone, so nobody saw whether {asked} is the same model")
    elif name := hub.other_weights(Path(own), asked):
        raise InputError(
            f"base: {asked} has another {name} than {own}, on which the adapter was trained; "
            "on other weights it is worth nothing"
        )


def _mend(folder: Path, own: str) -> str:
    """Return what to do about an adapter whose base is only here."""
    if not Path(own).is_dir():
        return (
            f"the adapter in {folder} goes on {own or 'a model that it does not name'}, which is "
            "gone from here and is no model of the Hub. Export the merged model instead (--what "
            "model). Or, if that base is on the Hub, say where: --base HUB_ID"
        )
    path = Path(own)
    stage = path.name == "model" and read_manifest(path.parent)
    source = f"{path.parent} --what model" if stage else own
    return (
        f"the adapter in {folder} goes on {own}, which is no model of the Hub. Export the merged "
        "model instead (--what model). Or, if that base is on the Hub, say where: --base HUB_ID; "
        f"it can be put there first: chainforge export {source} --to owner/base"
    )
