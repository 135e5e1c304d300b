"""Two processes train one stage: what is merged and saved is written once, and whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

from stages import COMMON, METHODS, ROW, adapted, distance, logits, opened, same

from chainforge.core.artifacts import read_json, read_manifest

ROOT = Path(__file__).parents[2]


def test_an_adapter_is_merged_trained_and_saved_by_two_processes(bare, made, tmp_path):
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 16)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    options = ["--model_name_or_path", bare, "--data", tmp_path / "rows.jsonl"]
    options += ["--output_dir", tmp_path / "more", "--adapter", "merge"]
    command = [*launch, ROOT / "recipes/sft.py", *COMMON["sft"], *METHODS["lora"], *options]
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
    assert {"start", "adapter", "model"} <= {Path(name).parts[0] for name in manifest.outputs}
    config = read_json(tmp_path / "more/adapter/adapter_config.json")
    assert config["base_model_name_or_path"] == str(tmp_path / "more/start")
    left = logits(opened(tmp_path / "more/model"))
    same(left, logits(adapted(tmp_path / "more/adapter")))
    assert distance(left, made("sft", "lora").ended) > 0.01
