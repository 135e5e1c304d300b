"""Random models of the architectures that users bring go through every stage and come back whole."""

from pathlib import Path

import pytest
import torch
import yaml
from small import GRPO, TASK, TRAIN, by_length

from chainforge.chain.plan import plan_chain
from chainforge.chain.spec import load_chain
from chainforge.core.artifacts import read_json
from chainforge.core.jsonl import read_rows, write_rows
from chainforge.core.transcript import write
from chainforge.doctor.environment import Machine
from chainforge.doctor.preflight import examine
from chainforge.hub.export import export

TOKENIZER = Path(__file__).parents[2] / "recipes/quickstart/base"
WINDOW = {"sliding_window": 16}  # shorter than every prompt
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
# With larger weights it repeats the last token of a prompt.
GEMMA = MIXED | {"head_dim": 16, "initializer_range": 0.1}
VISION = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32,
          "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
IMAGES = {"vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 650,
          "boi_token_index": 651, "eoi_token_index": 652}  # fmt: skip
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
          "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
# The model type, settings of its own, whether head and embeddings are tied, the files' precision.
ARCHITECTURES = {
    "Qwen2.5": ("qwen2", {}, True, "bfloat16"),
    "Qwen3": ("qwen3", {"head_dim": 16}, False, "bfloat16"),
    "Qwen3.5": ("qwen3_5_text", LINEAR | {"head_dim": 16}, True, "bfloat16"),
    "Llama 3": ("llama", {"rope_parameters": ROPE}, False, "bfloat16"),
    "SmolLM2": ("llama", {}, True, "float16"),
    "Gemma 2": ("gemma2", GEMMA, True, "float16"),
    "Gemma 3": ("gemma3_text", GEMMA, True, "bfloat16"),
    "Gemma 3 with images": ("gemma3", IMAGES, True, "bfloat16"),
    "Mistral": ("mistral", WINDOW, False, "float16"),
    "Phi": ("phi", {}, False, "float16"),
    "Phi 3": ("phi3", WINDOW, False, "bfloat16"),
}
SHARDED = "Llama 3"
SLOW = {"learning_rate": 1e-3}
SAVED = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
SFT = TRAIN | SLOW | SAVED
RL = GRPO | SLOW | {"tasks": [TASK | {"size": 4}], "beta": 0.1}
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"]}
LOOSE = {"require_correct": False, "require_format": False, "max_repetition": None,
         "min_language": None, "num_samples": 4, "max_new_tokens": 200,
         "temperature": 4}  # fmt: skip
GREEDY = {"tasks": [TASK | {"split": "test", "size": 6}], "num_samples": 1, "temperature": 0,
          "max_new_tokens": 40, "generation_batch_size": 4, "dtype": "float32"}  # fmt: skip


def make(name, folder):
    """Save a random model with the quickstart's tokenizer, its embeddings padded as real ones."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    kind, own, tied, dtype = ARCHITECTURES[name]
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
              "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": tied}  # fmt: skip
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 704,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
             "initializer_range": 0.3}  # fmt: skip
    if "vision_config" in own:
        sizes = {"text_config": sizes | GEMMA | tokens}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | tokens | own))
    # Many, so that a random model's completions end.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(41, 640, 60)]
    size = "60KB" if name == SHARDED else "5GB"
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=size)
    tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists() == (name == SHARDED)
    return str(folder)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_goes_through_every_stage(name, tmp_path, stage):
    def run(kind, place, settings, *flags):
        code, error = stage(kind, place, settings, *flags)
        assert code == 0, f"{place}: {error}"
        return tmp_path / place

    base, traces = make(name, tmp_path / "base"), tmp_path / "traces.jsonl"
    ask = [{"role": "user", "content": "1 + 1 ="}]
    write_rows(traces, [{"prompt": ask, "completion": write("1 + 1 = 2", "2")}] * 4)
    rl = RL | {"rewards": by_length(tmp_path)}
    cold = run("sft", "cold", SFT, "--model_name_or_path", base, "--data", traces)
    first = run("grpo", "rl", rl, "--model_name_or_path", cold / "model")
    sampled = {"tasks": rl["tasks"]} | LOOSE
    picks = run("reject", "picks", sampled, "--model_name_or_path", first / "model")
    full = run("sft", "full", SFT, "--model_name_or_path", base, "--data", picks)
    lora = run("sft", "lora", SFT | LORA, "--model_name_or_path", base, "--data", picks)
    final = run("grpo", "final", rl | LORA | {"adapter": "continue"},
                "--model_name_or_path", lora / "adapter")  # fmt: skip
    for reasoned in (first, final):
        assert read_rows(reasoned / "metrics.jsonl")[0]["kl"] == pytest.approx(0, abs=1e-6)
    models = {"base": base, "full": full / "model", "final": final / "model"}
    given = [f"{key}={path}" for key, path in models.items()]
    scores = run("evaluate", "scores", GREEDY, "--models", *given)
    check_greedy(models, read_rows(scores / "samples.jsonl"))
    check_saved(name, full, final)
    check_doctor(tmp_path)


def check_greedy(models, rows):
    """Compare completions with those of `model.generate`, token for token."""
    from transformers import AutoTokenizer

    assert len({row["completion"] for row in rows}) >= 6
    assert sum(row["tokens"] for row in rows) > 150
    for name, path in models.items():
        model, tokenizer = opened(path), AutoTokenizer.from_pretrained(path)
        for row in (row for row in rows if row["model"] == name):
            prompt = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            made = model.generate(**prompt, do_sample=False, max_new_tokens=40)
            ids = made[0, prompt["input_ids"].shape[1] :].tolist()
            text = tokenizer.decode(ids[: -1 if row["finish_reason"] == "stop" else None],
                                    skip_special_tokens=True)  # fmt: skip
            assert (row["completion"], row["tokens"]) == (text, len(ids))


def check_saved(name, full, final):
    """Check that what was saved and exported is what was trained, in the precision of the base."""
    from peft import PeftModel
    from safetensors.torch import load_file

    dtype, tied = getattr(torch, ARCHITECTURES[name][3]), ARCHITECTURES[name][2]
    trained = load_file(full / "checkpoints/checkpoint-2/model.safetensors")  # in float32
    saved = load_file(full / "model/model.safetensors")
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    for key, weight in saved.items():
        assert torch.equal(weight, trained[key].to(dtype))
    for stage in (full, final):
        config = read_json(stage / "model/config.json")
        assert (config["dtype"], config["tie_word_embeddings"]) == (ARCHITECTURES[name][3], tied)
        weights = load_file(stage / "model/model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {dtype}
        assert ("lm_head.weight" in weights) != tied
        export(stage, str(stage / "sent"), "model")
        assert torch.equal(logits(opened(stage / "sent")), logits(opened(stage / "model")))
    export(final, str(final / "alone"), "adapter")
    adapted = PeftModel.from_pretrained(opened(final.parent / "base"), final / "alone")
    merged = logits(opened(final / "model"))
    assert (logits(adapted) - merged).norm() < 0.05 * merged.norm()  # which is rounded once more


def check_doctor(folder):
    """Check that the doctor finds nothing wrong with a chain of the same stages."""
    stages = [
        {"name": "picks", "recipe": "reject", "model": "base"},
        {"name": "cold", "recipe": "sft", "model": "base", "data": "picks"},
        {"name": "rl", "recipe": "grpo", "model": "cold"},
        {"name": "lora", "recipe": "sft", "model": "rl", "data": "picks"},
        {"name": "scores", "recipe": "evaluate", "models": ["base", "lora"]},
    ]
    stages = [stage | {"config": f"{stage['name']}.yaml"} for stage in stages]
    (folder / "chain.yaml").write_text(
        yaml.safe_dump({"name": "small", "base": "base", "stages": stages})
    )
    chain = load_chain(folder)
    found = examine(Machine((), 2**34, 2), chain, plan_chain(chain, folder / "runs"))
    assert [finding for finding in found if finding.level == "error"] == []


def opened(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="float32")


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(40, 80)[None]).logits
