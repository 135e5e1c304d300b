"""Find the model that a stage is given, and check that it is safe to open, before anything loads.

A policy is a plain model (a Hub id, a directory, a stage's `model/`) or a LoRA adapter on one (a
directory, a stage's `adapter/`, a Hub id). Weights are read from safetensors only, since other
formats can run code, and a model's own code is run only with `trust_remote_code: true`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import read_json
from chainforge.core.errors import InputError, first_line

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# All that is fetched of an adapter's repository: no pickled file.
_ADAPTER_FILES = [ADAPTER, ADAPTER_WEIGHTS, "*token*.json", "vocab.*", "merges.txt", "*.jinja"]
# Settings of a LoRA adapter with which PEFT merges it exactly. All others must be unset.
_EXACT = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "target_modules", "target_parameters", "task_type", "use_dora", "use_rslora",
})  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A policy to open: a plain model, or an adapter and the model under it."""

    reference: str  # as the user named it
    model: str  # an absolute directory or a Hub id
    revision: str | None = None
    adapter: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)  # the model's
    lora: dict[str, Any] = field(default_factory=dict)  # the adapter's

    @property
    def tokenizer(self) -> str:
        """Return where the tokenizer is: an adapter has its own, or else its model's."""
        if self.adapter and (self.adapter / "tokenizer_config.json").exists():
            return str(self.adapter)
        return self.model


def check_model(reference: str | None, trust_remote_code: bool = False) -> str:
    """Return the path or Hub id of a plain model; raise `InputError` for any other path.

    Nothing is loaded: a directory is a model when it has a `config.json` and safetensors.
    """
    if not reference:
        raise InputError("model_name_or_path: name a model, as --model_name_or_path PATH_OR_HUB_ID")
    path = Path(reference)
    if (path / ADAPTER).exists():
        merge = f"chainforge export {shlex.quote(str(path))} --what model --to DIR"
        beside = path.resolve().with_name("model")
        advice = f"give {beside}" if (beside / "config.json").exists() else f"merge it: {merge}"
        raise InputError(f"{path} is a LoRA adapter; {advice}")
    if path.is_dir():
        _check_directory(path, trust_remote_code)
    elif path.exists() or reference.startswith(("/", "./", "../")) or reference.count("/") > 1:
        raise InputError(f"{path}: no such model directory (looked from {Path.cwd()})")
    return reference


def find_source(
    reference: str | None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    base: str | None = None,
) -> Source:
    """Return what a policy is made of; raise `InputError` for what cannot be opened, or must not.

    No weights are loaded. Of a Hub id the configuration is fetched, and an adapter whole. `base`
    is where an adapter's base is, if not where the adapter says.
    """
    path = Path(reference or "")
    if reference and (path / ADAPTER).exists():
        return _adapter(reference, path, trust_remote_code, base)
    reference = check_model(reference, trust_remote_code)
    if path.is_dir():
        return Source(reference, str(path.resolve()), config=read_json(path / "config.json"))
    if adapter := _adapter_on_hub(reference, revision):
        return _adapter(reference, adapter, trust_remote_code)
    config = _config_on_hub(reference, revision, trust_remote_code)
    return Source(reference, reference, revision, config=config)


def _check_directory(path: Path, trust_remote_code: bool) -> None:
    """Raise `InputError` unless a directory holds a model that may be opened."""
    if not (path / "config.json").exists():
        inside = [part for part in ("model", "adapter") if (path / part).is_dir()]
        hint = f"; give its {inside[0]}/" if inside else ""
        raise InputError(f"{path} is not a model directory: it has no config.json{hint}")
    from chainforge.core.weights import check_weights

    check_weights(str(path))
    for file in (path / "config.json", path / "tokenizer_config.json"):
        if file.exists():
            _check_code(read_json(file), str(file), trust_remote_code)


def _check_code(config: dict[str, Any], where: str, trust_remote_code: bool) -> None:
    if config.get("auto_map") and not trust_remote_code:
        raise InputError(
            f"{where} has an auto_map: this model brings code of its own. Read it, then set "
            "trust_remote_code: true; or delete the auto_map if transformers knows the model type"
        )


def _adapter(
    reference: str, path: Path, trust_remote_code: bool, base: str | None = None
) -> Source:
    """Return a LoRA adapter with its base."""
    lora, names = read_json(path / ADAPTER), [file.name for file in path.iterdir()]
    _check_exact(lora, path)
    if ADAPTER_WEIGHTS not in names:
        from chainforge.core.weights import no_safetensors

        raise no_safetensors(f"{path}: {ADAPTER_WEIGHTS} is missing", names)
    named = lora.get("base_model_name_or_path")
    base = str(base or named or "")
    revision = lora.get("revision") if base == named else None
    where = f"{path / ADAPTER}: base_model_name_or_path: "
    try:
        if Path(check_model(base, trust_remote_code)).is_dir():
            base, config = str(Path(base).resolve()), read_json(Path(base) / "config.json")
        else:
            config = _config_on_hub(base, revision, trust_remote_code)
    except InputError as error:
        raise InputError(f"{where}{error}") from None
    return Source(reference, base, revision, path.resolve(), config, lora)


def _check_exact(lora: dict[str, Any], path: Path) -> None:
    """Raise `InputError` for settings that could be read back as another adapter."""
    if (kind := lora.get("peft_type")) != "LORA":
        raise InputError(f"{path} is an adapter of type {kind}; only LoRA can be trained or merged")
    plain = lora | {"bias": None if lora.get("bias") == "none" else lora.get("bias")}
    odd = sorted(key for key, value in plain.items() if value and key not in _EXACT)
    if lora.get("init_lora_weights") not in (True, False, None, "gaussian", "orthogonal"):
        odd.append("init_lora_weights")  # such as PiSSA, which changes the base
    if odd:
        raise InputError(
            f"{path / ADAPTER}: an adapter with {odd[0]}: {lora[odd[0]]} cannot be merged exactly "
            "from its files. Merge it where it was made (merge_and_unload), and give the model"
        )


def _config_on_hub(reference: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Fetch a model's configuration from the Hub, or from the cache."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(reference, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{reference}: not found locally (looked from {Path.cwd()}) or on the Hub: "
            f"{first_line(error)}"
        ) from None
    _check_code(config, f"{reference}: its config.json", trust_remote_code)
    from chainforge.core.weights import check_weights

    check_weights(reference, revision)
    return dict(config)


def _adapter_on_hub(reference: str, revision: str | None) -> Path | None:
    """Fetch an adapter from the Hub, or from the cache; None when the id is no adapter's."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        if find_adapter_config_file(reference, revision=revision) is None:
            return None
        folder = snapshot_download(reference, revision=revision, allow_patterns=_ADAPTER_FILES)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"{reference}: {first_line(error)}") from None
    return Path(folder)
