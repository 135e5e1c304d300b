"""Check which weight files a model would load: safetensors only, since other formats can run code.

transformers chooses the loader by the name of each file, and an index can name any file. So every
file that a model's loader could be sent to is checked by name before anything is loaded.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import read_json
from chainforge.core.errors import InputError

INDEX = "model.safetensors.index.json"
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
        _check(reference, [file.name for file in path.iterdir()], lambda name: path / name)
    else:
        _check_hub(reference, revision)


def no_safetensors(where: str, names: Iterable[str]) -> InputError:
    """Return the error that names the weights that are there instead."""
    others = sorted(name for name in names if name.endswith(_PICKLES))
    found = f"only {others[0]}, which is a pickle and may run code" if others else "no weights"
    return InputError(
        f"{where}: found {found}; ChainForge opens safetensors only. Convert it once, where you "
        "trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
    )


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
    for index in indexes:
        _check_index(f"{where}/{index}", read_json(fetch(index)), names)
    if "config.json" in names:
        _check_config(where, read_json(fetch("config.json")))


def _check_config(where: str, config: dict[str, Any]) -> None:
    """Raise `InputError` when a configuration sends transformers to weights of another name."""
    if "transformers_weights" in config:
        raise InputError(
            f"{where}/config.json: transformers_weights names {config['transformers_weights']!r}; "
            "ChainForge opens model.safetensors, or the files of its index. Delete the key"
        )


def _check_index(where: str, index: dict[str, Any], names: list[str] | None) -> None:
    """Raise `InputError` unless all that an index names is safetensors, and among `names`."""
    parts = index.get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise InputError(f"{where} has no weight_map; save the model again")
    for part in parts.values():
        if not isinstance(part, str) or not _PART.fullmatch(part):
            raise InputError(
                f"{where} names {part!r}: ChainForge opens safetensors only, from the model's own "
                "directory. Convert the model once, where you trust it: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        if names is not None and part not in names:
            raise InputError(f"{where} names {part}, which is missing; copy it again")


def _check_hub(reference: str, revision: str | None) -> None:
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HFValidationError
    from transformers.utils.hub import cached_file

    def fetch(name: str) -> Path:
        return Path(cached_file(reference, name, revision=revision) or "")

    failures: tuple[type[Exception], ...] = (*hub_failures(), HFValidationError)
    try:
        _check(reference, list(list_repo_files(reference, revision=revision)), fetch)
    except failures:
        # The cache has to do. What it lacks cannot be loaded either.
        with contextlib.suppress(OSError):
            _check_config(reference, read_json(fetch("config.json")))
        with contextlib.suppress(OSError):
            _check_index(f"{reference}/{INDEX}", read_json(fetch(INDEX)), None)


def hub_failures() -> tuple[type[Exception], ...]:
    """Return the exceptions that a call to the Hub may raise: its client's, or no network."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return HTTPError, OSError
