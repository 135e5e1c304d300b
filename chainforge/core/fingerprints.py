"""What a stage was made from, as one hash, as in make: its recipe, its settings, its inputs.

The same fingerprint means that running the stage again would make the same thing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chainforge.core.artifacts import STARTED, damage, read_manifest, sha256
from chainforge.core.errors import InputError
from chainforge.core.paths import paths_in, unplaced
from chainforge.core.usercode import own_script, sources

# Where things lie says nothing of what they are: these keys stay out of a fingerprint, and what
# the inputs among them hold goes in through `inputs`.
PATH_KEYS = frozenset(
    {
        "config",
        "output_dir",
        "model_name_or_path",
        "teacher_model_name_or_path",
        "data",
        "models",
        "pool",
        "gate_pool",
        "logging_dir",
    }
)

# How fast, how patiently and at what cost answers are fetched says nothing of what they are, nor
# do who watches, where they are sent and how many checkpoints are kept: a stage that a budget, a
# rule of health, steps in vain or a full disk stopped goes on with another setting.
FREE_KEYS = frozenset(
    {
        "shutdown_timeout",
        "dry_run",
        "expected_tokens",
        "health",
        "health_rules",
        "hub_dataset_id",
        "hub_model_id",
        "hub_private",
        "hub_private_repo",
        "hub_strategy",
        "hub_token",
        "max_retry_after",
        "max_concurrency",
        "max_zero_advantage_steps",
        "max_requests",
        "max_retries",
        "max_tokens_total",
        "max_usd",
        "nonfinite_rewards",
        "outage_timeout",
        "prices",
        "project",
        "report_to",
        "push_to_hub",
        "retry_wait",
        "run_name",
        "save_total_limit",
        "timeout",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
    }
)


def input_fingerprint(reference: str | Path, *, thorough: bool = False) -> str:
    """Return what an input is made of: a stage's fingerprint, a content hash, or a Hub id.

    A path inside a finished stage (its `model/`, say) has that stage's fingerprint. Raises
    `InputError` for a stage that is not finished, or whose files are not what it signed, of which
    `thorough` hashes every one.
    """
    path = Path(reference)
    if not path.exists():
        return f"hub:{reference}"
    # Made from, not made of: the stage's fingerprint is known before the stage has run.
    for directory in (path, path.parent):
        manifest = read_manifest(directory)
        if manifest is not None:
            part = "" if directory == path else path.name
            if damaged := damage(directory, manifest, part, thorough=thorough):
                raise InputError(
                    f"{directory}: {'; '.join(damaged[:3])}; run the stage again, or copy it again"
                )
            return manifest.fingerprint
        if (directory / STARTED).exists():
            raise InputError(f"{directory}: this stage is not finished; run it first")
    return sha256(path)


def fingerprint(
    recipe: str,
    given: Mapping[str, Any],
    inputs: Mapping[str, str],
    script: str | Path | None = None,
) -> str:
    """Hash what decides a stage's result: recipe, configuration without paths, inputs, code.

    `inputs` maps each input's role (`model`, `data.0`, `models.base`) to its `input_fingerprint`.
    Files that the configuration names (a reward's .py, a task's .jsonl) count by their content, and
    so do functions of modules, the local modules that any of these import, and a recipe `script`
    of one's own.
    """
    counted = {key: value for key, value in given.items() if key not in PATH_KEYS | FREE_KEYS}
    files = list(paths_in(dict(sorted(counted.items()))))
    content = {
        "recipe": recipe,
        "given": canonical(given),
        "inputs": dict(inputs),
        "files": [(path.name, sha256(path)) for path in files],
    }
    code = _code(counted, own_script(script))
    if other := {name: sha256(path) for name, path in code.items() if path not in files}:
        content["code"] = other
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def canonical(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without where things are, numbers written one way (`1` and `"1.0"`)."""
    left_out = PATH_KEYS | FREE_KEYS
    counted = {key: value for key, value in sorted(given.items()) if key not in left_out}
    return {key: _number(value) for key, value in unplaced(counted).items()}


def _number(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _number(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_number(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str | int | float):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
            return int(number) if number == int(number) else number
    return value


def _texts(value: Any) -> Iterator[str]:
    """Yield the values of a configuration that may name a file or a function."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str) and 0 < len(value) < 1024 and "\n" not in value:
        yield value


def _code(settings: Any, script: str | None) -> dict[str, Path]:
    """Return the local sources that a configuration and a script run, by module name."""
    found = sources(script) if script else {}
    for text in _texts(settings):
        found |= sources(text)
    return found


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say in words which settings differ: `learning_rate: 0.0001 -> 0.0002`."""
    before, after = canonical(old), canonical(new)
    return [
        f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
