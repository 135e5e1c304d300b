"""Finished stages, made in no time: what a run leaves on disk, with no model behind it."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq

from chainforge.core.artifacts import Manifest, fingerprint, input_fingerprint, sha256, write_json
from chainforge.core.jsonl import write_rows
from chainforge.train.stage import versions

CONFIG = {"model_type": "qwen2", "use_cache": False, "_name_or_path": "/somewhere/else"}
LORA = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}


def base(folder, licence=None):
    """A model that nobody here made."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(f"weights of {folder.name}".encode())
    if licence:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n\n# A model\n")
    return str(folder)


def stage(folder, recipe, *, model=None, data=(), teacher=None, given=None, measured=None, **more):
    """A finished stage; `measured` maps names to models, and makes it an evaluation.

    `files` are its JSON files, or rows of JSON lines, by name.
    """
    folder.mkdir(parents=True)
    given = (given or {}) | {"folder": folder.name}
    named = {"model_name_or_path": model, "teacher_model_name_or_path": teacher}
    config = {key: str(value) for key, value in named.items() if value}
    config |= {"output_dir": str(folder), "data": [str(path) for path in data]} | given
    references = {"model": model, "teacher": teacher}
    references |= {f"data.{number}": str(path) for number, path in enumerate(data)}
    references |= {f"models.{name}": path for name, path in (measured or {}).items()}
    inputs = {role: input_fingerprint(str(ref)) for role, ref in references.items() if ref}
    metrics = {}
    if recipe in ("collect", "reject"):
        metrics = {"in": 10, "kept": 7, "dropped": {"wrong": 3}}
        write_json(folder / "funnel.json", metrics)
        rows(folder / "dataset/train.parquet")
        (folder / "dataset/README.md").write_text("---\nlicense: other\n---\n\n# Rows\n")
    elif measured:
        write_json(folder / "results.json", scores(measured))
    else:
        metrics = {"steps": 3, "train_loss": 0.5}
        for part in more.pop("parts", ("model",)):
            (folder / part).mkdir()
            weights = f"{'adapter_' if part == 'adapter' else ''}model.safetensors"
            (folder / part / weights).write_bytes(f"weights of {folder.name}".encode())
            (folder / part / "tokenizer.json").write_text("{}")
            name, value = ("adapter_config", LORA) if part == "adapter" else ("config", CONFIG)
            write_json(folder / part / f"{name}.json", value | more.pop(name, {}))
    for name, value in more.pop("files", {}).items():
        (write_rows if name.endswith(".jsonl") else write_json)(folder / name, value)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    outputs = {str(path.relative_to(folder)): sha256(path) for path in files}
    print_ = fingerprint(recipe, given, inputs)
    made = Manifest(recipe, print_, given, inputs, outputs, config, metrics, versions())
    made.device, made.seed, made.seconds = "cpu (2 cores)", 42, 90.0
    made.write(folder)
    return folder


def rows(path):
    """One row, as parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"completion": ["7"]}), path)


def scores(measured):
    """What an evaluation writes of some models: the later the better."""
    models = []
    for place, name in enumerate(measured, 1):
        share = {"mean": 0.1 * place, "low": 0.1 * place - 0.05, "high": 0.1 * place + 0.05}
        both = {"strict": share, "lenient": share}
        tasks = {task: {"n": 50} | both for task in ("sums", "legs")}
        made = {"name": name, "n": 100, "format": 0.9, "tokens_mean": 20.0, "samples_per_prompt": 4}
        made |= {"pass_at_k": {"1": 0.1, "4": 0.75}, "maj_at_k": {"1": 0.1, "4": 0.25}}
        models.append(made | both | {"tasks": tasks})
    figures = {"difference": 0.1, "low": 0.05, "high": 0.15, "p": 1e-9}
    pairs = [{"from": one, "to": two} | figures for one, two in itertools.pairwise(measured)]
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 2048}
    return {"models": models, "pairs": pairs, "settings": {"sampling": sampling}}


def chain(folder, begin):
    """Traces, SFT, RL, picks, SFT, RL, lessons, a student and its evaluation, in `folder`."""
    sums = {"fn": "reasoning_gym", "params": {"dataset": "chain_sum"}, "size": 10}
    tasks = {"tasks": [sums], "system_prompt": "Think first."}
    stage(folder / "traces", "collect", given=tasks | {"teacher": "deepseek"})
    cold = stage(folder / "cold", "sft", model=begin, data=[folder / "traces"])
    stage(folder / "reason", "grpo", model=cold / "model", given=tasks)
    stage(folder / "picks", "reject", model=folder / "reason/model", given=tasks)
    stage(folder / "mixed", "sft", model=begin, data=[folder / "picks", folder / "traces"])
    stage(folder / "final", "grpo", model=folder / "mixed/model", given=tasks | {"beta": 0.01})
    stage(folder / "lessons", "reject", model=folder / "final/model", given=tasks)
    stage(folder / "student", "sft", model="Qwen/Qwen2.5-0.5B", data=[folder / "lessons"])
    models = {"base": begin} | {
        name: folder / name / "model" for name in ("cold", "reason", "mixed", "final", "student")
    }
    stage(folder / "scores", "evaluate", measured=models)
    return folder
