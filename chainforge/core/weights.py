"""Check which weight files a model would load: safetensors only, since other formats can run code.

transformers chooses the loader by the name of each file, and an index can name any file. So every
file that a model's loader could be sent to is checked by name before anything is loaded.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from chainforge.core.artifacts import read_json
from chainforge.core.errors import InputError

INDEX = "model.safetensors.index.json"
CONVERT = "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), where you trust it"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WHOLE = re.compile(r"model(\.[^.]+)?\.safetensors")  # with a variant, as model.fp16.safetensors
_PART = re.compile(r"[^/\\]+\.safetensors")


def check_weights(reference: str, revision: str | None = None) -> None:
    """Raise `InputError` unless a model, a directory or a Hub id, has safetensors weights only.

    Files beside them that are never read, such as the same weights as `pytorch_model.bin`, may be
    there. When the Hub is out of reach the check is on what the cache has.
    """
    path = Path(reference)
    if path.is_dir():
        names = [file.name for file in path.iterdir()]
        return _check(reference, names, lambda name: path / name)
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HFValidationError
    from transformers.utils.hub import cached_file

    def fetch(name: str) -> Path:
        return Path(cached_file(reference, name, revision=revision) or "")

    failures: tuple[type[Exception], ...] = (*hub_failures(), HFValidationError)
    try:
        _check(reference, list(list_repo_files(reference, revision=revision)), fetch)
    except failures:
        for name in ("config.json", INDEX):
            with contextlib.suppress(OSError):
                _check_file(reference, fetch(name), None)


def _check(where: str, names: list[str], fetch: Callable[[str], Path]) -> None:
    """Check the files of a model by their names; `fetch` returns where one of them is."""
    if "adapter_config.json" in names and "config.json" not in names:
        raise InputError(
            f"{where} is a LoRA adapter; merge it first: chainforge export {where} --what model "
            "--to DIR"
        )
    indexes = [name for name in sorted(names) if name.endswith(".safetensors.index.json")]
    if not indexes and not any(_WHOLE.fullmatch(name) for name in names):
        raise no_safetensors(where, names)
    for name in [*indexes, *({"config.json"} & set(names))]:
        _check_file(where, fetch(name), names)


def _check_file(where: str, file: Path, names: list[str] | None) -> None:
    """Raise `InputError` when an index or a configuration sends the loader to another file."""
    value = read_json(file)
    if file.name == "config.json":
        if "transformers_weights" in value:
            raise InputError(
                f"{where}/config.json: delete transformers_weights and convert: {CONVERT}"
            )
        return
    parts = value.get("weight_map")
    for part in parts.values() if isinstance(parts, dict) and parts else [None]:
        if not isinstance(part, str) or not _PART.fullmatch(part):
            raise InputError(
                f"{where}/{file.name} names {part!r}: ChainForge opens safetensors only, from the "
                f"model's own directory. Convert it once: {CONVERT}"
            )
        if names is not None and part not in names:
            raise InputError(f"{where}/{file.name} names {part}, which is missing; copy it again")


def no_safetensors(where: str, names: Iterable[str]) -> InputError:
    """Return the error that names the weights that are there instead."""
    others = sorted(name for name in names if name.endswith(_PICKLES))
    found = f"only {others[0]}, which is a pickle and may run code" if others else "no weights"
    return InputError(
        f"{where}: found {found}; ChainForge opens safetensors only. Convert it once: {CONVERT}"
    )


def hub_failures() -> tuple[type[Exception], ...]:
    """Return the exceptions that a call to the Hub may raise: its client's, or no network."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return HTTPError, OSError
