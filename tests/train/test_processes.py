"""Two processes train one stage: what is merged and saved is written once, and whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from stages import COMMON, METHODS, ROW, logits, stage_of

from chainforge.core.artifacts import read_json, read_manifest

ROOT = Path(__file__).parents[2]


def test_an_adapter_is_merged_trained_and_saved_by_two_processes(wide_model, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    cold = stage_of(monkeypatch, "sft", wide_model, tmp_path / "cold", *METHODS["lora"])
    bare = cold.path("adapter").rename(tmp_path / "bare")
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 16)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    options = ["--model_name_or_path", bare, "--data", tmp_path / "rows.jsonl",
               "--output_dir", tmp_path / "more", "--per_device_train_batch_size", "4",
               "--save_strategy", "no", "--adapter", "merge"]  # fmt: skip
    command = [*launch, ROOT / "recipes/sft.py", *COMMON, *METHODS["lora"], *options]
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = read_manifest(tmp_path / "more")
    assert manifest.notes["starts_from"] == str(tmp_path / "more/start")
    parts = {Path(name).parts[0] for name in manifest.outputs}
    assert {"start", "adapter", "model"} <= parts
    config = read_json(tmp_path / "more/adapter/adapter_config.json")
    assert config["base_model_name_or_path"] == str(tmp_path / "more/start")
    model = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "more/model"))
    adapted = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "more/adapter"))
    torch.testing.assert_close(model, adapted, atol=1e-3, rtol=0)
    assert (model - cold.ended).norm() > 0.01 * cold.ended.norm()
